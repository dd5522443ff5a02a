"""Which tokens are kept, against a naive numpy reading of the paper, and the properties that the reading must have.

Not covered here: several ranks (tests/distributed/test_token_importance.py), what weights do with kept tokens (test_token_weights.py), and training.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_megatron.losses import SelectionRule, TokenStatistics, fused_head_divergence, select_tokens, token_selection, token_statistics
from opd_megatron.losses.token_importance import RULES, exact_quantile
from tests.reference_importance import TOP_RULES, as_statistics, naive_kept, naive_scores, random_step, split_by
from tests.reference_losses import head_problem, naive_divergence, relative_error

VOCAB_SIZE = 1000
RAGGED = [7, 1, 0, 30, 2, 12, 3]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kept(step, lengths, **options):
    """The weights of every response's tokens, a list of arrays."""
    return split_by(select_tokens(as_statistics(step), lengths, **{"vocab_size": VOCAB_SIZE, "generator": generator()} | options), lengths)


def tokens(entropy, reverse_kl=None, forward_kl=None):
    """One step from lists of lists; what is not given is 0."""
    many = (entropy, reverse_kl or [[0] * len(one) for one in entropy], forward_kl or [[0] * len(one) for one in entropy])
    return [[np.asarray(one, np.float32) for one in values] for values in many]


def same(left, right):
    return len(left) == len(right) and all(np.array_equal(one, other) for one, other in zip(left, right))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    rule=st.sampled_from(TOP_RULES),
    lengths=st.lists(st.integers(0, 40), max_size=8),
    ratio=st.floats(0.01, 1),
    seed=st.integers(0, 999),
    levels=st.sampled_from([None, None, 1, 4]),
    norm_scope=st.sampled_from(["step", "sequence"]),
    select_scope=st.sampled_from(["sequence", "step"]),
    min_keep=st.sampled_from([0, 0, 1, 3]),
    entropy_clip=st.sampled_from([0.98, 0.5, 1.0, None]),
    delta_clip=st.sampled_from([None, 0.9]),
    delta=st.sampled_from(["reverse_kl", "forward_kl"]),
)
def test_every_rule_is_its_naive_reading(rule, lengths, ratio, seed, levels, norm_scope, select_scope, min_keep, entropy_clip, delta_clip, delta):
    step = random_step(lengths, seed, levels)
    if rule not in ("soft_or_topk", "bottom_topk"):
        delta_clip, delta = None, delta if rule == "div_topk" else "reverse_kl"
    scores = naive_scores(*step, rule=rule, vocab_size=VOCAB_SIZE, norm_scope=norm_scope, delta=delta, entropy_clip=entropy_clip, delta_clip=delta_clip)
    expected = naive_kept(scores, rule=rule, ratio=ratio, select_scope=select_scope, min_keep=min_keep)
    options = {"entropy_clip_quantile": entropy_clip, "delta_clip_quantile": delta_clip, "delta": delta, "min_keep": min_keep}
    result = kept(step, lengths, rule=rule, ratio=ratio, norm_scope=norm_scope, select_scope=select_scope, **options)
    assert same(result, expected) if lengths else result == []


@pytest.mark.parametrize("rule", [*TOP_RULES, "entropy_sample"])
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 0.99])
def test_floor_of_the_ratio_is_kept_of_every_response(rule, ratio):
    """Of one token at 50 % nothing, and of any response at 1 %."""
    counts = [int(one.sum()) for one in kept(random_step(RAGGED), RAGGED, rule=rule, ratio=ratio)]
    assert counts == [math.floor(ratio * length) for length in RAGGED]
    counts = [int(one.sum()) for one in kept(random_step(RAGGED), RAGGED, rule=rule, ratio=ratio, min_keep=2)]
    assert counts == [min(length, max(2, math.floor(ratio * length))) for length in RAGGED]
    whole = kept(random_step(RAGGED), RAGGED, rule=rule, ratio=ratio, select_scope="step")
    assert np.concatenate(whole).sum() == math.floor(ratio * sum(RAGGED))


HAND = [
    ("soft_or_topk", 0.6, [1, 1, 1, 0, 0]),
    ("bottom_topk", 0.4, [1, 0, 0, 1, 0]),
    ("q3_topk", 0.4, [1, 0, 0, 0, 1]),
    ("div_topk", 0.4, [1, 0, 1, 0, 0]),
    ("entropy_topk", 0.4, [0, 1, 1, 0, 0]),
]


@pytest.mark.parametrize(("rule", "ratio", "expected"), HAND, ids=[rule for rule, *_ in HAND])
def test_worked_out_by_hand(rule, ratio, expected):
    """Entropy spans 0 to 4 and reverse KL 0 to 2, so s is 0.5, 0.625, 1, 0, 0.5, and Q3 scores 8, 0.75, 0, 1, 3."""
    step = tokens([[0, 2, 4, 0, 2]], [[1, 0.5, 2, 0, 0]], [[8, 1.5, 9, 1, 6]])
    assert kept(step, [5], rule=rule, ratio=ratio, entropy_clip_quantile=None)[0].tolist() == expected


@pytest.mark.parametrize("rule", TOP_RULES)
def test_of_equal_scores_the_earlier_positions_are_kept(rule):
    """One response of 100 equal tokens among others: an unstable sort moves equal elements from 17 on."""
    lengths = [3, 100, 1]
    step = tokens(*([[[4, 2, 1], [2] * 100, [3]]] * 3))
    result = kept(step, lengths, rule=rule, ratio=0.3)
    assert result[1].tolist() == [1] * 30 + [0] * 70


def test_tokens_at_the_cut_tie_whatever_their_divergence():
    """Half of the entropies reach the cut: their score is 1 exactly, not 1 and a rounding that orders them by divergence."""
    divergences = np.random.default_rng(0).random(100)
    step = tokens([[*np.linspace(0, 1, 100), *np.linspace(2, 3, 100)]], [[*(0.1 * divergences), *divergences]])
    (result,) = kept(step, [200], rule="soft_or_topk", ratio=0.25, entropy_clip_quantile=0.5)
    assert result.tolist() == [0] * 100 + [1] * 50 + [0] * 50


@pytest.mark.parametrize("rule", TOP_RULES)
@pytest.mark.parametrize("scope", ["step", "sequence"])
def test_a_permutation_of_responses_permutes_the_result_and_nothing_else(rule, scope):
    step, order = random_step(RAGGED), np.random.default_rng(1).permutation(len(RAGGED))
    result = kept(step, RAGGED, rule=rule, ratio=0.4, norm_scope=scope)
    permuted = [[many[one] for one in order] for many in step]
    assert same(kept(permuted, [RAGGED[one] for one in order], rule=rule, ratio=0.4, norm_scope=scope), [result[one] for one in order])


@pytest.mark.parametrize("scope", ["step", "sequence"])
def test_an_axis_without_range_leaves_the_other_one(scope):
    """Soft-OR without divergence is entropy_topk, without entropy it is div_topk; without both the first tokens are kept."""
    lengths = [25, 40]
    entropy, reverse, forward = random_step(lengths)
    flat = [np.full(length, 0.7, np.float32) for length in lengths]
    shared = {"ratio": 0.3, "norm_scope": scope}
    soft_or = kept([entropy, flat, forward], lengths, rule="soft_or_topk", **shared)
    assert same(soft_or, kept([entropy, reverse, forward], lengths, rule="entropy_topk", **shared))
    soft_or = kept([flat, reverse, forward], lengths, rule="soft_or_topk", **shared)
    assert same(soft_or, kept([entropy, reverse, forward], lengths, rule="div_topk", **shared))
    assert [one[: len(one) * 3 // 10].all() for one in kept([flat, flat, flat], lengths, rule="soft_or_topk", **shared)] == [True, True]


def test_q3_prefers_confidence_then_forward_divergence():
    """Equal forward KL: the lower entropy. Equal entropy: the higher forward KL, whatever the reverse one says."""
    assert kept(tokens([[3, 1, 2, 4]], None, [[5] * 4]), [4], rule="q3_topk", ratio=0.5)[0].tolist() == [0, 1, 1, 0]
    step = tokens([[1, 1, 1, 1], [0, 9]], [[9, 8, 1, 2], [0, 0]], [[1, 2, 9, 8], [0, 0]])
    assert kept(step, [4, 2], rule="q3_topk", ratio=0.5)[0].tolist() == [0, 0, 1, 1]


def test_the_cut_is_of_entropy_only_and_one_extreme_divergence_makes_soft_or_an_entropy_rule():
    lengths = [200, 100]
    entropy, reverse, forward = random_step(lengths)
    plain = kept([entropy, reverse, forward], lengths, rule="soft_or_topk", ratio=0.2)
    reverse[1][-1] = 1e7
    step, statistics = [entropy, reverse, forward], as_statistics([entropy, reverse, forward])
    by_entropy = kept(step, lengths, rule="entropy_topk", ratio=0.2)
    assert not np.array_equal(plain[0], by_entropy[0])
    assert same(kept(step, lengths, rule="soft_or_topk", ratio=0.2)[:1], by_entropy[:1])
    restored = kept(step, lengths, rule="soft_or_topk", ratio=0.2, delta_clip_quantile=0.99)
    assert (restored[0] != plain[0]).mean() < 0.05 < (by_entropy[0] != plain[0]).mean()

    chosen = token_selection(statistics, lengths, SelectionRule(rule="soft_or_topk", ratio=0.2), vocab_size=VOCAB_SIZE)
    assert (chosen.divergence.maximum, chosen.divergence.clip) == (1e7, None)
    scaled = np.concatenate(entropy).astype(np.float64) / math.log(VOCAB_SIZE)
    assert chosen.entropy.maximum == chosen.entropy.clip == np.quantile(scaled, 0.98)
    assert chosen.entropy.minimum == scaled.min()


def test_thresholds_are_the_last_scores_taken():
    step = random_step(RAGGED)
    for rule, last in (("soft_or_topk", np.min), ("bottom_topk", np.max)):
        scores = naive_scores(*step, rule=rule, vocab_size=VOCAB_SIZE)
        chosen = token_selection(as_statistics(step), RAGGED, SelectionRule(rule=rule, ratio=0.4), vocab_size=VOCAB_SIZE)
        taken = [score[weight > 0] for score, weight in zip(scores, split_by(chosen.weights_T, RAGGED))]
        expected = [last(one) if len(one) else math.nan for one in taken]
        # The score is summed in another order than Eq. 7: a few units of 1e-16.
        assert chosen.threshold_B.tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    whole = SelectionRule(rule="soft_or_topk", ratio=0.4, select_scope="step")
    assert len(set(token_selection(as_statistics(step), RAGGED, whole, vocab_size=VOCAB_SIZE).threshold_B.tolist())) == 1


def test_a_micro_batch_by_itself_is_another_scope():
    """Over the step the tokens of the first response are all confident and its divergent ones are kept; by itself it has a range of its own."""
    step = tokens([[0.1, 0.2, 0.1, 0.2], [5, 0, 5, 0]], [[0.5, 0, 0.4, 0], [0, 1, 0, 1]])
    whole = kept(step, [4, 4], rule="soft_or_topk", ratio=0.5, entropy_clip_quantile=None)
    alone = kept([many[:1] for many in step], [4], rule="soft_or_topk", ratio=0.25, entropy_clip_quantile=None)
    assert whole[0].tolist() == [1, 0, 1, 0]
    assert alone[0].tolist() == [1, 0, 0, 0]
    alone = kept([many[:1] for many in step], [4], rule="soft_or_topk", ratio=0.5, entropy_clip_quantile=None)
    assert alone[0].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_without_tokens_has_no_weights(rule, lengths):
    for scope in ("sequence", "step"):
        assert select_tokens(as_statistics(random_step(lengths)), lengths, rule=rule, ratio=0.5, vocab_size=9, select_scope=scope).shape == (0,)


def test_what_rounding_left_below_zero_counts_as_zero():
    step = tokens([[0, -1e-7, 3, 1]], [[-1e-6, 0, 0, 2]], [[-1e-6, 0, 0, 1]])
    assert kept(step, [4], rule="div_topk", ratio=0.5)[0].tolist() == [1, 0, 0, 1]
    assert kept(step, [4], rule="entropy_topk", ratio=0.75)[0].tolist() == [1, 0, 1, 1]
    assert kept(step, [4], rule="q3_topk", ratio=0.5)[0].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("rule", [*RULES, "importance"])
def test_at_ratio_one_loss_and_gradient_are_those_of_no_selection_bit_for_bit(rule):
    models, _ = head_problem()
    statistics = token_statistics(*models)
    options = {"rule": "entropy_sample", "importance_weights": True} if rule == "importance" else {"rule": rule}
    weights_T = select_tokens(statistics, [20, 1, 8], ratio=1.0, vocab_size=64, **options)
    results = []
    for weight_T in (weights_T, None):
        result = fused_head_divergence(*models, kind="reverse_kl", token_weight_T=weight_T)
        results.append((result.loss_sum, *torch.autograd.grad(result.loss_sum, models[:2])))
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results))


@pytest.mark.parametrize("rule", [one for one in RULES if one != "all"])
def test_gradients_are_those_of_a_masked_loss_and_dropped_tokens_have_none(rule):
    """Ranked by whatever the rule looks at, the loss of a kept token stays its reverse KL."""
    models, _ = head_problem()
    lengths = [20, 1, 8]
    weights_T = select_tokens(token_statistics(*models), lengths, rule=rule, ratio=0.4, vocab_size=64, generator=generator())
    result = fused_head_divergence(*models, kind="reverse_kl", token_weight_T=weights_T)
    gradients = torch.autograd.grad(result.loss_sum, models[:2])
    hidden, head, teacher_hidden, teacher_head = (tensor.detach().double() for tensor in models)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    divergence_T = naive_divergence(hidden @ head.T, teacher_hidden @ teacher_head.T, kind="reverse_kl")
    loss = divergence_T[weights_T > 0].sum()
    # fp32 arithmetic against fp64: see TOLERANCE in tests/reference_losses.py.
    assert result.loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
    assert all(relative_error(ours, exact) < 1e-5 for ours, exact in zip(gradients, torch.autograd.grad(loss, leaves)))
    assert gradients[0][weights_T == 0].abs().max() == 0


def test_weights_are_fp32_without_gradient():
    asking = TokenStatistics(*(torch.rand(6, requires_grad=True) for _ in range(3)))
    for rule in RULES:
        weights_T = select_tokens(asking, torch.tensor([4, 2]), rule=rule, ratio=0.5, vocab_size=9)
        assert (weights_T.dtype, weights_T.requires_grad) == (torch.float32, False)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values, quantile):
    assert exact_quantile(torch.tensor(values, dtype=torch.float64), quantile) == np.quantile(values, quantile)


def test_quantiles_of_more_tokens_than_torch_takes():
    values_N = torch.arange(2**24 + 3, dtype=torch.float64).flip(0)
    with pytest.raises(RuntimeError, match="too large"):
        values_N.quantile(0.98)
    # 0.98 (2^24 + 2) = 16441674.26...: the values are their own places.
    assert exact_quantile(values_N, 0.98) == pytest.approx(0.98 * (2**24 + 2), abs=1e-6)


REFUSED = [
    ({"rule": "tip"}, r"rule='tip' is not known; use one of all, entropy_sample, entropy_topk, soft_or_topk, q3_topk, div_topk, bottom_topk"),
    ({"ratio": 0.0}, r"ratio=0.0 must be in \(0, 1\]"),
    ({"ratio": 1.2}, r"ratio=1.2 must be in \(0, 1\]"),
    ({"ratio": math.nan}, r"ratio=nan must be in \(0, 1\]"),
    ({"norm_scope": "running"}, "norm_scope='running' is not known; use one of step, sequence"),
    ({"select_scope": "micro_batch"}, "select_scope='micro_batch' is not known; use one of step, sequence"),
    ({"delta": "jsd"}, "delta='jsd' is not among the token statistics; use one of reverse_kl, forward_kl"),
    ({"rule": "q3_topk", "delta": "forward_kl"}, "delta='forward_kl' belongs to soft_or_topk, div_topk, bottom_topk, not to rule='q3_topk'"),
    ({"rule": "div_topk", "delta_clip_quantile": 0.9}, "delta_clip_quantile=0.9 belongs to soft_or_topk, bottom_topk, not to rule='div_topk'"),
    ({"delta_clip_quantile": 98}, r"delta_clip_quantile=98 must be in \(0, 1\], or None for none"),
    ({"entropy_clip_quantile": 0}, r"entropy_clip_quantile=0 must be in \(0, 1\], or None for none"),
    ({"min_keep": -1}, "min_keep=-1 must not be negative"),
    ({"importance_weights": True}, "importance_weights belongs to rule='entropy_sample' with min_keep=0"),
    ({"rule": "entropy_sample", "importance_weights": True, "min_keep": 1}, "not to rule='entropy_sample', min_keep=1"),
    ({"vocab_size": 1}, "vocab_size=1 must be at least 2"),
    ({"response_lengths": [3, 4]}, "response_lengths add up to 7 for 8 tokens"),
    ({"response_lengths": [9, -1]}, "response_lengths must not be negative, got -1"),
    ({"response_ids": [1]}, r"response_ids number \[1\] by rank, for \[2\] responses"),
    ({"response_ids": [4, 4]}, r"response_ids must be distinct over all ranks, got \[4, 4\]"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_arguments_no_selection_can_use_are_refused(change, message):
    arguments = {"response_lengths": [4, 4], "rule": "soft_or_topk", "ratio": 0.5, "vocab_size": 9}
    with pytest.raises(ValueError, match=message):
        select_tokens(as_statistics(random_step([8])), **arguments | change)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_an_error_with_its_place(bad):
    used = {"entropy_sample": [0], "entropy_topk": [0], "soft_or_topk": [0, 1], "q3_topk": [0, 2], "div_topk": [1], "bottom_topk": [0, 1]}
    for column, name in enumerate(("student_entropy_T", "reverse_kl_T", "forward_kl_T")):
        step = random_step([3, 5])
        step[column][1][2] = bad
        for rule, columns in used.items():
            if column not in columns:
                assert sum(one.sum() for one in kept(step, [3, 5], rule=rule, ratio=0.5)) == 3
                continue
            with pytest.raises(ValueError, match=rf"{name} of 1 of 8 tokens is not finite, first {bad} at token 2 of response 1"):
                kept(step, [3, 5], rule=rule, ratio=0.5)
