"""The Triton kernels against the torch form of the same formulas, on CPU by Triton's interpreter.

Covered: the arithmetic, masks, odd widths, the wiring into the fused head and `token_statistics`, and that every variant compiles for sm_90.
Not covered here: running and speed on a GPU, CUDA's approximate exp and log, and the split over ranks (tests/distributed/test_losses_tp.py).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the test extra: triton")
tl = pytest.importorskip("triton.language")
if not triton.knobs.runtime.interpret:
    pytest.skip("the kernels are compiled here: run on a machine without GPU", allow_module_level=True)

from opd_megatron.losses import triton_divergence, triton_kernels  # noqa: E402
from opd_megatron.losses.full_divergence import FULL_KINDS, Divergence  # noqa: E402
from opd_megatron.losses.fused_head import FusedDivergence, fused_head_divergence, token_statistics  # noqa: E402
from opd_megatron.losses.logit_scaling import LogitScaling  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
KINDS: dict[str, dict[str, object]] = {
    "reverse_kl": {"kind": "reverse_kl"},
    "forward_kl": {"kind": "forward_kl"},
    "jsd": {"kind": "jsd", "beta": 0.3},
    "skew_forward": {"kind": "skew_forward", "alpha": 0.2},
    "skew_reverse": {"kind": "skew_reverse", "alpha": 0.2},
    "reverse_kl clipped": {"kind": "reverse_kl", "pointwise_clip": 0.01},
    "forward_kl clipped": {"kind": "forward_kl", "pointwise_clip": 0.01},
    "jsd clipped": {"kind": "jsd", "beta": 0.3, "pointwise_clip": 0.005},
    "skew_reverse clipped": {"kind": "skew_reverse", "alpha": 0.2, "pointwise_clip": 0.01},
}


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switch the kernels on or off, with blocks smaller than the vocabulary, so that maxima and sums are carried over."""
    monkeypatch.setattr(triton_divergence, "_COLUMNS_AT_ONCE", 32)

    def switch(on: bool) -> None:
        monkeypatch.setattr(triton_divergence, "usable_for", lambda _logits: on)

    return switch


def _inputs(num_tokens: int, vocab: int, scale: float) -> tuple[torch.Tensor, ...]:
    """Return hidden states and head of student and teacher, whose logits have a standard deviation of `scale`."""
    generator = torch.Generator().manual_seed(vocab)
    shapes = {(num_tokens, 12): scale, (vocab, 12): 12**-0.5, (num_tokens, 8): scale, (vocab, 8): 8**-0.5}
    return tuple(torch.randn(shape, generator=generator) * factor for shape, factor in shapes.items())


def _run(inputs: tuple[torch.Tensor, ...], **options: object) -> tuple[FusedDivergence, torch.Tensor, torch.Tensor]:
    hidden, head, teacher_hidden, teacher_head = inputs
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    result = fused_head_divergence(hidden, head, teacher_hidden, teacher_head, **options)  # type: ignore[arg-type]
    result.loss_sum.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return result, hidden.grad, head.grad


def _relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm().clamp_min(1e-30))


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("name", KINDS)
def test_kernels_give_the_loss_and_gradients_of_fp64(by_kernels: Callable[[bool], None], name: str, scale: float) -> None:
    # 101 columns of which 97 are real: neither a multiple of the block, nor of anything.
    inputs = _inputs(7, 101, scale)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 1.0])
    options = {**KINDS[name], "vocab_size": 97, "token_weight_T": weight, "temperature": 1.3, "chunk_tokens": 3, "sampled_ids_T": torch.arange(7) * 13}
    by_kernels(False)
    exact, exact_hidden, exact_head = _run(tuple(tensor.double() for tensor in inputs), **options)
    by_kernels(True)
    ours, hidden, head = _run(inputs, **options)
    assert torch.allclose(ours.divergence_T.double(), exact.divergence_T, rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours.student_entropy_T.double(), exact.student_entropy_T, rtol=1e-5, atol=1e-6)
    assert exact.sampled_logp_T is not None
    assert ours.sampled_logp_T is not None
    assert torch.allclose(ours.sampled_logp_T.double(), exact.sampled_logp_T, rtol=1e-5, atol=1e-5)
    if "clipped" in name:
        assert ours.clipped_T is not None
        assert exact.clipped_T is not None
        assert ours.clipped_T.tolist() == exact.clipped_T.tolist()
        assert ours.clipped_T.any() or scale < 1
    else:
        assert ours.clipped_T is None
    assert _relative(hidden.double(), exact_hidden) < 1e-5
    assert _relative(head.double(), exact_head) < 1e-5
    assert (head[97:] == 0).all()


@pytest.mark.parametrize("name", ["reverse_kl", "jsd clipped"])
def test_capped_logits_by_kernels_give_those_of_fp64(by_kernels: Callable[[bool], None], name: str) -> None:
    """Both models' caps, a temperature, rows without weight; the statistics as well."""
    inputs = _inputs(7, 101, 2.0)
    caps = {"student_softcap": 2.0, "teacher_softcap": 3.0, "vocab_size": 97, "temperature": 1.3, "chunk_tokens": 3}
    options = {**KINDS[name], "token_weight_T": torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 1.0]), **caps}
    wide = tuple(tensor.double() for tensor in inputs)
    by_kernels(False)
    exact, exact_hidden, exact_head = _run(wide, **options)
    exact_statistics = token_statistics(*wide, **caps)  # type: ignore[arg-type]
    by_kernels(True)
    ours, hidden, head = _run(inputs, **options)
    statistics = token_statistics(*inputs, **caps)  # type: ignore[arg-type]
    assert torch.allclose(ours.divergence_T.double(), exact.divergence_T, rtol=1e-5, atol=1e-6)
    assert torch.allclose(statistics.forward_kl_T.double(), exact_statistics.forward_kl_T, rtol=1e-5, atol=1e-6)
    assert _relative(hidden.double(), exact_hidden) < 1e-5
    assert _relative(head.double(), exact_head) < 1e-5


@pytest.mark.parametrize(("on", "temperature"), [(True, 1.0), (True, 0.7), (False, 0.7)])
def test_the_cap_keeps_its_precision(by_kernels: Callable[[bool], None], on: bool, temperature: float) -> None:
    """By its kernel and by torch, from 1e-20 to far beyond the cap, of either sign; its damping of the gradient too, small there. A NaN stays one."""
    by_kernels(on)
    values = torch.cat([-torch.logspace(2.4, -20, 500), torch.zeros(1), torch.logspace(-20, 2.4, 500)])[None].repeat(2, 1)
    values[1, 7] = math.nan
    logits, damping = values.clone(), torch.empty_like(values)
    LogitScaling(softcap=30.0, temperature=temperature).apply_(logits, damping)
    tanh = torch.tanh(values[0].double() / 30)
    exact, exact_damping = 30 * tanh / temperature, 1 / torch.cosh(values[0].double() / 30) ** 2
    assert ((logits[0] - exact).abs() <= 1e-6 * exact.abs()).all()
    assert ((damping[0] - exact_damping).abs() <= 3e-6 * exact_damping).all()
    assert logits[1].isnan().nonzero().tolist() == damping[1].isnan().nonzero().tolist() == [[7]]
    assert torch.equal(LogitScaling(softcap=30.0, temperature=temperature).apply_(values.clone())[0], logits[0])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_model_does_not_diverge_from_itself(by_kernels: Callable[[bool], None], name: str, scale: float) -> None:
    hidden, head, _, _ = _inputs(5, 70, scale)
    by_kernels(True)
    result, hidden_grad, head_grad = _run((hidden, head, hidden, head), **KINDS[name])
    assert result.divergence_T.abs().max() < 1e-6
    assert hidden_grad.abs().max() < 1e-6
    # The head's gradient is that of the logits, an fp32 rounding of 0, times hidden states of this scale.
    assert head_grad.abs().max() < 1e-6 * scale


def _with_masks(num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits with -inf in the student, in the teacher, in both, in a whole first block, and in whole rows."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(6, num_columns, generator=generator), torch.randn(6, num_columns, generator=generator)
    student[0, 3], teacher[1, 5] = -math.inf, -math.inf
    student[2, :40] = teacher[2, :40] = -math.inf
    student[3], teacher[4] = -math.inf, -math.inf
    return student, teacher


def test_statistics_of_masked_rows_are_those_of_torch() -> None:
    student, teacher = _with_masks(75)
    local = triton_divergence.row_statistics(student, teacher)
    assert torch.equal(local.student_max_N, student.amax(-1))
    assert torch.equal(local.teacher_max_N, teacher.amax(-1))
    shifted = [logits - logits.amax(-1, keepdim=True).masked_fill(logits.amax(-1, keepdim=True) == -math.inf, 0) for logits in (student, teacher)]
    masses = [logits.exp() for logits in shifted]
    assert torch.allclose(local.student_mass_N, masses[0].sum(-1))
    assert torch.allclose(local.teacher_mass_N, masses[1].sum(-1))
    assert torch.allclose(local.entropy_moment_N, (masses[0] * shifted[0]).nansum(-1))
    assert torch.allclose(local.reverse_moment_N, (masses[0] * (shifted[0] - shifted[1])).nansum(-1))
    assert torch.allclose(local.forward_moment_N, (masses[1] * (shifted[1] - shifted[0])).nansum(-1))


@pytest.mark.parametrize("name", KINDS)
def test_masked_logits_give_what_torch_gives(by_kernels: Callable[[bool], None], name: str) -> None:
    # An identity head makes the hidden states the logits.
    student, teacher = (logits.nan_to_num(neginf=-3e38) for logits in _with_masks(48))
    eye = torch.eye(48)
    results = {}
    for on in (False, True):
        by_kernels(on)
        results[on] = _run((student, eye, teacher, eye), **KINDS[name])
    assert torch.allclose(results[True][0].divergence_T, results[False][0].divergence_T, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.allclose(results[True][1], results[False][1], rtol=1e-4, atol=1e-6, equal_nan=True)


def test_a_nan_stays_in_its_row(by_kernels: Callable[[bool], None]) -> None:
    inputs = _inputs(4, 50, 1.0)
    inputs[0][2, 0] = math.nan
    by_kernels(True)
    result, hidden_grad, _ = _run(inputs, kind="reverse_kl")
    assert result.divergence_T.isnan().tolist() == [False, False, True, False]
    assert hidden_grad.isnan().any(-1).tolist() == [False, False, True, False]


def test_token_statistics_by_kernels_are_those_of_torch(by_kernels: Callable[[bool], None]) -> None:
    inputs = _inputs(9, 83, 1.0)
    by_kernels(False)
    exact = token_statistics(*(tensor.double() for tensor in inputs), vocab_size=80, chunk_tokens=4)
    by_kernels(True)
    ours = token_statistics(*inputs, vocab_size=80, chunk_tokens=4)
    for name in ("student_entropy_T", "reverse_kl_T", "forward_kl_T"):
        assert torch.allclose(getattr(ours, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-6), name


def test_an_empty_slice_and_no_rows_are_no_work() -> None:
    empty = torch.empty(3, 0)
    statistics = triton_divergence.row_statistics(empty, empty)
    assert (statistics.student_max_N == -math.inf).all()
    assert all((values == 0).all() for values in statistics[2:])
    assert triton_divergence.row_statistics(torch.empty(0, 5), torch.empty(0, 5)).student_mass_N.shape == (0,)


def test_partial_statistics_of_slices_add_up_to_the_whole() -> None:
    student, teacher = _with_masks(90)
    whole = triton_divergence.row_statistics(student, teacher)
    parts = [triton_divergence.row_statistics(student[:, cut].contiguous(), teacher[:, cut].contiguous()) for cut in (slice(0, 40), slice(40, 90))]
    maxima = [torch.maximum(parts[0][index], parts[1][index]) for index in (0, 1)]
    moved = [part.relative_to(*maxima) for part in parts]
    for index in range(2, len(whole)):
        assert torch.allclose(moved[0][index] + moved[1][index], whole[index], rtol=1e-5, atol=1e-6)


@triton.jit
def _apply_expm1(values, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), triton_kernels._expm1_of_negative(tl.load(values + tl.arange(0, BLOCK))))


@triton.jit
def _apply_log1p(values, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), triton_kernels._log1p_of_negative(tl.load(values + tl.arange(0, BLOCK))))


@pytest.mark.parametrize(("kernel", "reference"), [(_apply_expm1, torch.expm1), (_apply_log1p, torch.log1p)], ids=["expm1", "log1p"])
def test_small_numbers_keep_their_precision(kernel: Any, reference: Callable[[torch.Tensor], torch.Tensor]) -> None:
    values = -torch.logspace(-30, -0.0001, 1024)
    out = torch.empty_like(values)
    kernel[(1,)](values, out, BLOCK=1024)
    exact = reference(values.double())
    assert ((out.double() - exact) / exact).abs().max() < 2e-6


def test_every_variant_compiles_for_a_gpu_and_keeps_its_numbers_in_registers(tmp_path: Path) -> None:
    """Down to machine code, by the assembler in Triton's wheel, in a process without the interpreter.

    8 warps of 128 registers leave room for a second program on a processor of sm_90.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compile_kernels", "90"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr
    variants = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(variants) == 2 + 2 * 2 * len(FULL_KINDS)
    for variant in variants:
        assert variant["reg"] <= 128, variant
        assert variant["stack"] + variant["local"] <= 16, variant


def test_only_fp32_on_cuda_goes_to_the_kernels() -> None:
    assert not triton_divergence.usable_for(torch.zeros(1, 1))
    assert not triton_divergence.usable_for(torch.zeros(1, 1, dtype=torch.float64))
    assert Divergence(kind="reverse_kl").has_closed_form
