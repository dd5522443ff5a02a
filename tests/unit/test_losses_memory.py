"""What the fused head holds at once, in bytes, which rows it multiplies, and where it puts the head's gradient.

Not covered here: memory inside one operation (the sorting of topk, the buffers of a matrix product), and CUDA.
"""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from opd_megatron.losses import fused_head_cross_entropy, fused_head_divergence, token_statistics

HIDDEN, COLUMNS = 16, 1024
CASES = [{"kind": "reverse_kl"}, {"kind": "forward_kl"}, {"kind": "jsd"}, {"kind": "skew_forward"}, {"kind": "topk_tail_reverse"}, {"kind": "k3"}]


BOTH_CAPS = {"student_softcap": 2.0, "teacher_softcap": 3.0}


class PeakBytes(TorchDispatchMode):
    """Records the most bytes that tensors held at once, those not counted that share the storage of `inputs`."""

    def __init__(self, inputs):
        super().__init__()
        self.peak_bytes, self._alive, self._given = 0, {}, {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._given:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(num_bytes for _, num_bytes in self._alive.values()))
        return result


class ProductRows(TorchDispatchMode):
    """Counts the rows of tokens that matrix products take or return."""

    def __init__(self, num_columns):
        super().__init__()
        self.num_columns, self.num_rows = num_columns, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            flops = result.numel() * args[-2].size(1)
            self.num_rows += flops // (self.num_columns * HIDDEN)
        return result


def head_problem(num_tokens, num_columns=COLUMNS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, HIDDEN), (num_columns, HIDDEN)] * 2
    models = [torch.randn(shape, generator=generator).mul_(0.6).to(dtype) for shape in shapes]
    return [models[0].requires_grad_(), models[1].requires_grad_(), *models[2:]]


def arguments(case, num_tokens):
    return case | ({"sampled_ids_T": torch.arange(num_tokens) % COLUMNS} if case["kind"] == "k3" else {})


def extra_bytes(case, num_tokens):
    """Return the peak of forward and backward, less what has to grow with T: two gradients of the hidden states, and numbers per token."""
    models = head_problem(num_tokens)
    with PeakBytes(models) as peak:
        result = fused_head_divergence(*models, chunk_tokens=64, **arguments(case, num_tokens))
        torch.autograd.grad(result.loss_sum, models[:2])
    return peak.peak_bytes - 2 * models[0].nbytes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peak_memory_does_not_grow_with_tokens(case):
    """At T = 1k, 4k and 16k. 32 bytes a token are allowed: weight, loss, entropy and log-probability, against 4096 of a row of logits."""
    small, *large = (extra_bytes(case, num_tokens) for num_tokens in (1024, 4096, 16384))
    chunk_bytes = 64 * COLUMNS * 4
    assert small < 12 * chunk_bytes
    for num_tokens, extra in zip((4096, 16384), large):
        assert extra - small <= 32 * (num_tokens - 1024)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_soft_cap_costs_one_chunk_of_the_student(case):
    """Its damping of the gradient, at any T; the teacher's, and statistics without a gradient, cost nothing."""
    plain, teachers, both, longer = (
        extra_bytes(case | caps, num_tokens) for caps, num_tokens in (({}, 1024), ({"teacher_softcap": 3.0}, 1024), (BOTH_CAPS, 1024), (BOTH_CAPS, 4096))
    )
    assert teachers == plain
    assert both == plain + 64 * COLUMNS * 4
    assert longer - both <= 32 * (4096 - 1024)


def test_statistics_under_a_soft_cap_need_no_more_memory():
    models = [tensor.detach() for tensor in head_problem(1024)]
    peaks = []
    for caps in ({}, BOTH_CAPS):
        with PeakBytes(models) as peak:
            token_statistics(*models, chunk_tokens=64, **caps)
        peaks.append(peak.peak_bytes)
    assert peaks[0] == peaks[1]


def test_the_fused_head_needs_less_than_a_tenth_of_full_logits():
    models = head_problem(4096)
    with PeakBytes(models) as full:
        log_p, log_q = ((hidden @ head.T).log_softmax(-1) for hidden, head in (models[:2], models[2:]))
        (log_p.exp() * (log_p - log_q)).sum().backward()
    with PeakBytes(models) as fused:
        fused_head_divergence(*models, kind="reverse_kl", chunk_tokens=64).loss_sum.backward()
    assert fused.peak_bytes < 0.1 * full.peak_bytes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_weight_0_are_measured_and_left_out_of_the_gradient_products(case):
    """Of 100 rows, 30 have a weight: two products of 100 rows and two of 30. All 100 are measured, bit for bit as with weights."""
    models, weight_T = head_problem(100), torch.zeros(100)
    weight_T[20:50] = torch.rand(30) + 0.1
    options = arguments(case, 100) | {"chunk_tokens": 32}
    with ProductRows(COLUMNS) as products:
        result = fused_head_divergence(*models, token_weight_T=weight_T, **options)
    assert products.num_rows == 2 * 100 + 2 * 30
    assert torch.equal(result.divergence_T, fused_head_divergence(*models, **options).divergence_T)
    gradients = torch.autograd.grad(result.loss_sum, models[:2])
    alone = arguments(case, 100)
    if "sampled_ids_T" in alone:
        alone["sampled_ids_T"] = alone["sampled_ids_T"][20:50]
    rows = [models[0][20:50], models[1], models[2][20:50], models[3]]
    expected = torch.autograd.grad(fused_head_divergence(*rows, token_weight_T=weight_T[20:50], **alone).loss_sum, models[:2])
    for gradient, reference in zip(gradients, expected):
        # 1e-6: the same sums in the order that each matrix size brings.
        assert (gradient - reference).norm() <= 1e-6 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_collects_the_fp32_gradient_of_every_micro_batch(dtype):
    """Two micro-batches of different upstream scale; what main_grad held before stays. 1e-6: fp32 sums in another order."""
    models = head_problem(20, 64, dtype)
    head = models[1]
    head.main_grad, head.grad_added_to_main_grad = torch.ones(head.shape), False
    expected = torch.ones(head.shape, dtype=torch.float64)
    for scale in (1.0, 3.0):
        wide = [tensor.detach().float().requires_grad_() for tensor in models]
        (gradient,) = torch.autograd.grad(scale * fused_head_divergence(*wide, kind="reverse_kl").loss_sum, wide[1])
        expected += gradient
        (scale * fused_head_divergence(*models, kind="reverse_kl", accumulate_main_grad=True).loss_sum).backward()
        assert head.grad_added_to_main_grad
        assert head.grad.abs().max() == 0
        head.grad, head.grad_added_to_main_grad = None, False
    assert ((head.main_grad - expected).norm() / expected.norm()).item() < 1e-6


def test_main_grad_without_the_mark_leaves_no_gradient_and_serves_cross_entropy():
    models = head_problem(20, 64)
    models[1].main_grad = torch.zeros_like(models[1])
    targets_T = torch.arange(20)
    fused_head_cross_entropy(*models[:2], targets_T, accumulate_main_grad=True).loss_sum.backward()
    (expected,) = torch.autograd.grad(fused_head_cross_entropy(*models[:2], targets_T).loss_sum, models[1])
    assert models[1].grad is None
    assert torch.equal(models[1].main_grad, expected)


@pytest.mark.parametrize(
    ("main_grad", "message"),
    [
        (None, r"accumulate_main_grad=True needs student_head_WH.main_grad, got None"),
        (torch.zeros(8, 15), r"shapes must agree: the gradient of student_head_WH has \(8, 16\), student_head_WH.main_grad has \(8, 15\)"),
        (torch.zeros(8, 16).bfloat16(), r"dtypes must agree: the gradient of student_head_WH has torch.float32, student_head_WH.main_grad has torch.bfloat16"),
    ],
)
def test_a_main_grad_that_does_not_fit_is_refused(main_grad, message):
    models = head_problem(4, 8)
    if main_grad is not None:
        models[1].main_grad = main_grad
    with pytest.raises(ValueError, match=message):
        fused_head_divergence(*models, kind="jsd", accumulate_main_grad=True)
