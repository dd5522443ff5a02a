"""Divergences and the fused LM head in one process, against naive fp64 autograd.

Not covered here: several ranks (tests/distributed/test_losses_tp.py) and CUDA.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from opd_megatron.losses import fused_head_cross_entropy, fused_head_divergence, token_statistics, vocab_parallel_divergence
from tests.reference_losses import TOLERANCE, head_problem, logits_pair, naive_clipped, naive_divergence, relative_error, same_counts

KINDS = ["reverse_kl", "forward_kl", "jsd"]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "clip": {"pointwise_clip": 0.05},
    "clip_and_temperature": {"pointwise_clip": 0.02, "temperature": 0.6},
    "beta": {"beta": 0.1},
}


def naive_logits(models, vocab_size):
    """Full fp64 logits of student and teacher, without gradient."""
    student_hidden, student_head, teacher_hidden, teacher_head = (tensor.detach().double() for tensor in models)
    return student_hidden @ student_head[:vocab_size].T, teacher_hidden @ teacher_head[:vocab_size].T


def naive_head(models, weight_T, *, vocab_size, **options):
    """Per-token divergence, student logits, and the gradients of the weighted sum, through full fp64 logits."""
    student_hidden, student_head, teacher_hidden, teacher_head = (tensor.detach().double() for tensor in models)
    leaves = student_hidden.requires_grad_(), student_head.requires_grad_()
    logits_TV = student_hidden @ student_head[:vocab_size].T
    divergence_T = naive_divergence(logits_TV, teacher_hidden @ teacher_head[:vocab_size].T, **options)
    return divergence_T.detach(), logits_TV.detach(), torch.autograd.grad((divergence_T * weight_T).sum(), leaves)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_and_its_gradient_match_the_definition(kind, options):
    student, teacher = logits_pair()
    upstream_T = torch.rand(len(student))
    value_T = vocab_parallel_divergence(student, teacher, kind=kind, **options)
    (gradient,) = torch.autograd.grad(value_T, student, upstream_T)
    expected_T = naive_divergence(student, teacher, kind=kind, **options)
    (expected,) = torch.autograd.grad(expected_T, student, upstream_T.double())
    assert value_T.dtype == torch.float32
    assert relative_error(value_T, expected_T) < TOLERANCE[torch.float32]
    assert relative_error(gradient, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_logits_give_a_bf16_gradient_of_fp32_arithmetic(kind):
    student, teacher = logits_pair(dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(vocab_parallel_divergence(student, teacher, kind=kind).sum(), student)
    (expected,) = torch.autograd.grad(naive_divergence(student, teacher, kind=kind).sum(), student)
    assert gradient.dtype == torch.bfloat16
    assert relative_error(gradient, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("options", [{}, {"pointwise_clip": 0.05}], ids=["plain", "clip"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_matches_finite_differences(kind, options):
    student, teacher = logits_pair(4, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda logits: vocab_parallel_divergence(logits, teacher, kind=kind, beta=0.3, vocab_size=6, **options), student)


@pytest.mark.parametrize(("kind", "expected"), [("reverse_kl", 0.5108256), ("forward_kl", 0.3680642), ("jsd", 0.1017492)])
def test_values_worked_out_by_hand(kind, expected):
    """p = (0.5, 0.5), q = (0.9, 0.1): which way the KL points is visible in the number. 1e-6: the digits given."""
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert vocab_parallel_divergence(student, teacher, kind=kind).item() == pytest.approx(expected, abs=1e-6)


def test_jsd_ends_are_forward_and_reverse_kl_and_roles_swap_with_beta():
    student, teacher = logits_pair()
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        assert torch.equal(vocab_parallel_divergence(student, teacher, kind="jsd", beta=beta), vocab_parallel_divergence(student, teacher, kind=kind))
    one_way = vocab_parallel_divergence(student, teacher, kind="jsd", beta=0.2)
    assert relative_error(vocab_parallel_divergence(teacher, student, kind="jsd", beta=0.8), one_way) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_does_not_diverge_from_itself(kind, scale):
    student, _ = logits_pair()
    student = (scale * student.detach()).requires_grad_()
    value_T = vocab_parallel_divergence(student, student.detach(), kind=kind, beta=0.3)
    (gradient,) = torch.autograd.grad(value_T.sum(), student)
    assert value_T.abs().max() == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_any_size_and_offset(kind):
    student, teacher = logits_pair()
    value_T = vocab_parallel_divergence(student, teacher, kind=kind)
    # Integers are added exactly up to the 24 bits of fp32: 1024 costs 10 of them, 1e-4 of a logit.
    assert relative_error(vocab_parallel_divergence(student + 1024, teacher - 512, kind=kind), value_T) < 1e-3
    large = (1e4 * student.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(vocab_parallel_divergence(large, teacher, kind=kind).sum(), large)
    assert gradient.isfinite().all()


def test_a_clipped_divergence_may_be_negative():
    student, teacher = logits_pair()
    assert vocab_parallel_divergence(student, teacher, kind="reverse_kl", pointwise_clip=0.01).min() < 0


@pytest.mark.parametrize("options", [{}, {"pointwise_clip": 0.05}], ids=["plain", "clip"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_logits_are_as_if_absent(kind, options):
    """-inf in both models removes an entry; a row masked entirely in either model has loss 0 and gradient 0."""
    student, teacher = logits_pair()
    masked_student, masked_teacher = student.detach().clone(), teacher.clone()
    masked_student[:, 5:9] = masked_teacher[:, 5:9] = -math.inf
    masked_student[3], masked_teacher[4] = -math.inf, -math.inf
    value_T = vocab_parallel_divergence(masked_student.requires_grad_(), masked_teacher, kind=kind, **options)
    (gradient,) = torch.autograd.grad(value_T.sum(), masked_student)
    kept = [column for column in range(student.size(1)) if not 5 <= column < 9]
    expected_T = naive_divergence(student[:, kept], teacher[:, kept], kind=kind, **options)
    expected_T = expected_T * torch.ones_like(expected_T).index_fill_(0, torch.tensor([3, 4]), 0)
    (expected,) = torch.autograd.grad(expected_T.sum(), student)
    assert relative_error(value_T, expected_T) < TOLERANCE[torch.float32]
    assert relative_error(gradient, expected) < TOLERANCE[torch.float32]
    assert gradient[3:5].abs().max() == 0


def test_forward_kl_is_infinite_where_the_student_excludes_what_the_teacher_allows():
    student, teacher = logits_pair()
    masked = student.detach().clone()
    masked[0, 0] = -math.inf
    assert vocab_parallel_divergence(masked, teacher, kind="forward_kl")[0] == math.inf
    assert vocab_parallel_divergence(masked, teacher, kind="reverse_kl").isfinite().all()


def test_autocast_around_the_fused_head_changes_nothing():
    models, _ = head_problem()
    expected = torch.autograd.grad(fused_head_divergence(*models, kind="jsd").loss_sum, models[:2])
    with torch.autocast("cpu", torch.bfloat16):
        result = fused_head_divergence(*models, kind="jsd")
        entropy_T = token_statistics(*models).student_entropy_T
    assert torch.equal(entropy_T, token_statistics(*models).student_entropy_T)
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(result.loss_sum, models[:2]), expected))


def test_a_teacher_made_in_inference_mode_is_taken():
    student, teacher = logits_pair()
    with torch.inference_mode():
        frozen = teacher + 0
    for kind in KINDS:
        value_T = vocab_parallel_divergence(student, frozen, kind=kind)
        assert torch.equal(*(torch.autograd.grad(value.sum(), student)[0] for value in (value_T, vocab_parallel_divergence(student, teacher, kind=kind))))


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    """The head is the embedding too: its rows give the hidden states. 1e-5 against fp64 autograd."""
    ids_T = torch.arange(29) % 50
    gradients = []
    for dtype in (torch.float32, torch.float64):
        (_, _, teacher_hidden, teacher_head), _ = head_problem(num_columns=50, dtype=dtype)
        weight = torch.randn(50, 16, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        if dtype == torch.float32:
            loss = fused_head_divergence(weight[ids_T].tanh(), weight, teacher_hidden, teacher_head, kind="reverse_kl").loss_sum
        else:
            loss = naive_divergence(weight[ids_T].tanh() @ weight.T, teacher_hidden @ teacher_head.T, kind="reverse_kl").sum()
        gradients.append(torch.autograd.grad(loss, weight)[0])
    assert relative_error(*gradients) < TOLERANCE[torch.float32]


MASKED_CASES = [*({"kind": kind} for kind in (*KINDS, "topk_tail_forward", "k1")), {"kind": "reverse_kl", "pointwise_clip": 0.1}]


@pytest.mark.parametrize("case", MASKED_CASES, ids=str)
def test_rows_masked_in_one_model_still_tell_the_students_own_numbers(case):
    """A head of -inf masks every row. Without the student there is no entropy and every id has log-probability -inf; without the teacher both are as ever."""
    ones, masked = torch.ones(3, 1), torch.full((8, 1), -math.inf)
    head, ids_T = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    result = fused_head_divergence(ones, masked, ones, head, sampled_ids_T=ids_T, **case)
    assert result.student_entropy_T.tolist() == token_statistics(ones, masked, ones, head).student_entropy_T.tolist() == [0.0] * 3
    assert result.sampled_logp_T.tolist() == [-math.inf] * 3
    assert result.divergence_T.tolist() == [0.0] * 3
    assert result.clipped_T is None or result.clipped_T.tolist() == [0.0] * 3
    result = fused_head_divergence(ones, head, ones, masked, sampled_ids_T=ids_T, **case)
    logp_V = head[:, 0].log_softmax(0)
    assert relative_error(result.student_entropy_T, -(logp_V.exp() * logp_V).sum().expand(3)) < TOLERANCE[torch.float32]
    assert relative_error(result.sampled_logp_T, logp_V[ids_T]) < TOLERANCE[torch.float32]
    assert result.divergence_T.tolist() == [0.0] * 3
    assert result.clipped_T is None or result.clipped_T.tolist() == [0.0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(kind):
    models, _ = head_problem()
    with torch.no_grad():
        models[0][7] = math.nan
    result = fused_head_divergence(*models, kind=kind, chunk_tokens=10)
    (gradient,) = torch.autograd.grad(result.loss_sum, models[0])
    only_row_7 = torch.arange(29) == 7
    assert torch.equal(result.divergence_T.isnan(), only_row_7)
    assert torch.equal(result.student_entropy_T.isnan(), only_row_7)
    assert torch.equal(gradient.isnan().all(-1), only_row_7)
    assert torch.equal(gradient.isnan().any(-1), only_row_7)


def test_a_second_derivative_is_refused():
    student, teacher = logits_pair()
    value_T = vocab_parallel_divergence(student, teacher, kind="reverse_kl")
    (gradient,) = torch.autograd.grad(value_T.square().sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_masking_the_value_in_place_does_not_corrupt_the_backward():
    student, teacher = logits_pair()
    mask_T = torch.arange(23) % 2
    gradients = []
    for masked in (lambda value_T: value_T * mask_T, lambda value_T: value_T.mul_(mask_T)):
        value_T = masked(vocab_parallel_divergence(student, teacher, kind="reverse_kl"))
        gradients += torch.autograd.grad(value_T.sum(), student)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_head_matches_full_fp64_logits(kind, options, dtype):
    """Loss, both gradients, clipped entries, weights with zeros, 9 padded columns, chunks that do not divide the tokens."""
    models, weight_T = head_problem(dtype=dtype)
    expected_T, _, expected_gradients = naive_head(models, weight_T, vocab_size=55, kind=kind, **options)
    result = fused_head_divergence(*models, kind=kind, token_weight_T=weight_T, vocab_size=55, chunk_tokens=8, **options)
    gradients = torch.autograd.grad(result.loss_sum, models[:2])
    assert relative_error(result.divergence_T, expected_T) < TOLERANCE[torch.float32]  # exact products of bf16 values, fp32 from there on
    assert relative_error(result.loss_sum, (expected_T * weight_T).sum()) < TOLERANCE[torch.float32]
    assert result.weight_sum == weight_T.sum()
    assert same_counts(result.clipped_T, naive_clipped(*naive_logits(models, 55), kind=kind, **options))
    for gradient, expected in zip(gradients, expected_gradients):
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected) < TOLERANCE[dtype]
        # The projection on the true gradient: a scale error of the kind tp_size x shows here and nowhere else.
        assert (gradient.double() * expected).sum() / expected.square().sum() == pytest.approx(1, rel=TOLERANCE[dtype])
    assert gradients[0][weight_T == 0].abs().max() == 0
    assert gradients[1][55:].abs().max() == 0


def test_logits_rounded_to_bf16_would_fail_the_gradient_bound():
    """Negative control (linkedin/Liger-Kernel#1432): a close student, whose gradient is a small difference of rounded logits."""
    models, weight_T = head_problem(num_columns=512, dtype=torch.bfloat16)
    close = models[0].detach().repeat(1, 4).requires_grad_(), (4 * models[1].detach()).repeat(1, 4).requires_grad_()
    nudge = 0.01 * torch.randn(close[0].shape, generator=torch.Generator().manual_seed(1))
    models = (*close, (close[0].detach() + nudge).bfloat16(), close[1].detach())
    _, _, (expected, _) = naive_head(models, weight_T, vocab_size=512, kind="forward_kl")
    fused = fused_head_divergence(*models, kind="forward_kl", token_weight_T=weight_T)
    (gradient,) = torch.autograd.grad(fused.loss_sum, models[0])
    rounded_T = vocab_parallel_divergence(models[0] @ models[1].T, models[2] @ models[3].T, kind="forward_kl")
    (rounded,) = torch.autograd.grad((rounded_T * weight_T).sum(), models[0])
    assert relative_error(gradient, expected) < TOLERANCE[torch.bfloat16]
    assert relative_error(rounded, expected) > TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_unfused_for_any_chunk_size(kind):
    """1e-6: the same sums, in the order that each matrix size brings."""
    models, weight_T = head_problem()
    value_T = vocab_parallel_divergence(models[0] @ models[1].T, models[2] @ models[3].T, kind=kind)
    expected = torch.autograd.grad((value_T * weight_T).sum(), models[:2])
    for chunk_tokens in (1, 7, 29, 1000, None):
        result = fused_head_divergence(*models, kind=kind, token_weight_T=weight_T, chunk_tokens=chunk_tokens)
        assert relative_error(result.divergence_T, value_T) < 1e-6
        for gradient, unfused in zip(torch.autograd.grad(result.loss_sum, models[:2]), expected):
            assert relative_error(gradient, unfused) < 1e-6


@pytest.mark.parametrize("kind", [*KINDS, "skew_forward", "skew_reverse", "topk_tail_forward", "topk_renorm_reverse"])
def test_clipped_entries_do_not_depend_on_the_chunks_and_nothing_else_on_the_count(kind):
    """All rows are counted, with weight or without, and none of no tokens; with a clip that nothing reaches, all is 0."""
    models, weight_T = head_problem()
    expected_T = naive_clipped(*naive_logits(models, 50), kind=kind, pointwise_clip=0.03)
    assert expected_T.max() > expected_T.min()
    for chunk_tokens in (1, 7, 29, None):
        options = {"kind": kind, "token_weight_T": weight_T, "vocab_size": 50, "chunk_tokens": chunk_tokens}
        result = fused_head_divergence(*models, pointwise_clip=0.03, **options)
        assert same_counts(result.clipped_T, expected_T), chunk_tokens
        assert not result.clipped_T.requires_grad
        assert fused_head_divergence(*models, pointwise_clip=100.0, **options).clipped_T.tolist() == [0] * 29
        assert fused_head_divergence(*models, **options).clipped_T is None
    none = fused_head_divergence(models[0][:0], models[1], models[2][:0], models[3], kind=kind, pointwise_clip=0.03)
    assert none.clipped_T.shape == (0,)


def test_an_infinite_summand_counts_as_clipped():
    """The student excludes an id that the teacher allows; the other summands of the forward KL are below 1."""
    models = [torch.ones(3, 1), torch.randn(8, 1, generator=torch.Generator().manual_seed(0)), torch.ones(3, 1), torch.zeros(8, 1)]
    models[1][2] = -math.inf
    result = fused_head_divergence(*models, kind="forward_kl", pointwise_clip=1.0)
    assert result.clipped_T.tolist() == [1.0] * 3
    assert result.divergence_T.isfinite().all()


def test_a_small_head_tile_changes_nothing(monkeypatch):
    models, _ = head_problem(dtype=torch.bfloat16)
    whole = torch.autograd.grad(fused_head_divergence(*models, kind="reverse_kl").loss_sum, models[:2])
    monkeypatch.setattr("opd_megatron.losses.head_products.HEAD_TILE_BYTES", 640)
    tiled = torch.autograd.grad(fused_head_divergence(*models, kind="reverse_kl").loss_sum, models[:2])
    for one, other in zip(whole, tiled):
        assert relative_error(one, other) < TOLERANCE[torch.bfloat16]


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, and counts matrix products."""

    def __init__(self):
        super().__init__()
        self.num_elements, self.num_products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        self.num_products += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_grows_with_tokens_times_vocabulary(kind):
    """With T = 640, W = 96 and chunks of 16, the largest tensors are the [T, H] inputs: nothing is near T x W, computed or saved."""
    models, weight_T = head_problem(num_tokens=640, num_columns=96)
    saved = []
    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
        fused_head_divergence(*models, kind=kind, token_weight_T=weight_T, chunk_tokens=16).loss_sum.backward()
    assert largest.num_elements == 640 * 24
    assert max(saved) == 640 * 16


def test_without_gradient_two_products_per_chunk_instead_of_four():
    models, _ = head_problem()
    with LargestTensor() as counter:
        fused_head_divergence(*models, kind="reverse_kl", chunk_tokens=10)
    assert counter.num_products == 3 * 4
    with torch.no_grad(), LargestTensor() as counter:
        result = fused_head_divergence(*models, kind="reverse_kl", chunk_tokens=10)
    assert counter.num_products == 3 * 2
    assert not result.loss_sum.requires_grad


def test_only_the_student_gets_a_gradient_and_only_where_it_asks_for_one():
    models, _ = head_problem()
    for tensor in models[2:]:
        tensor.requires_grad_()
    frozen_head = (models[0], models[1].detach(), *models[2:])
    gradients = torch.autograd.grad(fused_head_divergence(*models, kind="jsd").loss_sum, models, allow_unused=True)
    (alone,) = torch.autograd.grad(fused_head_divergence(*frozen_head, kind="jsd").loss_sum, models[0])
    assert gradients[2:] == (None, None)
    assert torch.equal(gradients[0], alone)


def test_no_tokens_and_no_weight_give_a_connected_zero():
    models, weight_T = head_problem()
    empty = (models[0][:0], models[1], models[2][:0], models[3])
    for result in (fused_head_divergence(*empty, kind="jsd"), fused_head_divergence(*models, kind="jsd", token_weight_T=0 * weight_T)):
        result.loss_sum.backward()
        assert result.loss_sum == result.weight_sum == 0
        assert models[0].grad.abs().max() == models[1].grad.abs().max() == 0


def test_padded_columns_do_not_matter():
    models, _ = head_problem()
    first = fused_head_divergence(*models, kind="reverse_kl", vocab_size=50)
    with torch.no_grad():
        models[1][50:], models[3][50:] = 1e4, math.nan
    second = fused_head_divergence(*models, kind="reverse_kl", vocab_size=50)
    assert torch.equal(first.divergence_T, second.divergence_T)
    assert torch.equal(first.student_entropy_T, second.student_entropy_T)


def test_per_token_values_match_log_softmax():
    """Entropy, both divergences and the log-probability of given ids, at the loss temperature, for kept and dropped rows alike."""
    models, weight_T = head_problem()
    ids_T = torch.arange(29) % 50
    result = fused_head_divergence(*models, kind="reverse_kl", token_weight_T=weight_T, vocab_size=50, temperature=1.4, chunk_tokens=8, sampled_ids_T=ids_T)
    statistics = token_statistics(*models, vocab_size=50, temperature=1.4, chunk_tokens=8)
    forward_T, logits_TV, _ = naive_head(models, weight_T, vocab_size=50, kind="forward_kl", temperature=1.4)
    reverse_T, *_ = naive_head(models, weight_T, vocab_size=50, kind="reverse_kl", temperature=1.4)
    logp_TV = F.log_softmax(logits_TV / 1.4, -1)
    assert relative_error(result.sampled_logp_T, logp_TV.gather(1, ids_T[:, None])[:, 0]) < TOLERANCE[torch.float32]
    assert relative_error(result.student_entropy_T, -(logp_TV.exp() * logp_TV).sum(-1)) < TOLERANCE[torch.float32]
    assert torch.equal(statistics.student_entropy_T, result.student_entropy_T)
    assert relative_error(statistics.reverse_kl_T, reverse_T) < TOLERANCE[torch.float32]
    assert relative_error(statistics.forward_kl_T, forward_T) < TOLERANCE[torch.float32]
    assert not any(value_T.requires_grad for value_T in (result.divergence_T, result.student_entropy_T, result.sampled_logp_T))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cross_entropy_matches_torch(dtype):
    """An ignored label (-100) with weight 0 is left out, as in torch; with weight it makes the loss NaN instead of passing unnoticed."""
    models, _ = head_problem(dtype=dtype)
    targets_T = torch.arange(29) * 7 % 50
    targets_T[::4] = -100
    weight_T = (targets_T >= 0).float()
    result = fused_head_cross_entropy(*models[:2], targets_T, token_weight_T=weight_T, vocab_size=50, chunk_tokens=8)
    reference = [tensor.detach().double().requires_grad_() for tensor in models[:2]]
    expected = F.cross_entropy(reference[0] @ reference[1][:50].T, targets_T, reduction="sum")
    assert relative_error(result.loss_sum, expected) < TOLERANCE[torch.float32]
    for gradient, exact in zip(torch.autograd.grad(result.loss_sum, models[:2]), torch.autograd.grad(expected, reference)):
        assert relative_error(gradient, exact) < TOLERANCE[dtype]
    assert fused_head_cross_entropy(*models[:2], targets_T, vocab_size=50).loss_sum.isnan()


def divergence_call(**changes):
    student, teacher = logits_pair(4, 8)
    return lambda: vocab_parallel_divergence(student, changes.pop("teacher", teacher), **({"kind": "reverse_kl"} | changes))


def head_call(*, position=None, tensor=None, **changes):
    models, _ = head_problem(num_tokens=4, num_columns=8)
    models = [tensor if index == position else model for index, model in enumerate(models)]
    return lambda: fused_head_divergence(*models, **({"kind": "reverse_kl"} | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (divergence_call(kind="kl"), r"kind='kl' is not known; use one of reverse_kl, forward_kl, jsd"),
        (divergence_call(kind="jsd", beta=1.5), r"beta=1.5 must be in \[0, 1\]"),
        (divergence_call(temperature=0.0), r"temperature=0.0 must be positive and finite"),
        (divergence_call(temperature=math.inf), r"temperature=inf must be positive and finite"),
        (divergence_call(pointwise_clip=-0.5), r"pointwise_clip=-0.5 must be positive, or None"),
        (divergence_call(pointwise_clip=math.nan), r"pointwise_clip=nan must be positive"),
        (divergence_call(kind="topk_tail_forward", pointwise_clip=0.0), r"pointwise_clip=0.0 must be positive"),
        (divergence_call(kind="topk_tail_forward", beta=1.5), r"beta=1.5 must be in \[0, 1\]"),
        (divergence_call(kind="topk_tail_forward", top_k=2.5), r"top_k=2.5 must be a whole number of at least 1"),
        (divergence_call(vocab_size=0), r"vocab_size=0 must be a whole number of at least 1"),
        (divergence_call(vocab_size=8.0), r"vocab_size=8.0 must be a whole number of at least 1"),
        (divergence_call(vocab_size=9, shard_start=0), r"vocab_size=9 is larger than all shards together: 1 x 8 = 8"),
        (divergence_call(shard_start=5), r"shard_start=5 on rank 0 of the group must be 0"),
        (divergence_call(kind="k1", sampled_ids_T=torch.ones(4)), r"sampled_ids_T must hold ids of dtype torch.int64 or torch.int32, not torch.float32"),
        (divergence_call(kind="k1", sampled_ids_T=torch.ones(4, device="meta").long()), r"devices must agree: sampled_ids_T has meta"),
        (head_call(position=0, tensor=torch.zeros(4, 16).half()), r"dtypes must agree: student_hidden_TH has torch.float16"),
        (lambda: token_statistics(*(tensor.detach().half() for tensor in head_problem(4, 8)[0])), r"student_head_WH have dtype torch.float16; use one of"),
        (divergence_call(vocab_size=9), r"vocab_size=9 is larger than all shards together: 1 x 8 = 8"),
        (divergence_call(teacher=torch.zeros(4, 9)), r"shapes must agree: student_logits_TW has \(4, 8\), teacher_logits_TW has \(4, 9\)"),
        (
            divergence_call(teacher=torch.zeros(4, 8).bfloat16()),
            r"dtypes must agree: student_logits_TW has torch.float32, teacher_logits_TW has torch.bfloat16",
        ),
        (divergence_call(teacher=torch.zeros(4, 8, device="meta")), r"devices must agree: student_logits_TW has cpu, teacher_logits_TW has meta"),
        (head_call(kind="kl"), r"kind='kl' is not known"),
        (head_call(temperature=-1.0), r"temperature=-1.0 must be positive"),
        (head_call(position=1, tensor=torch.zeros(8, 15)), r"hidden sizes must agree: student_hidden_TH has 16, student_head_WH has 15"),
        (head_call(position=3, tensor=torch.zeros(9, 24)), r"vocabulary slices must agree: student_head_WH has 8, teacher_head_WG has 9"),
        (head_call(position=2, tensor=torch.zeros(5, 24)), r"token counts must agree: student_hidden_TH has 4, teacher_hidden_TG has 5"),
        (head_call(position=3, tensor=torch.zeros(8, 24).bfloat16()), r"dtypes must agree: teacher_hidden_TG has torch.float32, teacher_head_WG has torch.bfl"),
        (head_call(token_weight_T=torch.ones(3)), r"shapes must agree: token_weight_T has \(3,\), the tokens of student_hidden_TH has \(4,\)"),
        (head_call(sampled_ids_T=torch.ones(4, 1)), r"shapes must agree: sampled_ids_T has \(4, 1\)"),
        (head_call(chunk_tokens=0), r"chunk_tokens=0 must be a whole number of at least 1"),
    ],
)
def test_wrong_arguments_are_refused_with_both_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
