"""Token selection over 4 ranks that hold different responses, one of them none: the same tokens as on one rank that holds all, and errors on every rank.

Not covered here: the rules themselves (tests/unit/test_token_importance.py), and NCCL.
"""

import math

import pytest
import torch
import torch.distributed as dist

from opd_megatron.losses import SelectionRule, select_tokens, token_selection
from opd_megatron.losses.token_importance import RULES
from tests.reference_importance import as_statistics, random_step, split_by

LENGTHS = [7, 1, 0, 30, 2, 12, 3, 25]
# By rank, the responses it holds, in its order: dealt in turn or in blocks, unevenly, and to three ranks of four.
DEALS = {"turns": [[0, 4], [1, 5], [2, 6], [3, 7]], "blocks": [[0, 1, 2, 3, 4], [5], [6], [7]], "mixed": [[6, 1], [], [7, 0, 3, 2], [5, 4]]}
OPTIONS = [{"rule": rule} for rule in RULES] + [
    {"rule": "soft_or_topk", "select_scope": "step", "delta_clip_quantile": 0.9},
    {"rule": "soft_or_topk", "norm_scope": "sequence"},
    {"rule": "entropy_sample", "select_scope": "step"},
    {"rule": "entropy_sample", "importance_weights": True},
]


def part_of(step, responses):
    return as_statistics([[many[one] for one in responses] for many in step]), [LENGTHS[one] for one in responses]


def differing_tokens(deal):
    """Return for each rule and ratio how many of this rank's tokens differ from the selection by one rank, and whether any was kept and any dropped.

    Generators of different states: the first rank's decides. Levels make ties, over responses too.
    """
    results = []
    responses = DEALS[deal][dist.get_rank()]
    for options in OPTIONS:
        for ratio in (0.05, 0.5, 1.0):
            step = random_step(LENGTHS, levels=4 if ratio == 0.5 else None)
            shared = {"ratio": ratio, "vocab_size": 1000} | options
            whole_T = select_tokens(as_statistics(step), LENGTHS, generator=torch.Generator().manual_seed(0), **shared)
            expected = torch.cat([torch.zeros(0), *(torch.from_numpy(split_by(whole_T, LENGTHS)[one]) for one in responses)])
            statistics, lengths = part_of(step, responses)
            generator = torch.Generator().manual_seed(dist.get_rank())
            weights_T = select_tokens(statistics, lengths, dp_group=dist.group.WORLD, generator=generator, response_ids=responses, **shared)
            results.append((options, ratio, int((weights_T != expected).sum()), weights_T.shape == expected.shape, 0 < whole_T.count_nonzero() < len(whole_T)))
    return results


@pytest.mark.parametrize("deal", DEALS)
def test_the_selection_does_not_depend_on_which_rank_holds_a_response(pool, deal):
    for rank_results in pool.run(differing_tokens, deal):
        for options, ratio, num_differing, shapes_agree, some in rank_results:
            assert num_differing == 0, (options, ratio)
            assert shapes_agree
            assert some or ratio == 1 or options["rule"] == "all" or (ratio == 0.05 and options.get("select_scope") is None)


def ranges_by_rank():
    """Return the ranges and thresholds of this rank's selection and those of one rank with everything."""
    step, responses = random_step(LENGTHS), DEALS["mixed"][dist.get_rank()]
    rule = SelectionRule(rule="soft_or_topk", ratio=0.5)
    whole = token_selection(as_statistics(step), LENGTHS, rule, vocab_size=1000)
    own = token_selection(*part_of(step, responses), rule, vocab_size=1000, dp_group=dist.group.WORLD, response_ids=responses)
    return (own.entropy, own.divergence, own.threshold_B.tolist()), (whole.entropy, whole.divergence, whole.threshold_B[responses].tolist())


def test_every_rank_reports_the_ranges_of_the_whole_step(pool):
    for own, whole in pool.run(ranges_by_rank):
        assert own[:2] == whole[:2]
        assert own[2] == pytest.approx(whole[2], abs=0, nan_ok=True)


def unnamed_weights():
    """Without ids, responses count in the order of ranks."""
    responses = DEALS["blocks"][dist.get_rank()]
    step = random_step(LENGTHS)
    shared = {"rule": "entropy_sample", "ratio": 0.5, "vocab_size": 1000}
    whole_T = select_tokens(as_statistics(step), LENGTHS, generator=torch.Generator().manual_seed(0), **shared)
    statistics, lengths = part_of(step, responses)
    weights_T = select_tokens(statistics, lengths, dp_group=dist.group.WORLD, generator=torch.Generator().manual_seed(0), **shared)
    start = sum(LENGTHS[: responses[0]])
    return torch.equal(weights_T, whole_T[start : start + len(weights_T)])


def test_without_ids_responses_count_in_the_order_of_ranks(pool):
    assert pool.run(unnamed_weights) == [True] * 4


def empty_steps():
    """Return the shapes for a step in which no rank has a response, and one in which all responses are empty."""
    rules = [rule for rule in RULES if rule != "all"]
    return [
        tuple(select_tokens(as_statistics(random_step(lengths)), lengths, rule=rule, ratio=0.5, vocab_size=9, dp_group=dist.group.WORLD).shape)
        for rule in rules
        for lengths in ([], [0, 0])
    ]


def test_a_step_without_tokens_ends_on_every_rank(pool):
    assert all(set(shapes) == {(0,)} for shapes in pool.run(empty_steps))


def refusals():
    """Return what every rank says of what rank 2 alone got wrong."""
    messages = []
    for wrong in ("score", "lengths", "ids", "equal ids"):
        step, lengths, ids = random_step([4, 3], seed=dist.get_rank()), [4, 3], [2 * dist.get_rank(), 2 * dist.get_rank() + 1]
        if dist.get_rank() == 2:
            if wrong == "score":
                step[1][1][0] = math.nan
            lengths = [4, 2] if wrong == "lengths" else lengths
            ids = {"ids": ids[:1], "equal ids": [0, 1]}.get(wrong, ids)
        try:
            select_tokens(as_statistics(step), lengths, rule="soft_or_topk", ratio=0.5, vocab_size=9, dp_group=dist.group.WORLD, response_ids=ids)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_one_rank_got_wrong_every_rank_says(pool):
    for score, lengths, ids, equal in pool.run(refusals):
        assert "reverse_kl_T of 1 of 28 tokens is not finite, first nan at token 0 of response 5" in score
        assert "response_lengths on rank 2 of dp_group add up to 6 for 7 tokens" in lengths
        assert "response_ids number [2, 2, 1, 2] by rank, for [2, 2, 2, 2] responses" in ids
        assert "response_ids must be distinct over all ranks" in equal
