"""Divergences between a student's and a teacher's next-token distribution, with the vocabulary split across tensor-parallel ranks.

Shapes: T tokens, V vocabulary, W = this rank's slice of V. p is the student's distribution, q the teacher's, both at the loss temperature.

    reverse_kl  KL(p||q) = sum_v p (log p - log q)         forward_kl  KL(q||p) = sum_v q (log q - log p)
    jsd         beta KL(q||m) + (1 - beta) KL(p||m),  m = beta q + (1 - beta) p

beta = 0 and beta = 1 select forward and reverse KL, as in GKD's code. They are not limits of the formula, which goes to 0 at both ends,
so the scale of the loss jumps there.

Every gradient here has one form. With the slope s_v = p_v dL/dp_v, the softmax Jacobian gives dL/dz_v = s_v - p_v sum_u s_u.
The sum over the whole vocabulary (the "correction") is known after the forward, so no backward communicates.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_megatron.losses.vocab_parallel import (
    CHUNK_MIN_TOKENS,
    ShardSoftmax,
    VocabShard,
    compute_dtype,
    require_same,
    token_chunks,
    vocab_shard,
    weighted_sum,
)

KINDS = ("reverse_kl", "forward_kl", "jsd")


class ChunkDivergence(NamedTuple):
    """Divergence of the rows of one chunk and what its gradient needs. `slope_TW` is kept only where the forward had to build it."""

    value_T: torch.Tensor
    correction_T: torch.Tensor
    slope_TW: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Which divergence; `beta` is the teacher's weight in the mixture of jsd. Raises ValueError for an unknown kind or a beta outside [0, 1].

    With `pointwise_clip` = c, each vocabulary entry's summand l_v counts as min(l_v, c), and clipped entries have no gradient (OPSD, arXiv 2601.18734).
    A clipped divergence can be negative.
    """

    kind: str
    beta: float = 0.5
    pointwise_clip: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not known; use one of {', '.join(KINDS)}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} must be in [0, 1]")
        if self.kind == "jsd" and self.beta in (0, 1):
            object.__setattr__(self, "kind", "forward_kl" if self.beta == 0 else "reverse_kl")

    @property
    def has_closed_form(self) -> bool:
        """Whether the value follows from sums of unnormalised exponentials, which saves a collective."""
        return self.kind != "jsd" and self.pointwise_clip is None

    def evaluate_(
        self, student: ShardSoftmax, teacher: ShardSoftmax, shard: VocabShard, *extra_T: torch.Tensor
    ) -> tuple[ChunkDivergence, tuple[torch.Tensor, ...]]:
        """Return the divergence, and the masses of student and teacher followed by the sums of `extra_T`, which ride in the same collective.

        Takes shifted logits and leaves normalised probabilities.
        """
        moment = (self._moment(student, teacher),) if self.has_closed_form else ()
        sums_T = shard.sum(student.mass(), teacher.mass(), *extra_T, *moment)
        masses = live_masses(*sums_T[:2])
        student.normalise_(masses[0])
        teacher.normalise_(masses[1])
        chunk = self._closed_form(sums_T[-1], *masses) if self.has_closed_form else self._summed(student, teacher, shard)
        return chunk, (*masses, *sums_T[2 : 2 + len(extra_T)])

    def _moment(self, student: ShardSoftmax, teacher: ShardSoftmax) -> torch.Tensor:
        return kl_moment(student, teacher) if self.kind == "reverse_kl" else kl_moment(teacher, student)

    def _closed_form(self, moment_T: torch.Tensor, student_mass_T: torch.Tensor, teacher_mass_T: torch.Tensor) -> ChunkDivergence:
        """Return the divergence from sums of exponentials. The slopes are p log(p/q), which sum to the value, or -q, which sum to -1."""
        if self.kind == "reverse_kl":
            value_T = kl_from_moment(moment_T, student_mass_T, teacher_mass_T)
            return ChunkDivergence(value_T, value_T)
        value_T = kl_from_moment(moment_T, teacher_mass_T, student_mass_T)
        return ChunkDivergence(value_T, torch.full_like(value_T, -1))

    def _summed(self, student: ShardSoftmax, teacher: ShardSoftmax, shard: VocabShard) -> ChunkDivergence:
        """Return the divergence by summing its entries over the vocabulary: one more collective."""
        summand_TW, slope_TW = self._terms(student, teacher)
        if self.pointwise_clip is not None:
            summand_TW = summand_TW.clamp(max=self.pointwise_clip)
        value_T, correction_T = shard.sum(summand_TW.sum(-1), slope_TW.sum(-1))
        return ChunkDivergence(value_T, correction_T, slope_TW)

    def gradient(self, student: ShardSoftmax, teacher: ShardSoftmax, chunk: ChunkDivergence) -> torch.Tensor:
        """Return dL/dz of this rank's columns, with z the student's logits after the temperature, from normalised probabilities: no collective."""
        slope_TW = chunk.slope_TW
        if slope_TW is None:
            only_teacher = self.kind == "forward_kl" and self.has_closed_form
            slope_TW = teacher.prob_TW.neg() if only_teacher else self._terms(student, teacher)[1]
        return slope_TW.addcmul_(student.prob_TW, chunk.correction_T[:, None], value=-1)

    def _terms(self, student: ShardSoftmax, teacher: ShardSoftmax) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summand, not yet clipped, and the slope, 0 where the summand is clipped, of every vocabulary entry."""
        if self.kind == "reverse_kl":
            summand_TW = _xlog(student.prob_TW, student.logp_TW - teacher.logp_TW)
            # d(p log(p/q))/dp = log(p/q) + 1. Without a clip the 1 cancels against the correction, and leaving it out keeps the precision
            # of a small divergence; over the unclipped entries alone it does not cancel.
            slope_TW = summand_TW if self.pointwise_clip is None else summand_TW + student.prob_TW
        elif self.kind == "forward_kl":
            summand_TW, slope_TW = _xlog(teacher.prob_TW, teacher.logp_TW - student.logp_TW), teacher.prob_TW.neg()
        else:
            summand_TW, slope_TW = _jsd_terms(student, teacher, self.beta)
        if self.pointwise_clip is not None:
            slope_TW = slope_TW.masked_fill(summand_TW > self.pointwise_clip, 0)
        return summand_TW, slope_TW


def _jsd_terms(student: ShardSoftmax, teacher: ShardSoftmax, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return beta q log(q/m) + (1 - beta) p log(p/m) and its slope (1 - beta) p log(p/m) of every entry.

    With d = log q - log p: log m = max(log p, log q) + r, r = log(1 + w expm1(-|d|)), where w weighs the smaller of the two.
    This never overflows, and it is exactly 0 where p = q.
    """
    gap_TW = teacher.logp_TW - student.logp_TW
    weight_TW = (gap_TW > 0).to(gap_TW.dtype).mul_(1 - 2 * beta).add_(beta)
    mixture_TW = gap_TW.abs().neg_().expm1_().mul_(weight_TW).log1p_()
    slope_TW = _xlog(student.prob_TW, -(gap_TW.clamp(min=0) + mixture_TW)).mul_(1 - beta)
    teacher_TW = _xlog(teacher.prob_TW, gap_TW.clamp(max=0).sub_(mixture_TW))
    return teacher_TW.mul_(beta).add_(slope_TW), slope_TW


def _xlog(prob_TW: torch.Tensor, log_TW: torch.Tensor) -> torch.Tensor:
    """Return prob * log with 0 * inf = 0, in the storage of `log_TW`."""
    return log_TW.mul_(prob_TW).masked_fill_(prob_TW == 0, 0)


def kl_moment(left: ShardSoftmax, right: ShardSoftmax) -> torch.Tensor:
    """Return this rank's part of sum_v e^{u_l} (u_l - u_r), with u the shifted logits. Exactly 0 for equal logits."""
    return weighted_sum(left.prob_TW, left.logp_TW - right.logp_TW)


def kl_from_moment(moment_T: torch.Tensor, left_mass_T: torch.Tensor, right_mass_T: torch.Tensor) -> torch.Tensor:
    """Return KL(left||right) = moment / a_l - log a_l + log a_r; 0 where a mass is infinite, the mark of a row masked in either model."""
    value_T = moment_T / left_mass_T - left_mass_T.log() + right_mass_T.log()
    return value_T.masked_fill_(torch.isinf(left_mass_T), 0)


def live_masses(student_mass_T: torch.Tensor, teacher_mass_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both masses, with infinity on the rows that are fully masked in either model: their probabilities, loss and gradient all become 0."""
    dead_T = (student_mass_T == 0) | (teacher_mass_T == 0)
    return student_mass_T.masked_fill(dead_T, math.inf), teacher_mass_T.masked_fill(dead_T, math.inf)


def shift_to_max_(student: ShardSoftmax, teacher: ShardSoftmax, shard: VocabShard) -> tuple[torch.Tensor, ...]:
    """Subtract from both models' logits their maxima over the whole vocabulary, which are returned: one collective."""
    maxima = shard.max(student.local_max(), teacher.local_max())
    student.shift_(maxima[0])
    teacher.shift_(maxima[1])
    return maxima


class _VocabParallelDivergence(torch.autograd.Function):
    """Two collectives per chunk in the forward (MAX, SUM), one more SUM for jsd or a clip; none in the backward.

    Saved: both models' logits as given and five numbers per token. The returned value is replicated, so every rank's gradient is the true one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_logits_TW: torch.Tensor,
        teacher_logits_TW: torch.Tensor,
        divergence: Divergence,
        shard: VocabShard,
        temperature: float,
        chunk_tokens: int | None,
    ) -> torch.Tensor:
        num_tokens, num_columns = student_logits_TW.shape
        saved_5T = student_logits_TW.new_empty((5, num_tokens), dtype=compute_dtype(student_logits_TW))
        divergence_T = torch.empty_like(saved_5T[0])
        for rows in token_chunks(num_tokens, num_columns, student_logits_TW.device, chunk_tokens):
            student = _chunk_softmax(student_logits_TW[rows], shard, temperature)
            teacher = _chunk_softmax(teacher_logits_TW[rows], shard, temperature)
            maxima = shift_to_max_(student, teacher, shard)
            chunk, masses = divergence.evaluate_(student, teacher, shard)
            divergence_T[rows] = chunk.value_T
            saved_5T[:, rows] = torch.stack([*maxima, *masses, chunk.correction_T])
        ctx.save_for_backward(student_logits_TW, teacher_logits_TW, saved_5T)
        ctx.divergence, ctx.shard, ctx.temperature, ctx.chunk_tokens = divergence, shard, temperature, chunk_tokens
        return divergence_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student_logits_TW, teacher_logits_TW, saved_5T = ctx.saved_tensors
        grad_TW = torch.zeros_like(student_logits_TW)
        num_tokens, num_columns = student_logits_TW.shape
        for rows in token_chunks(num_tokens, num_columns, student_logits_TW.device, ctx.chunk_tokens):
            student_max_T, teacher_max_T, student_mass_T, teacher_mass_T, correction_T = saved_5T[:, rows]
            student = _chunk_softmax(student_logits_TW[rows], ctx.shard, ctx.temperature)
            student.shift_(student_max_T)
            student.normalise_(student_mass_T)
            teacher = _chunk_softmax(teacher_logits_TW[rows], ctx.shard, ctx.temperature)
            teacher.shift_(teacher_max_T)
            teacher.normalise_(teacher_mass_T)
            # Slopes and probabilities are local to the slice and the correction is already a global sum: nothing is sent.
            chunk_TW = ctx.divergence.gradient(student, teacher, ChunkDivergence(correction_T, correction_T))
            grad_TW[rows, : ctx.shard.width] = chunk_TW.mul_((grad_T[rows] / ctx.temperature)[:, None])
        return grad_TW, None, None, None, None, None


def _chunk_softmax(logits_TW: torch.Tensor, shard: VocabShard, temperature: float) -> ShardSoftmax:
    """Return the softmax, not started, of the real columns of some rows: on a copy, in the arithmetic's dtype."""
    return ShardSoftmax(logits_TW[:, : shard.width].to(compute_dtype(logits_TW), copy=True).div_(temperature))


def require_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")


def vocab_parallel_divergence(
    student_logits_TW: torch.Tensor,
    teacher_logits_TW: torch.Tensor,
    *,
    kind: str,
    tp_group: dist.ProcessGroup | None = None,
    beta: float = 0.5,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    pointwise_clip: float | None = None,
    shard_start: int | None = None,
) -> torch.Tensor:
    """Return the divergence of every token in nats, [T], in fp32; differentiable once, in the student's logits.

    The logits are [T, W]: this rank's slice of the vocabulary, or all of it with `tp_group=None`. Ids from `vocab_size` on are padding:
    masked in both models, with a gradient of exactly 0. `kind`, `beta` and `pointwise_clip` are those of `Divergence`; `temperature` divides
    both models' logits, and no factor of its square is applied. The result is the same on all ranks of the group, each of which must run the
    backward on it. A row that is fully masked in either model has divergence 0 and gradient 0.
    Shards of uneven width need `shard_start`, the global id of the first column, on every rank.
    Raises ValueError for arguments that disagree, an unknown kind, a beta outside [0, 1] or a temperature that is not positive.
    """
    divergence = Divergence(kind=kind, beta=beta, pointwise_clip=pointwise_clip)
    require_temperature(temperature)
    for what, student, teacher in (
        ("shapes", tuple(student_logits_TW.shape), tuple(teacher_logits_TW.shape)),
        ("dtypes", student_logits_TW.dtype, teacher_logits_TW.dtype),
        ("devices", student_logits_TW.device, teacher_logits_TW.device),
    ):
        require_same(what, "student_logits_TW", student, "teacher_logits_TW", teacher)
    if student_logits_TW.dim() != 2:
        raise ValueError(f"student_logits_TW must be [tokens, columns], not of shape {tuple(student_logits_TW.shape)}")
    shard = vocab_shard(student_logits_TW.size(1), tp_group=tp_group, vocab_size=vocab_size, start=shard_start)
    # All ranks must cut the tokens alike, so a chunk may follow from W only where W is the same everywhere.
    chunk_tokens = None if shard_start is None else CHUNK_MIN_TOKENS
    return _VocabParallelDivergence.apply(student_logits_TW, teacher_logits_TW, divergence, shard, temperature, chunk_tokens)
