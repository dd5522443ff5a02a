"""Skewed, top-k and sampled-token divergences with the vocabulary split over 2 and 4 ranks, against naive fp64 autograd on the whole vocabulary.

Not covered here: the options and edge cases that do not depend on the split (tests/unit/test_losses_kinds.py), and NCCL.
"""

import itertools

import pytest
import torch
import torch.distributed as dist

from opd_megatron.losses import fused_head_divergence, vocab_parallel_divergence
from tests.distributed.test_losses_tp import NUM_COLUMNS, NUM_TOKENS, VOCAB_SIZES, count_collectives, logits_pair, shard_slice, split_group, whole_problem
from tests.reference_losses import (
    SAMPLED_KINDS,
    SKEW_KINDS,
    TOLERANCE,
    TOP_K_KINDS,
    naive_clipped,
    naive_divergence,
    relative_error_or_zero,
    same_counts,
    with_ids,
)
from tests.unit.test_losses_kinds import CASES


def unfused_errors(tp_size, dtype):
    """Return the relative errors of each case's value and gradient. 40 picked ids are more than a shard of 32 or 16 holds."""
    group = split_group(tp_size)
    columns = shard_slice(group)
    results = []
    for case in CASES:
        for vocab_size in VOCAB_SIZES:
            student, teacher, weight_T = logits_pair(dtype)
            options = with_ids(case, NUM_TOKENS, vocab_size)
            whole = student.double().requires_grad_()
            expected_T = naive_divergence(whole[:, :vocab_size], teacher[:, :vocab_size], **options)
            (expected,) = torch.autograd.grad((expected_T * weight_T).sum(), whole)
            local = student[:, columns].clone().requires_grad_()
            value_T = vocab_parallel_divergence(local, teacher[:, columns], tp_group=group, vocab_size=vocab_size, **options)
            (gradient,) = torch.autograd.grad((value_T * weight_T).sum(), local)
            # Relative to the whole gradient: a rank may hold no picked id, and then only rounding remains on it.
            error = (gradient.double() - expected[:, columns]).norm() / expected.norm().clamp_min(1e-30)
            results.append((case, vocab_size, relative_error_or_zero(value_T.detach(), expected_T.detach()), error.item()))
    return results


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_divergence_and_gradient_do_not_depend_on_the_split(pool, tp_size, dtype):
    for rank_results in pool.run(unfused_errors, tp_size, dtype, world_size=4):
        for *case, value_error, gradient_error in rank_results:
            assert value_error < TOLERANCE[torch.float32], case
            assert gradient_error < TOLERANCE[dtype], case


def fused_errors(tp_size, dtype):
    group = split_group(tp_size)
    columns = shard_slice(group)
    results = []
    for case in CASES:
        models, weight_T = whole_problem(dtype)
        options = with_ids(case, NUM_TOKENS, 48)
        leaves = [tensor.double().requires_grad_() for tensor in models[:2]]
        logits = (leaves[0] @ leaves[1][:48].T, models[2].double() @ models[3][:48].double().T)
        expected_T = naive_divergence(*logits, **options)
        expected_hidden, expected_head = torch.autograd.grad((expected_T * weight_T).sum(), leaves)
        hidden, head = models[0].requires_grad_(), models[1][columns].clone().requires_grad_()
        shared = {"tp_group": group, "token_weight_T": weight_T, "vocab_size": 48, "chunk_tokens": 8}
        result = fused_head_divergence(hidden, head, models[2], models[3][columns], **shared, **options)
        grad_hidden, grad_head = torch.autograd.grad(result.loss_sum, (hidden, head))
        dist.all_reduce(grad_hidden, group=group)
        head_error = (grad_head.double() - expected_head[columns]).norm() / expected_head.norm().clamp_min(1e-30)
        errors = [relative_error_or_zero(*pair) for pair in ((result.divergence_T, expected_T.detach()), (grad_hidden, expected_hidden))]
        results.append((case, same_counts(result.clipped_T, naive_clipped(*logits, **case)), *errors, head_error.item()))
    return results


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_fused_head_does_not_depend_on_the_split(pool, tp_size, dtype):
    """Vocabulary of 48: on 4 ranks the last one holds only padding."""
    for rank_results in pool.run(fused_errors, tp_size, dtype, world_size=4):
        for case, counted, value_error, hidden_error, head_error in rank_results:
            assert counted, case
            assert value_error < TOLERANCE[torch.float32], case
            assert max(hidden_error, head_error) < TOLERANCE[dtype], case


def tied_gradients(tp_size):
    """Return this rank's columns and the gradient of a top-3 loss whose teacher has six equal logits, on both sides of every border."""
    group = split_group(tp_size)
    columns = shard_slice(group)
    teacher = torch.zeros(2, NUM_COLUMNS)
    teacher[0, [14, 15, 16, 31, 32, 33]] = 2.0
    teacher[1, [60, 3, 47]] = torch.tensor([1.0, 1.0, 5.0])
    student = torch.randn(2, NUM_COLUMNS, generator=torch.Generator().manual_seed(0))[:, columns].requires_grad_()
    value_T = vocab_parallel_divergence(student, teacher[:, columns], kind="topk_renorm_forward", top_k=3, tp_group=group)
    (gradient,) = torch.autograd.grad(value_T.sum(), student)
    return [(row, columns.start + column) for row, column in gradient.nonzero().tolist()]


@pytest.mark.parametrize("tp_size", [2, 4])
def test_equal_logits_are_picked_by_the_lower_id_across_ranks(pool, tp_size):
    picked = sorted(pair for rank_pairs in pool.run(tied_gradients, tp_size, world_size=tp_size) for pair in rank_pairs)
    assert picked == [(0, 14), (0, 15), (0, 16), (1, 3), (1, 47), (1, 60)]


def self_divergence(scale):
    group = split_group(4)
    student, _, _ = logits_pair()
    largest = {}
    for kind in (*SKEW_KINDS, *TOP_K_KINDS, *SAMPLED_KINDS):
        local = (scale * student[:, shard_slice(group)]).requires_grad_()
        value_T = vocab_parallel_divergence(local, local.detach(), tp_group=group, vocab_size=55, **with_ids({"kind": kind}, NUM_TOKENS, 55))
        (gradient,) = torch.autograd.grad(value_T.sum(), local)
        largest[kind] = (value_T.abs().max().item(), 0.0 if kind == "k1" else gradient.abs().max().item())
    return largest


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_model_does_not_diverge_from_itself(pool, scale):
    """The gradient of k1 is that of log p, which does not vanish."""
    for largest in pool.run(self_divergence, scale, world_size=4):
        assert set(largest.values()) == {(0.0, 0.0)}


def collective_counts():
    """Return the collectives of each kind's forward, unfused and fused per chunk, with a clip and without, and those of all backwards together."""
    group = split_group(4)
    columns = shard_slice(group)
    models, _ = whole_problem()
    hidden, head = models[0].requires_grad_(), models[1][columns].clone().requires_grad_()
    logits = [tensor[:, columns].clone().requires_grad_() for tensor in logits_pair()[:2]]
    losses, forwards = [], {}
    for kind, clip in [*itertools.product((*SKEW_KINDS, *TOP_K_KINDS), (None, 0.1)), *((kind, None) for kind in SAMPLED_KINDS)]:
        options = with_ids({"kind": kind, "pointwise_clip": clip, "tp_group": group, "vocab_size": 55}, NUM_TOKENS, 55)

        def unfused(options=options):
            losses.append(vocab_parallel_divergence(*logits, **options).sum())

        def fused(options=options):
            losses.append(fused_head_divergence(hidden, head, models[2], models[3][columns], chunk_tokens=NUM_TOKENS // 3, **options).loss_sum)

        forwards[kind, clip] = (count_collectives(unfused), count_collectives(fused) / 3)
    return forwards, count_collectives(lambda: [loss.backward() for loss in losses])


def test_two_collectives_per_chunk_one_for_sampled_tokens_and_none_in_the_backward(pool):
    expected = {(kind, clip): (2, 2) for kind in (*SKEW_KINDS, *TOP_K_KINDS) for clip in (None, 0.1)} | {(kind, None): (1, 1) for kind in SAMPLED_KINDS}
    for forwards, backwards in pool.run(collective_counts, world_size=4):
        assert forwards == expected
        assert backwards == 0
