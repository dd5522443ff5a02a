"""What the fused head computes on one chunk of logits: a divergence from a teacher, a cross entropy, or statistics without a gradient.

Shapes: T tokens, N tokens of one chunk, V vocabulary, W = this rank's slice of V, H / G = student / teacher hidden size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch

from opd_megatron.losses import triton_divergence
from opd_megatron.losses.class_divergence import ClassDivergence
from opd_megatron.losses.full_divergence import (
    Divergence,
    Evaluated,
    RowNorms,
    gathered_norms,
    kl_from_moment,
    kl_moment,
    live_masses,
    shift_to_max_,
)
from opd_megatron.losses.head_products import head_logits
from opd_megatron.losses.logit_scaling import LogitScaling
from opd_megatron.losses.vocab_parallel import Scratch, ShardSoftmax, VocabShard, entropy, local_ids, picked_logp, token_chunks


class ChunkLoss(NamedTuple):
    """Loss of the rows of one chunk, their entropy, the log-probability of the picked ids, the student logits' scaled gradient, and what else is told."""

    value_N: torch.Tensor
    entropy_N: torch.Tensor
    picked_logp_N: torch.Tensor | None
    grad_NW: torch.Tensor | None
    observed_N: tuple[torch.Tensor, ...] = ()


class ChunkObjective(Protocol):
    """A loss over one chunk of student logits, which it may overwrite. `grad_NW` is with respect to these logits, times `scale_N`; None without it.

    The logits are those after soft-cap and temperature. The caller, which may overwrite `grad_NW`, brings the gradient to the LM head's product.
    """

    @property
    def observes(self) -> tuple[str, ...]:
        """What `observed_N` holds, by name."""
        ...

    def chunks(self, num_tokens: int, num_columns: int, device: torch.device, chunk_tokens: int | None) -> Iterable[slice]:
        """Return the rows that are computed together; all ranks of a group cut alike."""
        ...

    def __call__(self, student: ShardSoftmax, rows: slice, shard: VocabShard, scale_N: torch.Tensor | None) -> ChunkLoss: ...


@dataclass(frozen=True)
class DivergenceObjective:
    """Divergence from a teacher given by its hidden states and its head."""

    teacher_hidden_TG: torch.Tensor
    teacher_head_WG: torch.Tensor
    divergence: Divergence | ClassDivergence
    teacher_scaling: LogitScaling
    sampled_ids_T: torch.Tensor | None

    @property
    def observes(self) -> tuple[str, ...]:
        return ("clipped",) if self.divergence.pointwise_clip is not None else ()

    chunks = staticmethod(token_chunks)

    def __call__(self, student: ShardSoftmax, rows: slice, shard: VocabShard, scale_N: torch.Tensor | None) -> ChunkLoss:
        dtype = student.logp_TW.dtype
        teacher = chunk_softmax("teacher", self.teacher_hidden_TG[rows], self.teacher_head_WG, shard, self.teacher_scaling, dtype, student.scratch)
        if isinstance(self.divergence, ClassDivergence):
            return self._over_classes(self.divergence, student, teacher, rows, shard, scale_N)
        if triton_divergence.usable_for(student.logp_TW):
            return self._by_kernels(self.divergence, student, teacher, rows, shard, scale_N)
        evaluated = self.divergence.evaluate_(student, teacher, shard, lambda moved_N, mass_N: self._riders(student, rows, shard, moved_N, mass_N))
        grad_NW = None if scale_N is None else self.divergence.gradient(student, teacher, evaluated.chunk).mul_(scale_N[:, None])
        return _chunk_loss(evaluated, grad_NW)

    def _riders(self, student: ShardSoftmax, rows: slice, shard: VocabShard, moved_N: torch.Tensor, mass_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return this rank's parts of the entropy's moment, and of the sampled ids' logits with a count of one, relative to the whole vocabulary's maximum."""
        moment_N = (student.entropy_moment() + moved_N * mass_N) * moved_N.exp()
        return moment_N, *self._picked(student, rows, shard, moved_N)

    def _picked(self, student: ShardSoftmax, rows: slice, shard: VocabShard, moved_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.sampled_ids_T is None:
            return ()
        logit_N, owned_N = student.owned_logit(self.sampled_ids_T[rows], shard)
        return (logit_N + moved_N).masked_fill_(owned_N == 0, 0), owned_N

    def _by_kernels(
        self, divergence: Divergence, student: ShardSoftmax, teacher: ShardSoftmax, rows: slice, shard: VocabShard, scale_N: torch.Tensor | None
    ) -> ChunkLoss:
        """Do the same in two or three passes over the logits, with the same collectives."""
        logits = (student.logp_TW, teacher.logp_TW)
        own = triton_divergence.row_statistics(*logits)
        if divergence.has_closed_form:
            maxima = shard.max(own.student_max_N, own.teacher_max_N)
            own = own.relative_to(*maxima)
            moment_N = own.reverse_moment_N if divergence.kind == "reverse_kl" else own.forward_moment_N
            picked = self._picked(student, rows, shard, -own.student_max_N)
            sums = shard.sum(moment_N, own.student_mass_N, own.teacher_mass_N, own.entropy_moment_N, *picked)
            masses = live_masses(sums[1], sums[2])
            evaluated = Evaluated(divergence.closed_form(sums[0], *masses), RowNorms(maxima[0], maxima[1], *masses), sums[3:], sums[1])
        else:
            norms, student_mass_N = gathered_norms(*own[:4], shard)
            own = own.relative_to(norms.student_max_T, norms.teacher_max_T)
            terms = triton_divergence.term_sums(divergence, *logits, norms)
            sums = shard.sum(*terms, own.entropy_moment_N, *self._picked(student, rows, shard, -own.student_max_N))
            chunk, riders_N = divergence.from_sums(sums)
            evaluated = Evaluated(chunk, norms, riders_N, student_mass_N)
        correction_N = evaluated.chunk.correction_T
        grad_NW = None if scale_N is None else triton_divergence.gradient_(divergence, *logits, evaluated.norms, correction_N, scale_N)
        return _chunk_loss(evaluated, grad_NW)

    def _over_classes(
        self, divergence: ClassDivergence, student: ShardSoftmax, teacher: ShardSoftmax, rows: slice, shard: VocabShard, scale_N: torch.Tensor | None
    ) -> ChunkLoss:
        sampled_N = None if self.sampled_ids_T is None else self.sampled_ids_T[rows]
        ids_NK = divergence.pick(student, teacher, shard, sampled_N)
        picked = () if sampled_N is None else student.owned_logit(sampled_N, shard)
        chunk, picked_N = divergence.evaluate_(student, teacher, ids_NK, shard, *picked)
        logp_N = None
        if picked_N:
            logp_N = (picked_N[0] - chunk.student_lse_N).masked_fill_(chunk.student_lse_N == -math.inf, -math.inf).masked_fill_(picked_N[1] == 0, math.nan)
        gradient_NW = None if scale_N is None else divergence.gradient(student.prob_TW, chunk, shard).mul_(scale_N[:, None])
        return ChunkLoss(chunk.value_N, chunk.student_entropy_N, logp_N, gradient_NW, _counted(chunk.clipped_N))


def _chunk_loss(evaluated: Evaluated, grad_NW: torch.Tensor | None) -> ChunkLoss:
    """Return the results of one chunk from the sums that rode along with its divergence."""
    moment_N, *picked_N = evaluated.riders_T
    mass_N = evaluated.student_mass_T
    logp_N = picked_logp(picked_N[0], picked_N[1], mass_N) if picked_N else None
    return ChunkLoss(evaluated.chunk.value_T, entropy(moment_N, mass_N), logp_N, grad_NW, _counted(evaluated.chunk.clipped_T))


def _counted(clipped_N: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if clipped_N is None else (clipped_N,)


@dataclass(frozen=True)
class CrossEntropyObjective:
    """-log p of a given id."""

    target_ids_T: torch.Tensor

    observes: ClassVar[tuple[str, ...]] = ()
    chunks = staticmethod(token_chunks)

    def __call__(self, student: ShardSoftmax, rows: slice, shard: VocabShard, scale_N: torch.Tensor | None) -> ChunkLoss:
        target_ids_N = self.target_ids_T[rows]
        student.shift_(*shard.max(student.local_max()))
        mass_N, moment_N, logit_N, owners_N = shard.sum(student.mass(), student.entropy_moment(), *student.owned_logit(target_ids_N, shard))
        logp_N = picked_logp(logit_N, owners_N, mass_N)
        grad_NW = None if scale_N is None else self._gradient(student, mass_N, target_ids_N, shard).mul_(scale_N[:, None])
        return ChunkLoss(-logp_N, entropy(moment_N, mass_N), logp_N, grad_NW)

    @staticmethod
    def _gradient(student: ShardSoftmax, mass_N: torch.Tensor, target_ids_N: torch.Tensor, shard: VocabShard) -> torch.Tensor:
        """Return p minus the one-hot target, of this rank's columns."""
        grad_NW = student.prob_TW.div_(mass_N[:, None])
        if shard.width:
            local_N, owned_N = local_ids(target_ids_N, shard)
            grad_NW.scatter_add_(1, local_N[:, None], -owned_N.to(grad_NW.dtype)[:, None])
        return grad_NW


def chunk_statistics(student: ShardSoftmax, teacher: ShardSoftmax, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return entropy, reverse and forward KL of one chunk."""
    if triton_divergence.usable_for(student.logp_TW):
        local = triton_divergence.row_statistics(student.logp_TW, teacher.logp_TW)
        own = local.relative_to(*shard.max(local.student_max_N, local.teacher_max_N))[2:]
        return _statistics_from(*shard.sum(*own))
    shift_to_max_(student, teacher, shard)
    moments = (student.entropy_moment(), kl_moment(student, teacher), kl_moment(teacher, student))
    return _statistics_from(*shard.sum(student.mass(), teacher.mass(), *moments))


def _statistics_from(
    student_mass_N: torch.Tensor, teacher_mass_N: torch.Tensor, entropy_N: torch.Tensor, reverse_N: torch.Tensor, forward_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return entropy, reverse and forward KL from masses and moments over the whole vocabulary."""
    masses = live_masses(student_mass_N, teacher_mass_N)
    return entropy(entropy_N, student_mass_N), kl_from_moment(reverse_N, *masses), kl_from_moment(forward_N, *masses[::-1])


def chunk_softmax(
    model: str,
    hidden_NH: torch.Tensor,
    head_WH: torch.Tensor,
    shard: VocabShard,
    scaling: LogitScaling,
    dtype: torch.dtype,
    scratch: Scratch,
    *,
    keep_damping: bool = False,
) -> ShardSoftmax:
    """Return the softmax, not started, of the real columns of one chunk's logits, in memory that both models' chunks share.

    With `keep_damping` and a soft-cap it has its `damping_TW`, one more tensor of the logits' size.
    """
    room_NW = scratch.take(f"logits {model}", hidden_NH.size(0), shard.width, dtype, hidden_NH.device)
    logits_NW = head_logits(hidden_NH, head_WH[: shard.width], dtype, room_NW)
    damping_NW = scratch.like(f"damping {model}", logits_NW) if keep_damping and scaling.softcap is not None else None
    return ShardSoftmax(scaling.apply_(logits_NW, damping_NW), scratch, model, damping_NW)
