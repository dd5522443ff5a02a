"""The random rule: what it draws, how often, and that a draw belongs to a token, whatever the order of responses.

Frequencies are of 5,000 responses with the same tokens in one call. Bounds are five standard deviations, and every seed is fixed.
Not covered here: several ranks (tests/distributed/test_token_importance.py).
"""

import math

import numpy as np
import pytest
import torch

from opd_megatron.losses import TokenStatistics, select_tokens
from tests.reference_importance import as_statistics, random_step, split_by

NUM_RESPONSES = 5_000
ENTROPY = [0.1, 0.5, 1.0, 2.4]


def draws(entropy=ENTROPY, num_responses=NUM_RESPONSES, seed=0, **options):
    """The weights of one response's tokens in many draws: [responses, tokens]."""
    entropy_T = torch.tensor(entropy).repeat(num_responses)
    statistics = TokenStatistics(entropy_T, torch.zeros_like(entropy_T), torch.zeros_like(entropy_T))
    options = {"rule": "entropy_sample", "vocab_size": 1000, "generator": torch.Generator().manual_seed(seed)} | options
    return select_tokens(statistics, [len(entropy)] * num_responses, **options).view(num_responses, len(entropy)).double()


def bound(probability, num_draws=NUM_RESPONSES):
    return 5 * np.sqrt(probability * (1 - probability) / num_draws)


def test_one_token_is_drawn_with_probability_proportional_to_its_entropy():
    share = np.array(ENTROPY) / sum(ENTROPY)
    assert (np.abs(draws(ratio=0.25).mean(0).numpy() - share) < bound(share)).all()


def test_two_tokens_are_drawn_one_after_the_other_without_replacement():
    share = np.array(ENTROPY) / sum(ENTROPY)
    second = np.array([sum(share[first] * share[token] / (1 - share[first]) for first in range(4) if first != token) for token in range(4)])
    assert (np.abs(draws(ratio=0.5).mean(0).numpy() - (share + second)) < bound(share + second)).all()


def test_tokens_without_entropy_are_equally_likely():
    frequency = draws([0.0] * 4, ratio=0.25).mean(0).numpy()
    assert (np.abs(frequency - 0.25) < bound(0.25)).all()


def test_every_token_weighs_one_on_average_with_importance_weights():
    """π = min(1, c h) with Σ π = 2 of 4 tokens: the last is certain, c = 1/1.6. The floor of the ratio would be 1 of 4 at 0.49: not unbiased either."""
    for ratio, expected in ((0.5, [0.0625, 0.3125, 0.625, 1.0]), (0.49, [0.06, 0.3, 0.6, 1.0])):
        weights = draws(ratio=ratio, importance_weights=True).numpy()
        expected = np.array(expected)
        assert (np.abs((weights > 0).mean(0) - expected) <= bound(expected)).all()
        for column, probability in zip(weights.T, expected):
            # The result is fp32.
            assert column[column > 0] == pytest.approx(1 / probability, rel=1e-6)
    one_token = draws([0.3], ratio=0.5, importance_weights=True).numpy()
    assert sorted(set(one_token.ravel())) == [0.0, 2.0]
    assert abs((one_token > 0).mean() - 0.5) < bound(0.5)


def test_the_mean_gradient_of_weighted_draws_is_the_full_one():
    gradient = np.random.default_rng(0).normal(size=(4, 3))
    estimates = draws(ratio=0.5, importance_weights=True).numpy() @ gradient / 4
    spread = estimates.std(0) / math.sqrt(NUM_RESPONSES)
    assert (np.abs(estimates.mean(0) - gradient.mean(0)) < 5 * spread).all()
    unweighted = draws(ratio=0.5).numpy() @ gradient / 2
    assert (np.abs(unweighted.mean(0) - gradient.mean(0)) > 5 * spread).any()


def test_a_seed_repeats_a_draw_and_a_generator_moves_on():
    first, again, other = (draws(num_responses=50, ratio=0.5, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(3)
    steps = [draws(num_responses=50, ratio=0.5, generator=generator) for _ in range(2)]
    assert torch.equal(steps[0], first)
    assert not torch.equal(*steps)


def test_without_a_generator_torch_draws():
    torch.manual_seed(5)
    first = draws(num_responses=50, ratio=0.5, generator=None)
    torch.manual_seed(5)
    assert torch.equal(draws(num_responses=50, ratio=0.5, generator=None), first)


@pytest.mark.parametrize("options", [{}, {"importance_weights": True}, {"select_scope": "step"}], ids=str)
def test_a_draw_belongs_to_a_token_whatever_the_order_of_responses(options):
    lengths = [7, 1, 0, 30, 2]
    step, order, shared = random_step(lengths), [3, 0, 4, 2, 1], {"rule": "entropy_sample", "ratio": 0.5, "vocab_size": 1000} | options
    whole = split_by(select_tokens(as_statistics(step), lengths, generator=torch.Generator().manual_seed(1), **shared), lengths)
    shuffled = [lengths[one] for one in order]
    statistics = as_statistics([[many[one] for one in order] for many in step])
    result = select_tokens(statistics, shuffled, generator=torch.Generator().manual_seed(1), response_ids=order, **shared)
    assert all(np.array_equal(part, whole[one]) for part, one in zip(split_by(result, shuffled), order))
    unnamed = select_tokens(statistics, shuffled, generator=torch.Generator().manual_seed(1), **shared)
    assert not torch.equal(unnamed, result)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_the_whole_step_is_drawn_at_once_on_request(ratio):
    weights = draws(num_responses=100, ratio=ratio, select_scope="step")
    assert weights.sum() == math.floor(ratio * 400)
    assert len(set(weights.sum(1).tolist())) > 1
