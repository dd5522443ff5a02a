"""Divergences and the fused LM head with the vocabulary split over 2 and 4 ranks, against naive fp64 autograd on the whole vocabulary.

Every rank builds the same whole problem from a seed, works on its slice, and compares with its slice of the reference gradient.
Not covered here: the options and edge cases that do not depend on the split (tests/unit/test_losses.py), and NCCL.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from opd_megatron.losses import fused_head_cross_entropy, fused_head_divergence, token_statistics, triton_divergence, vocab_parallel_divergence
from opd_megatron.losses.class_divergence import ALL_KINDS, SAMPLED_KINDS
from tests.reference_losses import TOLERANCE, head_problem, naive_clipped, naive_divergence, relative_error_or_zero, same_counts

NUM_TOKENS, NUM_COLUMNS = 21, 64
CASES = [
    {"kind": kind, **options}
    for kind in ("reverse_kl", "forward_kl", "jsd")
    for options in ({}, {"temperature": 1.7}, {"pointwise_clip": 0.02}, {"pointwise_clip": 0.05, "temperature": 0.7, "beta": 0.2})
]
# True vocabulary of 64 columns: a border inside the last shard of 2 and of 4; the last shard of 4 all padding; three of four.
VOCAB_SIZES = [55, 48, 13]


def split_group(tp_size):
    """Return this rank's group of `tp_size` consecutive ranks."""
    groups = [dist.new_group(list(range(first, first + tp_size))) for first in range(0, dist.get_world_size(), tp_size)]
    return groups[dist.get_rank() // tp_size]


def shard_slice(group):
    width = NUM_COLUMNS // group.size()
    return slice(group.rank() * width, (group.rank() + 1) * width)


def whole_problem(dtype=torch.float32):
    """Hidden states and heads of both models, which ask for no gradient yet, and token weights: the same on all ranks."""
    models, weight_T = head_problem(NUM_TOKENS, NUM_COLUMNS, dtype)
    return [tensor.detach() for tensor in models], weight_T


def logits_pair(dtype=torch.float32):
    (student_hidden, student_head, teacher_hidden, teacher_head), weight_T = whole_problem(torch.float64)
    return (student_hidden @ student_head.T).to(dtype), (teacher_hidden @ teacher_head.T).to(dtype), weight_T


def parity_errors(divergence, group, case, vocab_size, dtype=torch.float32):
    """Return the relative errors of a sharded divergence and of its gradient, and the projection of the latter on the true gradient.

    `divergence(student_logits_TW, teacher_logits_TW, group)` is what is judged: the library's, or a broken one in the negative controls.
    """
    student, teacher, weight_T = logits_pair(dtype)
    whole = student.double().requires_grad_()
    expected_T = naive_divergence(whole[:, :vocab_size], teacher[:, :vocab_size], **case)
    (expected,) = torch.autograd.grad((expected_T * weight_T).sum(), whole)
    columns = shard_slice(group)
    local = student[:, columns].clone().requires_grad_()
    value_T = divergence(local, teacher[:, columns].contiguous(), group)
    (gradient,) = torch.autograd.grad((value_T * weight_T).sum(), local)
    reference = expected[:, columns]
    projection = (gradient.double() * reference).sum() / reference.square().sum() if reference.any() else torch.tensor(1.0)
    return relative_error_or_zero(value_T.detach(), expected_T.detach()), relative_error_or_zero(gradient, reference), projection.item()


def library_errors(tp_size, dtype):
    group = split_group(tp_size)
    results = []
    for case in CASES:
        for vocab_size in VOCAB_SIZES:
            divergence = partial(library_divergence, vocab_size=vocab_size, **case)
            results.append((case, vocab_size, *parity_errors(divergence, group, case, vocab_size, dtype)))
    return results


def library_divergence(student_logits_TW, teacher_logits_TW, group, **options):
    return vocab_parallel_divergence(student_logits_TW, teacher_logits_TW, tp_group=group, **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_divergence_and_gradient_do_not_depend_on_the_split(pool, tp_size, dtype):
    for rank_results in pool.run(library_errors, tp_size, dtype, world_size=4):
        for *case, value_error, gradient_error, projection in rank_results:
            assert value_error < TOLERANCE[torch.float32], case
            assert gradient_error < TOLERANCE[dtype], case
            assert projection == pytest.approx(1, rel=TOLERANCE[dtype]), case


def uneven_errors(widths, vocab_size):
    rank = dist.get_rank()
    start, stop = sum(widths[:rank]), sum(widths[: rank + 1])
    student, teacher, weight_T = (tensor.repeat(8, *(1,) * (tensor.dim() - 1)) for tensor in logits_pair())  # more than one chunk of 128
    whole = student.double().requires_grad_()
    expected_T = naive_divergence(whole[:, :vocab_size], teacher[:, :vocab_size], kind="jsd")
    (expected,) = torch.autograd.grad((expected_T * weight_T).sum(), whole)
    local = student[:, start:stop].clone().requires_grad_()
    value_T = vocab_parallel_divergence(local, teacher[:, start:stop], kind="jsd", tp_group=split_group(4), vocab_size=vocab_size, shard_start=start)
    (gradient,) = torch.autograd.grad((value_T * weight_T).sum(), local)
    return relative_error_or_zero(value_T.detach(), expected_T.detach()), relative_error_or_zero(gradient, expected[:, start:stop])


@pytest.mark.parametrize("widths", [(30, 20, 10, 4), (1, 0, 60, 3)], ids=str)
def test_shards_of_uneven_width(pool, widths):
    for errors in pool.run(uneven_errors, widths, 62, world_size=4):
        assert max(errors) < TOLERANCE[torch.float32]


def fused_errors(tp_size, dtype, vocab_sizes=VOCAB_SIZES):
    """Return whether the fused head counts what is clipped, and the errors of its divergence, loss, hidden gradient summed over the group and head gradient."""
    group = split_group(tp_size)
    columns = shard_slice(group)
    results = []
    for case in CASES:
        for vocab_size in vocab_sizes:
            models, weight_T = whole_problem(dtype)
            exact = [tensor.double() for tensor in models]
            leaves = [tensor.requires_grad_() for tensor in exact[:2]]
            logits = (exact[0] @ exact[1][:vocab_size].T, exact[2] @ exact[3][:vocab_size].T)
            expected_T = naive_divergence(*logits, **case)
            expected_sum = (expected_T * weight_T).sum()
            expected_hidden, expected_head = torch.autograd.grad(expected_sum, leaves)
            hidden, head = models[0].requires_grad_(), models[1][columns].clone().requires_grad_()
            options = {"token_weight_T": weight_T, "vocab_size": vocab_size, "chunk_tokens": 8, **case}
            result = fused_head_divergence(hidden, head, models[2], models[3][columns], tp_group=group, **options)
            grad_hidden, grad_head = torch.autograd.grad(result.loss_sum, (hidden, head))
            dist.all_reduce(grad_hidden, group=group)
            pairs = [(result.divergence_T, expected_T), (result.loss_sum, expected_sum), (grad_hidden, expected_hidden), (grad_head, expected_head[columns])]
            counted = same_counts(result.clipped_T, naive_clipped(*logits, **case))
            results.append((case, vocab_size, counted, *(relative_error_or_zero(value.detach(), reference.detach()) for value, reference in pairs)))
    return results


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_fused_head_does_not_depend_on_the_split(pool, tp_size, dtype):
    for rank_results in pool.run(fused_errors, tp_size, dtype, world_size=4):
        for *case, counted, divergence_error, loss_error, hidden_error, head_error in rank_results:
            assert counted, case
            assert max(divergence_error, loss_error) < TOLERANCE[torch.float32], case
            assert max(hidden_error, head_error) < TOLERANCE[dtype], case


def kernel_errors(tp_size):
    """Return the errors of the fused head with the Triton kernels, run by the interpreter, in the place of the torch form; one rank has only padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_divergence, "usable_for", lambda _logits: True)
        return fused_errors(tp_size, torch.float32, [48])


def test_triton_kernels_do_not_depend_on_the_split(pool):
    pytest.importorskip("triton", reason="needs the test extra: triton")
    for rank_results in pool.run(kernel_errors, 4, world_size=4):
        for *case, counted, divergence_error, loss_error, hidden_error, head_error in rank_results:
            assert counted, case
            assert max(divergence_error, loss_error, hidden_error, head_error) < TOLERANCE[torch.float32], case


def per_token_values(tp_size):
    """Return every per-token output, computed on the slices, and the same in fp64 on the whole vocabulary."""
    group = split_group(tp_size)
    columns = shard_slice(group)
    models, _ = whole_problem()
    sliced = (models[0], models[1][columns], models[2], models[3][columns])
    ids_T = torch.arange(NUM_TOKENS) * 5 % 55  # all shards, and their borders
    shared = {"tp_group": group, "vocab_size": 55, "chunk_tokens": 8}
    fused = fused_head_divergence(*sliced, kind="reverse_kl", sampled_ids_T=ids_T, **shared)
    clipped = fused_head_divergence(*sliced, kind="reverse_kl", pointwise_clip=0.02, **shared)
    supervised = fused_head_cross_entropy(*sliced[:2], ids_T, **shared)
    statistics = token_statistics(*sliced, **shared)
    student, teacher = (hidden.double() @ head.double()[:55].T for hidden, head in (models[:2], models[2:]))
    logp_TV = F.log_softmax(student, -1)
    entropy_T, logp_T = -(logp_TV.exp() * logp_TV).sum(-1), logp_TV.gather(1, ids_T[:, None])[:, 0]
    reverse_T, forward_T = (naive_divergence(student, teacher, kind=kind) for kind in ("reverse_kl", "forward_kl"))
    return {
        "divergence": (fused.divergence_T, reverse_T),
        "entropy": (fused.student_entropy_T, entropy_T),
        "clipped": (clipped.clipped_T, naive_clipped(student, teacher, kind="reverse_kl", pointwise_clip=0.02)),
        "sampled logp": (fused.sampled_logp_T, logp_T),
        "cross entropy": (supervised.divergence_T, -logp_T),
        "statistics entropy": (statistics.student_entropy_T, entropy_T),
        "statistics reverse": (statistics.reverse_kl_T, reverse_T),
        "statistics forward": (statistics.forward_kl_T, forward_T),
    }


@pytest.mark.parametrize("tp_size", [2, 4])
def test_per_token_values_are_right_and_bit_identical_on_all_ranks(pool, tp_size):
    first, *others = pool.run(per_token_values, tp_size, world_size=4)
    for name, (value_T, expected_T) in first.items():
        assert relative_error_or_zero(value_T, expected_T) < TOLERANCE[torch.float32], name
        assert all(torch.equal(value_T, other[name][0]) for other in others), name


def cross_entropy_gradient_error(tp_size):
    group = split_group(tp_size)
    columns = shard_slice(group)
    models, weight_T = whole_problem()
    targets_T = torch.arange(NUM_TOKENS) * 5 % 48
    exact = [tensor.double().requires_grad_() for tensor in models[:2]]
    expected_T = F.cross_entropy(exact[0] @ exact[1][:48].T, targets_T, reduction="none")
    expected_hidden, expected_head = torch.autograd.grad((expected_T * weight_T).sum(), exact)
    hidden, head = models[0].requires_grad_(), models[1][columns].clone().requires_grad_()
    result = fused_head_cross_entropy(hidden, head, targets_T, tp_group=group, token_weight_T=weight_T, vocab_size=48)
    grad_hidden, grad_head = torch.autograd.grad(result.loss_sum, (hidden, head))
    dist.all_reduce(grad_hidden, group=group)
    return relative_error_or_zero(grad_hidden, expected_hidden), relative_error_or_zero(grad_head, expected_head[columns])


@pytest.mark.parametrize("tp_size", [2, 4])
def test_cross_entropy_gradient_does_not_depend_on_the_split(pool, tp_size):
    """Vocabulary of 48: on 4 ranks the last one holds only padding."""
    assert max(max(errors) for errors in pool.run(cross_entropy_gradient_error, tp_size, world_size=4)) < TOLERANCE[torch.float32]


def self_divergence(scale):
    group = split_group(4)
    student, _, _ = logits_pair()
    largest = 0.0
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        local = (scale * student[:, shard_slice(group)]).requires_grad_()
        value_T = vocab_parallel_divergence(local, local.detach(), kind=kind, beta=0.3, tp_group=group, vocab_size=55)
        (gradient,) = torch.autograd.grad(value_T.sum(), local)
        largest = max(largest, value_T.abs().max().item(), gradient.abs().max().item())
    return largest


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_model_does_not_diverge_from_itself(pool, scale):
    assert pool.run(self_divergence, scale, world_size=4) == [0.0] * 4


def masked_and_nan_rows(tp_size):
    """Return every kind's values and this rank's gradient, from the whole vocabulary and from slices, with rows of -inf in either model and one NaN."""
    group = split_group(tp_size)
    columns = shard_slice(group)
    student, teacher, _ = logits_pair()
    student[3], teacher[5], student[:, 10:20], teacher[:, 10:20] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    student[7, 2] = torch.nan
    results = {}
    for kind in ALL_KINDS:
        ids = {"sampled_ids_T": torch.full((NUM_TOKENS,), 30)} if kind in SAMPLED_KINDS else {}
        pair = []
        for cut, options in ((slice(None), {}), (columns, {"tp_group": group})):
            local = student[:, cut].clone().requires_grad_()
            value_T = vocab_parallel_divergence(local, teacher[:, cut], kind=kind, vocab_size=48, **ids, **options)
            (gradient,) = torch.autograd.grad(value_T.sum(), local)
            pair.append((value_T.detach(), gradient if options else gradient[:, columns]))
        results[kind] = pair
    return results


@pytest.mark.parametrize("tp_size", [2, 4])
def test_masked_rows_and_a_nan_are_what_they_are_on_one_rank(pool, tp_size):
    """With a rank that has only padding, at TP 4. A NaN stays in its row, on all ranks, and nobody waits for ever."""
    for rank_results in pool.run(masked_and_nan_rows, tp_size, world_size=4):
        for kind, ((expected_T, expected), (value_T, gradient)) in rank_results.items():
            assert torch.equal(value_T.isnan(), torch.arange(NUM_TOKENS) == 7), kind
            assert not (gradient.isnan().any(-1) & (torch.arange(NUM_TOKENS) != 7)).any(), kind
            assert torch.allclose(value_T, expected_T, rtol=1e-5, atol=1e-6, equal_nan=True), kind
            assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6, equal_nan=True), kind
            assert (value_T[[3, 5]] == 0).all(), kind
            assert (gradient[[3, 5]] == 0).all(), kind


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor", "broadcast", "all_to_all")


def count_collectives(work):
    """Return how many collectives `work` issues."""
    count = 0

    def counted(collective):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            return collective(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counted(getattr(dist, name)))
        work()
    return count


def collective_counts(repeats):
    """Return the collectives of each forward, per chunk, and those of all the backwards together, for `repeats` times as many tokens in as many chunks."""
    group = split_group(4)
    columns = shard_slice(group)
    models, _ = whole_problem()
    hidden, head = models[0].repeat(repeats, 1).requires_grad_(), models[1][columns].clone().requires_grad_()
    sliced = (hidden, head, models[2].repeat(repeats, 1), models[3][columns])
    logits = [tensor[:, columns].clone().requires_grad_() for tensor in logits_pair()[:2]]
    shared = {"tp_group": group, "vocab_size": 55}
    chunked = {"chunk_tokens": NUM_TOKENS // 3, **shared}
    losses = []
    ids_T, num_chunks = torch.arange(NUM_TOKENS).repeat(repeats), 3 * repeats

    def keep(loss):
        losses.append(loss)

    forwards = {"statistics": count_collectives(lambda: token_statistics(*sliced, **chunked)) / num_chunks}
    forwards["cross_entropy"] = count_collectives(lambda: keep(fused_head_cross_entropy(*sliced[:2], ids_T, **chunked).loss_sum)) / num_chunks
    for case in ({"kind": "reverse_kl"}, {"kind": "forward_kl"}, {"kind": "jsd"}, {"kind": "reverse_kl", "pointwise_clip": 0.1}):
        name = "_".join(map(str, case.values()))
        whole = count_collectives(lambda case=case: keep(vocab_parallel_divergence(*logits, **case, **shared).sum()))
        fused = count_collectives(lambda case=case: keep(fused_head_divergence(*sliced, **case, sampled_ids_T=ids_T, **chunked).loss_sum)) / num_chunks
        forwards[name] = (whole, fused)
    return forwards, count_collectives(lambda: [loss.backward() for loss in losses])


@pytest.mark.parametrize("repeats", [1, 5])
def test_two_collectives_per_chunk_and_none_in_the_backward(pool, repeats):
    expected = {"statistics": 2, "cross_entropy": 2, "reverse_kl": (2, 2), "forward_kl": (2, 2), "jsd": (2, 2), "reverse_kl_0.1": (2, 2)}
    for forwards, backwards in pool.run(collective_counts, repeats, world_size=4):
        assert forwards == expected
        assert backwards == 0


class _Sum(torch.autograd.Function):
    """All-reduce whose backward is, by choice, an all-reduce too (right for a value used in sharded arithmetic) or the identity (for a replicated one)."""

    @staticmethod
    def forward(ctx, value, group, reduce_backward):
        ctx.group, ctx.reduce_backward = group, reduce_backward
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        if ctx.reduce_backward:
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None, None


class _Max(torch.autograd.Function):
    """All-reduced maximum that passes its gradient on, as if it were part of the function."""

    @staticmethod
    def forward(ctx, value, group):
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
        return value

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def forward_kl_by_autograd(student_logits_TW, teacher_logits_TW, group, *, loss_reduces=False, normalizer_reduces=True, max_in_graph=False):
    """Forward KL through autograd. The defaults are right; each change is a bug that a released library had.

    `loss_reduces`: differentiable all-reduce on a replicated loss (NVIDIA-NeMo/Automodel#3776). `normalizer_reduces=False`: the softmax denominator
    enters sharded arithmetic without a backward reduction (modelscope/ms-swift#9947). `max_in_graph`: the shift is not detached (same pull request).
    """

    def log_softmax(logits_TW):
        max_T = _Max.apply(logits_TW.amax(-1), group)
        shifted_TW = logits_TW - (max_T if max_in_graph else max_T.detach())[:, None]
        return shifted_TW - _Sum.apply(shifted_TW.exp().sum(-1), group, normalizer_reduces).log()[:, None]

    with torch.no_grad():
        teacher_logp_TW = log_softmax(teacher_logits_TW)
    local_T = (teacher_logp_TW.exp() * (teacher_logp_TW - log_softmax(student_logits_TW))).sum(-1)
    return _Sum.apply(local_T, group, loss_reduces)


def control_errors(tp_size, bug):
    return parity_errors(partial(forward_kl_by_autograd, **bug), split_group(tp_size), {"kind": "forward_kl"}, None)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("bug", [{"loss_reduces": True}, {"normalizer_reduces": False}, {"max_in_graph": True}], ids=str)
def test_known_bugs_of_other_libraries_fail_the_parity_check(pool, tp_size, bug):
    """Each has the right loss, so only the gradient can give it away; without the bug the same code passes."""
    for value_error, gradient_error, projection in pool.run(control_errors, tp_size, {}, world_size=4):
        assert max(value_error, gradient_error, abs(projection - 1)) < TOLERANCE[torch.float32]
    results = pool.run(control_errors, tp_size, bug, world_size=4)
    assert max(value_error for value_error, _, _ in results) < TOLERANCE[torch.float32]
    assert max(gradient_error for _, gradient_error, _ in results) > 0.1
    if "loss_reduces" in bug:
        assert all(projection == pytest.approx(tp_size, rel=1e-5) for _, _, projection in results)


def refusal(tp_size):
    """Return the message for a vocabulary that is larger than all shards together."""
    student, teacher, _ = logits_pair()
    group = split_group(tp_size)
    try:
        vocab_parallel_divergence(student[:, shard_slice(group)], teacher[:, shard_slice(group)], kind="jsd", tp_group=group, vocab_size=65)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_vocabulary_larger_than_all_shards_is_refused_on_every_rank(pool):
    for message in pool.run(refusal, 4, world_size=4):
        assert "vocab_size=65 is larger than all shards together: 4 x 16 = 64" in message
