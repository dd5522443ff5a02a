"""SimCT's rows and ULD's distance with both vocabularies split over 2 and 4 ranks, against naive fp64 autograd on the whole of them.

Pairs of ids lie on different shards of the two models as they come; a rank may hold padding only, or no pair.
Options and edge cases that do not depend on the split are in tests/unit/test_simct.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from opd_megatron.align.rows import paired_shard
from opd_megatron.align.simct import Scoring, simct_divergence
from opd_megatron.align.uld import uld_divergence
from tests.distributed.test_losses_tp import count_collectives, split_group
from tests.reference_simct import OPTIONS, case_for, exact, naive_uld, one_token_each, random_case, relative_error, rows_of, vocabulary_of

# Student ids of 32 padded columns: a border within the last shard, the last shard of 4 all padding, all pairs on the first shard of 4.
SIZES = ({"student_vocab": 29}, {"student_vocab": 24, "teacher_vocab": 10, "num_pairs": 9}, {"student_vocab": 8, "num_pairs": 8})
NUM_COLUMNS = 32


def _on_this_rank(case, group, *, divergence=simct_divergence, eos=None, softcaps=(None, None), **options):
    """Return the rank's arguments, and its leaves of the student's hidden states and head."""
    (hidden, head, teacher_hidden, teacher_head), *_ = case
    width = NUM_COLUMNS // group.size()
    padded = torch.cat([head, head.new_full((NUM_COLUMNS - len(head), head.size(1)), 50.0)])
    shard = paired_shard(vocabulary_of(case, eos), rank=group.rank(), num_ranks=group.size(), student_columns=width)
    leaves = hidden.clone().requires_grad_(), padded[group.rank() * width :][:width].clone().requires_grad_()
    if divergence is simct_divergence:
        options = {"scoring": Scoring(**options)}
    shared = {"tp_group": group, "chunk_tokens": 5, "student_softcap": softcaps[0], "teacher_softcap": softcaps[1]}
    models = (*leaves, teacher_hidden, teacher_head[shard.teacher_ids_C])
    return lambda: divergence(*models, rows_of(case), shard, **shared, **options), leaves


def errors_of(case, group, naive, **options):
    run, (hidden, head) = _on_this_rank(case, group, **options)
    result = run()
    result.loss_sum.backward()
    dist.all_reduce(hidden.grad, group=group)
    width, size = NUM_COLUMNS // group.size(), len(case[0][1])
    expected = exact(case, **naive)
    own = expected[2][group.rank() * width :][:width]
    real = max(0, min(width, size - group.rank() * width))
    errors = [
        relative_error(result.divergence_T[rows_of(case).student_first_N].detach(), expected[0]),
        relative_error(hidden.grad, expected[1]),
        # Of a shard without real columns there is nothing to compare but zeros.
        float((head.grad[:real].double() - own).abs().max() / expected[2].abs().max()) if real else 0.0,
        float(head.grad[real:].abs().max()) if real < width else 0.0,
    ]
    return max(errors)


def simct_errors(tp_size):
    group = split_group(tp_size)
    found = []
    for options in OPTIONS:
        naive = {name: value for name, value in options.items() if name != "eos"}
        for seed, sizes in enumerate(SIZES):
            case = case_for(options, seed, num_units=7, dtype=torch.float32, **sizes)
            found.append((str(options), seed, errors_of(case, group, {"eos": options.get("eos"), **naive}, **options)))
    return found


def uld_errors(tp_size):
    group = split_group(tp_size)
    found = []
    for top_k in (0, 6):
        for seed, sizes in enumerate(SIZES):
            case = one_token_each(random_case(seed, num_units=7, dtype=torch.float32, **sizes))
            found.append((top_k, seed, errors_of(case, group, {"loss": naive_uld, "top_k": top_k}, divergence=uld_divergence, top_k=top_k)))
    return found


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("errors", [simct_errors, uld_errors])
def test_shards_of_both_vocabularies_give_the_whole_loss(pool, errors, tp_size) -> None:
    """Losses and gradients in fp32 to 1e-5; every rank joins every collective, one without a column, without a pair too."""
    for rank_results in pool.run(errors, tp_size, world_size=4):
        for *case, error in rank_results:
            assert error < 1e-5, case


def collectives(_):
    """Return the collectives of a forward over several chunks, per chunk, and of the backward."""
    group, counts = split_group(4), {}
    for name, options in {"plain": {}, "masked": {"mask_first_token": True}, "top": {"top_k": 3}, "uld": {"divergence": uld_divergence, "top_k": 6}}.items():
        case = random_case(0, num_units=12, student_vocab=29, dtype=torch.float32)
        case = one_token_each(case) if name == "uld" else case
        run, _ = _on_this_rank(case, group, **options)
        losses = []
        forward = count_collectives(lambda run=run, losses=losses: losses.append(run().loss_sum))
        num_chunks = -(-12 // 5) if name == "uld" else _num_chunks(case)
        counts[name] = (forward / num_chunks, count_collectives(losses[0].backward))
    return counts


def _num_chunks(case):
    """Whole units in chunks of at most five positions of either model."""
    chunks, student, teacher = 0, 5, 5
    for a, b, c, d in case[1]:
        if student + b - a > 5 or teacher + d - c > 5:
            chunks, student, teacher = chunks + 1, 0, 0
        student, teacher = student + b - a, teacher + d - c
    return chunks


def test_two_collectives_per_chunk_and_none_in_the_backward(pool) -> None:
    for counts in pool.run(collectives, 0, world_size=4):
        assert counts == {"plain": (2, 0), "masked": (2, 0), "top": (3, 0), "uld": (5, 0)}
