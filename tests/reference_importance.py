"""Token selection and weights as the papers write them, token by token in numpy fp64: what the tests of token importance compare with.

Written to be read, not to be fast; nothing here is shared with the code under test. One list entry per response.

    h_t = H/ln V                δ_t = the chosen divergence; both at least 0                                  (TIP, arXiv 2604.14084, Eq. 2 and 3)
    ĥ, δ̂ = min-max over the scope, h after a cut at its quantile; 0 where all are equal
    s_t = 1 - (1 - ĥ)(1 - δ̂)                                                                                   (Eq. 7)
    kept = the first floor(ratio m) of a response of m tokens, by falling score, then by place                  (Eq. 8)
"""

import math

import numpy as np
import torch

from opd_megatron.losses import TokenStatistics

TOP_RULES = ["entropy_topk", "soft_or_topk", "q3_topk", "div_topk", "bottom_topk"]


def naive_scores(entropies, reverse_kls, forward_kls, *, rule, vocab_size, norm_scope="step", delta="reverse_kl", entropy_clip=0.98, delta_clip=None):
    """Return the scores of every response's tokens, a list of arrays."""
    entropies, reverse_kls, forward_kls = ([np.maximum(np.asarray(one, np.float64), 0) for one in many] for many in (entropies, reverse_kls, forward_kls))
    deltas = reverse_kls if delta == "reverse_kl" else forward_kls
    h_hats = naive_min_max([one / math.log(vocab_size) for one in entropies], norm_scope, entropy_clip)
    delta_hats = naive_min_max(deltas, norm_scope, delta_clip)
    if rule == "entropy_topk":
        return h_hats
    if rule == "div_topk":
        return deltas
    if rule == "q3_topk":
        return [forward * (1 - h_hat) for forward, h_hat in zip(forward_kls, h_hats)]
    assert rule in ("soft_or_topk", "bottom_topk")
    return [1 - (1 - h_hat) * (1 - delta_hat) for h_hat, delta_hat in zip(h_hats, delta_hats)]


def naive_min_max(values, norm_scope, quantile):
    """Return the values scaled to [0, 1] over all responses, or each response by itself."""
    if norm_scope == "sequence":
        return [naive_min_max([one], "step", quantile)[0] for one in values]
    everything = np.concatenate(values) if values else np.zeros(0)
    if len(everything) == 0:
        return values
    cut = np.inf if quantile is None else np.quantile(everything, quantile, method="linear")
    least, greatest = np.minimum(everything, cut).min(), np.minimum(everything, cut).max()
    return [np.zeros(len(one)) if greatest == least else (np.minimum(one, cut) - least) / (greatest - least) for one in values]


def naive_kept(scores, *, rule, ratio, select_scope="sequence", min_keep=0):
    """Return 1 for kept tokens and 0 for the others, of every response."""
    if select_scope == "step":
        (kept,) = naive_kept([np.concatenate([*scores, np.zeros(0)])], rule=rule, ratio=ratio, min_keep=min_keep)
        return np.split(kept, np.cumsum([len(one) for one in scores])[:-1])
    result = []
    for score in scores:
        sign = 1 if rule == "bottom_topk" else -1
        best_first = sorted(range(len(score)), key=lambda place: (sign * score[place], place))
        kept = np.zeros(len(score))
        kept[best_first[: max(math.floor(ratio * len(score)), min_keep)]] = 1
        result.append(kept)
    return result


def naive_position_weight(place, length, *, minimum=0.25, center=0.30, slope=0.10):
    """Return the weight of token `place`, counted from 1, of a response of `length` tokens (PW-OPSD)."""
    fraction = (place - 0.5) / length
    return minimum + (1 - minimum) / (1 + math.exp(-(fraction - center) / slope))


def naive_loss(kept, weights, divergences, *, reduction, denominator):
    """Return the loss of the step from lists of arrays, one per response."""

    def divisor(kept_i, weights_i):
        return {"kept": kept_i.sum(), "weights": (kept_i * weights_i).sum(), "all": float(len(kept_i))}[denominator]

    if reduction == "token":
        total = sum((k * w * d).sum() for k, w, d in zip(kept, weights, divergences))
        return total / sum(divisor(k, w) for k, w in zip(kept, weights))
    means = [(k * w * d).sum() / divisor(k, w) for k, w, d in zip(kept, weights, divergences) if divisor(k, w) > 0]
    return sum(means) / len(means)


def random_step(lengths, seed=0, levels=None):
    """Return entropies, reverse and forward KLs of responses, lists of fp32 arrays: many tokens near 0 and few large. With `levels`, many are equal."""
    generator = np.random.default_rng(seed)

    def draw(scale):
        values = [(scale * generator.random(length) ** 4).astype(np.float32) for length in lengths]
        return values if levels is None else [np.round(one / scale * levels).astype(np.float32) / levels for one in values]

    return draw(5.0), draw(3.0), draw(8.0)


def as_statistics(step):
    """Return the statistics of all tokens, response after response."""
    return TokenStatistics(*(torch.from_numpy(np.concatenate([*many, np.zeros(0, np.float32)]).astype(np.float32)) for many in step))


def split_by(values_T, lengths):
    return [part.numpy() for part in values_T.split(list(lengths))]
