"""The divergences over the whole vocabulary as Triton kernels: what `full_divergence` does in some twenty passes over [N, W], in two or three.

`row_statistics` reads both models' logits once, `term_sums` (kinds without a closed form) once more, and `gradient_` once, writing over the
student's logits. The collectives between them are the caller's, as are all numbers per row. Formulas and names are those of `full_divergence`,
which is the reference in the tests; `tests/unit/test_losses_triton.py` runs these kernels on CPU by Triton's interpreter. `soft_cap_` is a pass before them.

Shapes: N rows of one chunk, W = this rank's slice of the vocabulary. Logits are fp32 and contiguous.
"""

import importlib.util
from typing import NamedTuple

import torch

from opd_megatron.losses.full_divergence import Divergence, RowNorms
from opd_megatron.losses.vocab_parallel import moved_maximum

HAS_TRITON = importlib.util.find_spec("triton") is not None
_COLUMNS_AT_ONCE = 4096


def usable_for(logits_NW: torch.Tensor) -> bool:
    """Return whether the kernels take these logits: fp32 on a CUDA device, with Triton installed (it comes with torch for CUDA)."""
    return HAS_TRITON and logits_NW.is_cuda and logits_NW.dtype == torch.float32


def soft_cap_(product_NW: torch.Tensor, damping_NW: torch.Tensor | None, softcap: float, temperature: float) -> torch.Tensor:
    """Return softcap tanh(product / softcap) / temperature in the product's memory; write what the cap multiplies a gradient with where that is wanted."""
    from opd_megatron.losses.triton_kernels import soft_cap_kernel

    num_rows, num_columns = product_NW.shape
    if num_rows:
        soft_cap_kernel[(num_rows,)](product_NW, damping_NW, num_columns, softcap, softcap / temperature, **launch_options(num_columns))
    return product_NW


class RowStatistics(NamedTuple):
    """Sums over this rank's columns, relative to its own maxima until `relative_to`. u is a logit minus the maximum of its row.

    masses: sum e^u of each model; entropy_moment: sum e^us us; reverse_moment: sum e^us (us - ut); forward_moment: sum e^ut (ut - us).
    """

    student_max_N: torch.Tensor
    teacher_max_N: torch.Tensor
    student_mass_N: torch.Tensor
    teacher_mass_N: torch.Tensor
    entropy_moment_N: torch.Tensor
    reverse_moment_N: torch.Tensor
    forward_moment_N: torch.Tensor

    def relative_to(self, student_max_N: torch.Tensor, teacher_max_N: torch.Tensor) -> "RowStatistics":
        """Return the sums relative to larger maxima: those over the whole vocabulary. A slice without a real logit keeps its zeros."""
        student_N, teacher_N = moved_maximum(self.student_max_N, student_max_N), moved_maximum(self.teacher_max_N, teacher_max_N)
        gap_N = student_N - teacher_N
        return RowStatistics(
            student_max_N,
            teacher_max_N,
            self.student_mass_N * student_N.exp(),
            self.teacher_mass_N * teacher_N.exp(),
            (self.entropy_moment_N + student_N * self.student_mass_N) * student_N.exp(),
            (self.reverse_moment_N + gap_N * self.student_mass_N) * student_N.exp(),
            (self.forward_moment_N - gap_N * self.teacher_mass_N) * teacher_N.exp(),
        )


def row_statistics(student_NW: torch.Tensor, teacher_NW: torch.Tensor) -> RowStatistics:
    """Return the statistics of every row in one pass, with running maxima."""
    from opd_megatron.losses.triton_kernels import row_statistics_kernel

    num_rows, num_columns = student_NW.shape
    out_7N = student_NW.new_empty((len(RowStatistics._fields), num_rows))
    if num_rows:
        row_statistics_kernel[(num_rows,)](student_NW, teacher_NW, out_7N, num_rows, num_columns, **launch_options(num_columns))
    return RowStatistics(*out_7N)


def term_sums(divergence: Divergence, student_NW: torch.Tensor, teacher_NW: torch.Tensor, norms: RowNorms) -> tuple[torch.Tensor, ...]:
    """Return this rank's part of the divergence, of the sum of slopes and, with a clip, of the number of clipped entries, by adding up its entries."""
    from opd_megatron.losses.triton_kernels import term_sums_kernel

    num_rows, num_columns = student_NW.shape
    settings = _settings(divergence)
    out_KN = student_NW.new_empty((3 if settings["CLIPPED"] else 2, num_rows))
    if num_rows:
        term_sums_kernel[(num_rows,)](student_NW, teacher_NW, torch.stack(norms), out_KN, num_rows, num_columns, **settings, **launch_options(num_columns))
    return out_KN.unbind()


def gradient_(
    divergence: Divergence, student_NW: torch.Tensor, teacher_NW: torch.Tensor, norms: RowNorms, correction_N: torch.Tensor, scale_N: torch.Tensor
) -> torch.Tensor:
    """Return scale * (s - p * correction), the gradient in the student's logits, written over them."""
    from opd_megatron.losses.triton_kernels import gradient_kernel

    num_rows, num_columns = student_NW.shape
    if num_rows:
        gradient_kernel[(num_rows,)](
            student_NW,
            teacher_NW,
            torch.stack([*norms, correction_N, scale_N.to(student_NW.dtype)]),
            num_rows,
            num_columns,
            **_settings(divergence),
            **launch_options(num_columns),
        )
    return student_NW


def _settings(divergence: Divergence) -> dict[str, object]:
    """Return the kernel's arguments that choose a formula. beta and alpha meet in one number: only one of them has a meaning."""
    clip = divergence.pointwise_clip
    share = divergence.beta if divergence.kind == "jsd" else divergence.alpha or 0.0
    return {"share": share, "clip": 0.0 if clip is None else clip, "KIND": divergence.kind, "CLIPPED": clip is not None}


def launch_options(num_columns: int) -> dict[str, int]:
    """Return the columns a program holds at once, a power of two and no more than the row needs, its warps, and the registers that a thread may have.

    With 4096 columns, 8 warps of 128 registers leave room for a second program on a processor of sm_90. All kinds but one need no more (`python -m
    tests.compile_kernels 90`); a clipped skew_forward would take 153 with Triton 3.7.
    """
    block = min(_COLUMNS_AT_ONCE, max(16, 1 << (num_columns - 1).bit_length() if num_columns else 16))
    return {"BLOCK": block, "num_warps": 8, "maxnreg": 128} if block > 2048 else {"BLOCK": block, "num_warps": 4}
