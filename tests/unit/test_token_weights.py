"""Position weights, the weight and divisor of every token of a step, and what is recorded of a selection.

Not covered here: which tokens are kept (tests/unit/test_token_importance.py), and how a step applies the weights.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_megatron.losses import kept_divergence, position_weights, quadrant_shares, select_tokens, token_weights
from tests.reference_importance import as_statistics, naive_loss, naive_position_weight, random_step, split_by

LENGTHS = [7, 1, 0, 30, 2, 12]
# The results are fp32.
EXACT = {"rel": 1e-6, "abs": 1e-7}


def loss(kept_T, position_T, divergence_T, lengths, **options):
    weight_T, divisor = token_weights(kept_T, position_T, lengths, **options)
    return (weight_T.double() * divergence_T.double()).sum().item() / divisor


def problem(lengths=LENGTHS, ratio=0.4, seed=0):
    """Selection, position weights and divergences of all tokens."""
    statistics = as_statistics(random_step(lengths, seed))
    return select_tokens(statistics, lengths, rule="soft_or_topk", ratio=ratio, vocab_size=1000), position_weights(lengths), statistics.reverse_kl_T


def test_the_schedule_of_the_paper():
    """A response of 1000 tokens has a token on either side of each tenth; the table has 3 decimals."""
    weights_T = position_weights([1000]).double()
    table = {0.1: 0.339, 0.2: 0.452, 0.3: 0.625, 0.4: 0.798, 0.5: 0.911, 0.7: 0.987}
    between = [(weights_T[round(1000 * place) - 1] + weights_T[round(1000 * place)]).item() / 2 for place in table]
    assert between == pytest.approx(list(table.values()), abs=6e-4)
    assert [weights_T[0].item(), weights_T[-1].item(), weights_T.mean().item()] == pytest.approx([0.286, 0.999, 0.771], abs=6e-4)
    assert (weights_T.diff() > 0).all()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 20), max_size=6), st.floats(0, 1), st.floats(-0.5, 1.5), st.floats(0.01, 2))
def test_every_response_is_weighted_by_its_own_length(lengths, minimum, center, slope):
    options = {"minimum": minimum, "center": center, "slope": slope}
    expected = [naive_position_weight(place, length, **options) for length in lengths for place in range(1, length + 1)]
    weights_T = position_weights(torch.tensor(lengths, dtype=torch.int64), **options)
    assert weights_T.dtype == torch.float32
    assert weights_T.tolist() == pytest.approx(expected, **EXACT)


def test_normalised_weights_average_one_in_every_response():
    plain, normalised = (split_by(position_weights(LENGTHS, normalize=normalize), LENGTHS) for normalize in (False, True))
    for one, other in zip(plain, normalised):
        assert other == pytest.approx(one / one.mean() if len(one) else one, **EXACT)
    assert not position_weights([3], minimum=0, center=1e6, normalize=True).any()


def test_without_a_slope_the_weights_are_a_step():
    assert position_weights([4], slope=0).tolist() == [0.25, 1, 1, 1]
    assert position_weights([10], slope=0, center=0.45).isfinite().all()
    assert position_weights([], slope=0).shape == position_weights([0, 0]).shape == (0,)


@settings(deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda lengths: max(lengths) > 2),
    seed=st.integers(0, 99),
    reduction=st.sampled_from(["token", "sequence"]),
    denominator=st.sampled_from(["kept", "weights", "all"]),
)
def test_weights_and_divisor_give_the_loss_by_its_definition(lengths, seed, reduction, denominator):
    kept_T, position_T, divergence_T = problem(lengths, 0.4, seed)
    expected = naive_loss(*(split_by(one.double(), lengths) for one in (kept_T, position_T, divergence_T)), reduction=reduction, denominator=denominator)
    assert loss(kept_T, position_T, divergence_T, lengths, reduction=reduction, denominator=denominator) == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_without_selection_it_is_position_weighting_and_without_weights_it_is_selection(reduction):
    """A kept token is weighted by its place in the full response, not among the kept."""
    kept_T, position_T, divergence_T = problem()
    ones_T = torch.ones_like(kept_T)
    parts = [divergence_T.double()[start : start + length] for start, length in zip(np.cumsum([0, *LENGTHS]), LENGTHS)]
    if reduction == "sequence":
        weighted = [(part * position_weights([len(part)])).mean() for part in parts if len(part)]
        assert loss(ones_T, position_T, divergence_T, LENGTHS, reduction=reduction) == pytest.approx(torch.stack(weighted).mean().item(), **EXACT)
        rows = [one[mask > 0].mean() for one, mask in zip(split_by(divergence_T.double(), LENGTHS), split_by(kept_T, LENGTHS)) if mask.any()]
        assert loss(kept_T, ones_T, divergence_T, LENGTHS, reduction=reduction) == pytest.approx(np.mean(rows), **EXACT)
    else:
        assert loss(ones_T, position_T, divergence_T, LENGTHS) == pytest.approx((position_T * divergence_T).mean().item(), **EXACT)
        assert loss(kept_T, ones_T, divergence_T, LENGTHS) == pytest.approx(divergence_T[kept_T > 0].mean().item(), **EXACT)
        weight_T, divisor = token_weights(kept_T, ones_T, LENGTHS)
        assert torch.equal(weight_T, kept_T)
        assert divisor == kept_T.sum()


def test_the_two_reductions_agree_for_equal_lengths_only():
    for lengths, agree in (([8, 8, 8], True), ([4, 8, 12], False)):
        kept_T, position_T, divergence_T = problem(lengths, 0.5)
        by_token, by_sequence = (loss(kept_T, position_T, divergence_T, lengths, reduction=one) for one in ("token", "sequence"))
        assert (by_token == pytest.approx(by_sequence, **EXACT)) == agree


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_only_the_kept_denominator_keeps_the_scale_when_half_is_dropped(reduction):
    """Every token twice, one of the two dropped: the mean over the kept is the old loss, over all tokens it is half of it."""
    lengths = [3, 5]
    divergence_T = torch.rand(8, generator=torch.Generator().manual_seed(0))
    ones_T, twice_T = torch.ones(8), divergence_T.repeat_interleave(2)
    half_T = torch.tensor([1.0, 0.0]).repeat(8)
    full = loss(ones_T, ones_T, divergence_T, lengths, reduction=reduction)
    for denominator, factor in (("kept", 1), ("weights", 1), ("all", 0.5)):
        halved = loss(half_T, torch.ones(16), twice_T, [6, 10], reduction=reduction, denominator=denominator)
        assert halved == pytest.approx(factor * full, **EXACT)


def test_nothing_kept_leaves_a_divisor_of_zero_and_finite_weights():
    for lengths in ([], [0], [3, 2]):
        nothing_T = torch.zeros(sum(lengths))
        for reduction in ("token", "sequence"):
            weight_T, divisor = token_weights(nothing_T, torch.ones_like(nothing_T), lengths, reduction=reduction)
            assert (divisor, weight_T.tolist()) == (0, [0] * sum(lengths))


def test_responses_with_nothing_kept_do_not_count_in_the_mean_of_responses():
    kept_T, position_T = torch.tensor([1.0, 0, 0, 0, 0]), torch.tensor([0.5, 1, 1, 1, 1])
    assert [tuple(token_weights(kept_T, position_T, [2, 3], reduction="sequence", denominator=one))[1] for one in ("kept", "weights", "all")] == [1, 1, 2]
    assert token_weights(kept_T, position_T, [2, 3], reduction="sequence", denominator="all").weight_T.tolist() == [0.25, 0, 0, 0, 0]


REFUSED = [
    (lambda: position_weights([3], minimum=1.1), r"minimum=1.1 must be in \[0, 1\]"),
    (lambda: position_weights([3], center=math.nan), "center=nan must be finite"),
    (lambda: position_weights([3], slope=-0.1), "slope=-0.1 must not be negative or infinite"),
    (lambda: position_weights([3, -1]), "response_lengths must not be negative, got -1"),
    (lambda: token_weights(torch.ones(3), torch.ones(3), [3], reduction="mean"), "reduction='mean' is not known; use one of token, sequence"),
    (lambda: token_weights(torch.ones(3), torch.ones(3), [3], denominator="sum"), "denominator='sum' is not known; use one of kept, weights, all"),
    (lambda: token_weights(torch.ones(3), torch.ones(3), [2]), "response_lengths add up to 2 for 3 tokens"),
    (lambda: token_weights(torch.ones(3), torch.ones(2), [3]), r"must have one shape, not \(3,\) and \(2,\)"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_arguments_without_a_meaning_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_quadrants_lie_above_and_below_the_medians():
    """Medians 2.5 and 25; the token at a threshold counts as low."""
    step = [[np.array(values, np.float32)] for values in ([4, 3, 2, 1], [40, 10, 30, 20], [0] * 4)]
    shares = quadrant_shares(as_statistics(step), torch.tensor([0, 1, 2.5, 0]))
    assert shares == ((0.25, 0.25, 0.25, 0.25), (0, 0.5, 0.5, 0), 2.5, 25)
    shares = quadrant_shares(as_statistics(step), torch.ones(4), entropy_threshold=3, divergence_threshold=10)
    assert shares == ((0.25, 0, 0.5, 0.25), (0.25, 0, 0.5, 0.25), 3, 10)
    assert quadrant_shares(as_statistics(random_step([])), torch.ones(0)) == ((0,) * 4, (0,) * 4, 0, 0)


def test_divergence_of_kept_and_of_dropped_tokens():
    divergence_T = torch.tensor([1.0, 2, 3, 6])
    assert kept_divergence(divergence_T, torch.tensor([0.0, 1, 2.5, 0])) == (2.5, 3.5)
    assert kept_divergence(divergence_T, torch.ones(4)) == (3, None)
    assert kept_divergence(divergence_T, torch.zeros(4)) == (None, 3)
