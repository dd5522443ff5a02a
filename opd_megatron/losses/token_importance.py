"""Which tokens of a step are worth a loss: the selection rules of TIP (arXiv 2604.14084) and its baselines.

Shapes: T this rank's response tokens, N those of all ranks, B responses.

    h_t = H(p_t) / ln V        entropy of the student, over its largest value                                      (Eq. 2)
    δ_t = KL(p_t || q_t)       reverse KL, never clipped pointwise, also where the loss is another divergence        (Eq. 3)
    ĥ, δ̂                      min-max over the step, h after a cut at its 0.98 quantile; 0 where all are equal
    kept                       the best ⌊ratio m⌋ tokens of each response of m tokens; of equal scores the earlier   (Eq. 8)

All arithmetic is fp64 on the host, without gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.losses.fused_head import TokenStatistics
from opd_megatron.losses.position_weights import position_weights
from opd_megatron.losses.step_tokens import StepTokens, as_list, require_lengths, whole_step
from opd_megatron.losses.token_weights import TokenWeights, token_weights

__all__ = ["RULES", "Axis", "Selection", "SelectionRule", "TokenWeights", "position_weights", "select_tokens", "token_selection", "token_weights"]

RULES = ("all", "entropy_sample", "entropy_topk", "soft_or_topk", "q3_topk", "div_topk", "bottom_topk")
SCOPES = ("step", "sequence")
_DELTAS = ("reverse_kl", "forward_kl")
_USES_DELTA = ("soft_or_topk", "div_topk", "bottom_topk")
_NORMALISES_DELTA = ("soft_or_topk", "bottom_topk")
# The weight of a token without entropy in a draw: where no token has any, all are equally likely (the authors' code).
_SMALLEST_ENTROPY = 1e-8


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """How tokens are chosen. Defaults are the paper's reading: normalise over the step, select in each response.

    `norm_scope` "step" is all that the call is given, over all ranks of its group: a caller with one micro-batch normalises over that. A running
    normalisation needs the past, which a pure function has not. `select_scope` "step" takes the best of the whole step in place of each response.
    `delta` is the divergence in the scores, `delta_clip_quantile` cuts it as `entropy_clip_quantile` cuts entropy: one outlier squeezes all
    others towards 0, and soft_or_topk into entropy_topk. `min_keep` is at least how many tokens are kept of what a selection looks at.
    With `importance_weights`, entropy_sample draws each token by itself, with inclusion probability π_t = min(1, c h_t) and Σ π_t = ratio m, and kept
    ones weigh 1/π_t: over all m tokens (denominator "all") the mean gradient is that of every token (App. A.3).
    Raises ValueError for an unknown name, a number outside its range, or an option that the rule does not look at.
    """

    rule: str
    ratio: float
    norm_scope: str = "step"
    select_scope: str = "sequence"
    delta: str = "reverse_kl"
    entropy_clip_quantile: float | None = 0.98
    delta_clip_quantile: float | None = None
    min_keep: int = 0
    importance_weights: bool = False

    def __post_init__(self) -> None:
        if self.delta not in _DELTAS:
            raise ValueError(f"delta={self.delta!r} is not among the token statistics; use one of {', '.join(_DELTAS)}")
        for name, known in (("rule", RULES), ("norm_scope", SCOPES), ("select_scope", SCOPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; use one of {', '.join(known)}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} must be in (0, 1]")
        for name in ("entropy_clip_quantile", "delta_clip_quantile"):
            quantile = getattr(self, name)
            if quantile is not None and not 0 < quantile <= 1:
                raise ValueError(f"{name}={quantile} must be in (0, 1], or None for none")
        if self.min_keep < 0:
            raise ValueError(f"min_keep={self.min_keep} must not be negative")
        if self.delta != "reverse_kl" and self.rule not in _USES_DELTA:
            raise ValueError(f"delta={self.delta!r} belongs to {', '.join(_USES_DELTA)}, not to rule={self.rule!r}")
        if self.delta_clip_quantile is not None and self.rule not in _NORMALISES_DELTA:
            raise ValueError(f"delta_clip_quantile={self.delta_clip_quantile} belongs to {', '.join(_NORMALISES_DELTA)}, not to rule={self.rule!r}")
        if self.importance_weights and (self.rule != "entropy_sample" or self.min_keep):
            raise ValueError(f"importance_weights belongs to rule='entropy_sample' with min_keep=0, not to rule={self.rule!r}, min_keep={self.min_keep}")

    @property
    def keeps_all(self) -> bool:
        return self.rule == "all" or self.ratio == 1

    def num_kept(self, num_tokens: int) -> int:
        """Return how many of `num_tokens` tokens are kept: ⌊ratio m⌋ in double precision, and never more than there are."""
        return min(num_tokens, max(self.min_keep, math.floor(self.ratio * num_tokens)))


@dataclass(frozen=True)
class Axis:
    """The least and the greatest value of one statistic over the step, after the cut at `clip`; no cut is None. Entropy is h, divergences are nats."""

    minimum: float
    maximum: float
    clip: float | None


@dataclass(frozen=True)
class Selection:
    """What was kept and by which numbers.

    `weights_T` is 1 or 0, or 1/π; fp32, on the statistics' device. `threshold_B` is for each response of this rank the score of the last token that its
    selection took (fp64, host), NaN where it took none or there are no scores. `entropy` and `divergence` are None where the rule does not
    normalise them over the step.
    """

    weights_T: torch.Tensor
    threshold_B: torch.Tensor
    entropy: Axis | None = None
    divergence: Axis | None = None


def select_tokens(
    statistics: TokenStatistics,
    response_lengths: Sequence[int] | torch.Tensor,
    *,
    rule: str,
    ratio: float,
    vocab_size: int,
    dp_group: dist.ProcessGroup | None = None,
    generator: torch.Generator | None = None,
    norm_scope: str = "step",
    select_scope: str = "sequence",
    delta: str = "reverse_kl",
    entropy_clip_quantile: float | None = 0.98,
    delta_clip_quantile: float | None = None,
    min_keep: int = 0,
    importance_weights: bool = False,
    response_ids: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the weight of every token, fp32 [T]: 1 kept, 0 dropped. The options are those of `SelectionRule`, the rest is that of `token_selection`."""
    chosen = SelectionRule(
        rule=rule,
        ratio=ratio,
        norm_scope=norm_scope,
        select_scope=select_scope,
        delta=delta,
        entropy_clip_quantile=entropy_clip_quantile,
        delta_clip_quantile=delta_clip_quantile,
        min_keep=min_keep,
        importance_weights=importance_weights,
    )
    shared = {"vocab_size": vocab_size, "dp_group": dp_group, "generator": generator, "response_ids": response_ids}
    return token_selection(statistics, response_lengths, chosen, **shared).weights_T  # type: ignore[arg-type]


def token_selection(
    statistics: TokenStatistics,
    response_lengths: Sequence[int] | torch.Tensor,
    rule: SelectionRule,
    *,
    vocab_size: int,
    dp_group: dist.ProcessGroup | None = None,
    generator: torch.Generator | None = None,
    response_ids: Sequence[int] | None = None,
) -> Selection:
    """Return which tokens are kept, and the numbers that decided it; `vocab_size` is the one without padding.

    `dp_group`: ranks that hold different, whole responses, which form one step together. Every one of them calls, also without responses, and the
    result is that of one rank with all responses. Without a group this rank holds the step.

    entropy_sample draws from `generator` (torch's default one where it is None) a single seed, that of the group's first rank, from which follows one
    number for each token of the step, in the order of `response_ids`, the responses' places in the step, or of the ranks. Ranks that hold the same
    tokens need generators in the same state. The other rules draw nothing.

    Raises ValueError, on all ranks of the group, for a score that is not a finite number, for lengths or ids that do not fit; and for a
    vocabulary of fewer than two ids.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size} must be at least 2")
    lengths = as_list(response_lengths)
    if rule.keeps_all:
        require_lengths(lengths, statistics.student_entropy_T.numel())
        ones_T = torch.ones_like(statistics.student_entropy_T, dtype=torch.float32)
        return Selection(ones_T, torch.full((len(lengths),), math.nan, dtype=torch.float64))
    seed = 0
    if rule.rule == "entropy_sample":
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=None if generator is None else generator.device))
    tokens = whole_step(statistics, lengths, dp_group=dp_group, response_ids=response_ids, seed=seed)
    entropy_axis = divergence_axis = None
    if rule.importance_weights:
        weights_N = _draw_each(tokens, rule, vocab_size)
        score_N = torch.full_like(weights_N, math.nan)
    else:
        score_N, entropy_axis, divergence_axis = _scores(tokens, rule, vocab_size)
        weights_N = _best(score_N, tokens, rule)
    thresholds = _thresholds(score_N, weights_N, tokens, rule)
    own_T = weights_N[tokens.own_tokens_T].to(statistics.student_entropy_T.device, torch.float32)
    own_B = torch.tensor([thresholds[one] for one in tokens.own_responses_B], dtype=torch.float64)
    return Selection(own_T, own_B, entropy_axis, divergence_axis)


def _entropy(tokens: StepTokens, vocab_size: int) -> torch.Tensor:
    return _finite(tokens.entropy_N, "student_entropy_T", tokens) / math.log(vocab_size)


def _scores(tokens: StepTokens, rule: SelectionRule, vocab_size: int) -> tuple[torch.Tensor, Axis | None, Axis | None]:
    """Return each token's score by the rule, the higher the better, and the ranges it was normalised by."""
    if rule.rule == "entropy_sample":
        # The k largest log(u)/w of uniform u are a draw of k without replacement, each with probability proportional to w among those left
        # (Efraimidis and Spirakis, 2006).
        return (-_uniform(tokens)).log1p() / _entropy(tokens, vocab_size).clamp_min(_SMALLEST_ENTROPY), None, None
    if rule.rule == "div_topk":
        return _divergence(tokens, rule), None, None
    spans = tokens.spans(rule.norm_scope)
    entropy_N, entropy_axis = _normalised(_entropy(tokens, vocab_size), spans, rule.entropy_clip_quantile)
    if rule.rule == "entropy_topk":
        return entropy_N, entropy_axis, None
    if rule.rule == "q3_topk":
        # Ranked by the forward KL, which sees the mass that a confident student misses; the loss stays what it is (section 7.3).
        return _finite(tokens.forward_kl_N, "forward_kl_T", tokens) * (1 - entropy_N), entropy_axis, None
    divergence_N, divergence_axis = _normalised(_divergence(tokens, rule), spans, rule.delta_clip_quantile)
    return _soft_or(entropy_N, divergence_N), entropy_axis, divergence_axis


def _divergence(tokens: StepTokens, rule: SelectionRule) -> torch.Tensor:
    return _finite(tokens.reverse_kl_N if rule.delta == "reverse_kl" else tokens.forward_kl_N, f"{rule.delta}_T", tokens)


def _soft_or(left_N: torch.Tensor, right_N: torch.Tensor) -> torch.Tensor:
    """Return a + b - ab (Eq. 7) as max + (1 - max) min, which is exactly 1 where either is 1: rounding must not order what is tied."""
    greater_N = torch.maximum(left_N, right_N)
    return greater_N + (1 - greater_N) * torch.minimum(left_N, right_N)


def _normalised(values_N: torch.Tensor, spans: list[slice], clip_quantile: float | None) -> tuple[torch.Tensor, Axis | None]:
    """Return the values of each span cut at their quantile and scaled to [0, 1], 0 where all are equal; and the range, if one span is all."""
    result_N, axis = torch.zeros_like(values_N), None
    for span in spans:
        values = values_N[span]
        if values.numel() == 0:
            continue
        clip = None if clip_quantile is None else exact_quantile(values, clip_quantile)
        if clip is not None:
            values = values.clamp(max=clip)
        minimum, maximum = values.min().item(), values.max().item()
        if maximum > minimum:
            result_N[span] = (values - minimum) / (maximum - minimum)
        if values.numel() == values_N.numel():
            axis = Axis(minimum, maximum, clip)
    return result_N, axis


def exact_quantile(values_N: torch.Tensor, quantile: float) -> float:
    """Return the quantile by linear interpolation, as numpy's, of any number of values; torch.quantile refuses more than 2^24."""
    # Sorted, not selected: torch's kthvalue takes quadratic time on values that are in order already.
    ordered_N = values_N.sort().values
    place = quantile * (ordered_N.numel() - 1)
    below = math.floor(place)
    share = place - below
    low, high = ordered_N[below].item(), ordered_N[min(below + 1, ordered_N.numel() - 1)].item()
    # From the nearer end, so that it grows with the quantile in spite of rounding.
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)


def _best(score_N: torch.Tensor, tokens: StepTokens, rule: SelectionRule) -> torch.Tensor:
    """Return 1 for the tokens with the highest scores of each span, for bottom_topk the lowest, and 0 for the others; of equal scores the earlier ones."""
    spans = tokens.spans(rule.select_scope)
    span_N = _numbers_of(spans)
    order_N = score_N.sort(descending=rule.rule != "bottom_topk", stable=True).indices
    # Sorted by span, the stable sort leaves each span's tokens in the order of their scores.
    order_N = order_N[span_N[order_N].sort(stable=True).indices]
    first_N = torch.tensor([span.start for span in spans], dtype=torch.int64)[span_N]
    count_N = torch.tensor([rule.num_kept(span.stop - span.start) for span in spans], dtype=torch.int64)[span_N]
    weights_N = torch.zeros_like(score_N)
    weights_N[order_N] = (torch.arange(score_N.numel()) - first_N < count_N).to(score_N.dtype)
    return weights_N


def _thresholds(score_N: torch.Tensor, weights_N: torch.Tensor, tokens: StepTokens, rule: SelectionRule) -> list[float]:
    """Return the last score taken in the selection that each response belongs to: the lowest kept one, the highest where the lowest are kept."""
    last = torch.max if rule.rule == "bottom_topk" else torch.min
    kept = [score_N[span][weights_N[span] > 0] for span in tokens.spans(rule.select_scope)]
    thresholds = [last(scores).item() if scores.numel() else math.nan for scores in kept]
    return thresholds if rule.select_scope == "sequence" else thresholds * len(tokens.lengths)


def _draw_each(tokens: StepTokens, rule: SelectionRule, vocab_size: int) -> torch.Tensor:
    """Return 1/π for tokens drawn each by itself with inclusion probability π, 0 for the others.

    The expected number is ratio m, not its floor: of a response of one token a floor would never take it, and no weight makes up for that.
    """
    weight_N = _entropy(tokens, vocab_size).clamp_min(_SMALLEST_ENTROPY)
    probability_N = torch.ones_like(weight_N)
    for span in tokens.spans(rule.select_scope):
        probability_N[span] = _inclusion_probability(weight_N[span], rule.ratio * (span.stop - span.start))
    return torch.where(_uniform(tokens) < probability_N, 1 / probability_N, 0.0)


def _inclusion_probability(weight_M: torch.Tensor, total: float) -> torch.Tensor:
    """Return min(1, c w) with the c for which they add up to `total`, at most the number of weights."""
    certain = torch.zeros_like(weight_M, dtype=torch.bool)
    while True:
        num_certain = int(certain.sum())
        scale = (total - num_certain) / weight_M[~certain].sum()
        now_certain = certain | (weight_M * scale >= 1)
        if int(now_certain.sum()) == num_certain:
            return torch.where(certain, 1.0, weight_M * scale)
        certain = now_certain


def _uniform(tokens: StepTokens) -> torch.Tensor:
    """Return one number in [0, 1) for each token of the step: a function of the seed and the token's place in the step."""
    return torch.rand(tokens.num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens.seed))


def _numbers_of(spans: list[slice]) -> torch.Tensor:
    return torch.arange(len(spans)).repeat_interleave(torch.tensor([span.stop - span.start for span in spans], dtype=torch.int64))


def _finite(values_N: torch.Tensor, name: str, tokens: StepTokens) -> torch.Tensor:
    """Return the values, what rounding left below 0 as 0; raise ValueError for one that is not a number to rank by."""
    bad_N = (~values_N.isfinite()).nonzero().flatten().tolist()
    if bad_N:
        response = next(number for number, span in enumerate(tokens.spans("sequence")) if bad_N[0] < span.stop)
        place = f"token {bad_N[0] - tokens.spans('sequence')[response].start} of response {response}"
        raise ValueError(
            f"{name} of {len(bad_N)} of {len(values_N)} tokens is not finite, first {values_N[bad_N[0]]} at {place}: "
            "a model's logits overflowed, or one model gives an id no probability that the other may produce"
        )
    return values_N.clamp_min(0)
