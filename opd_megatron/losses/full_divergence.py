"""Divergences over the whole vocabulary, one chunk of tokens at a time, with the vocabulary split across tensor-parallel ranks.

Shapes: T tokens, V vocabulary, W = this rank's slice of V. p is the student's distribution, q the teacher's, both at the loss temperature.

    reverse_kl  KL(p||q) = sum_v p (log p - log q)         forward_kl  KL(q||p) = sum_v q (log q - log p)
    jsd         beta KL(q||m) + (1 - beta) KL(p||m),  m = beta q + (1 - beta) p
    skew_forward  KL(q||m),  m = alpha q + (1 - alpha) p   skew_reverse  KL(p||m),  m = (1 - alpha) q + alpha p        (arXiv 2402.03898)

beta = 0 and beta = 1 select forward and reverse KL, as in GKD's code. They are not limits of the formula, which goes to 0 at both ends,
so the scale of the loss jumps there. alpha is the share in the mixture of the distribution that comes first in the KL; at 0 the skewed
divergences are forward and reverse KL. The kinds that look at few tokens, top-k and sampled ones, are in `class_divergence`.

Every gradient here has one form. With the slope s_v = p_v dL/dp_v, the softmax Jacobian gives dL/dz_v = s_v - p_v sum_u s_u.
The sum over the whole vocabulary (the "correction") is known after the forward, so no backward communicates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from opd_megatron.losses.vocab_parallel import ShardSoftmax, VocabShard, merged_softmax, moved_maximum, weighted_sum

FULL_KINDS = ("reverse_kl", "forward_kl", "jsd", "skew_forward", "skew_reverse")
DEFAULT_ALPHA = 0.1


class ChunkDivergence(NamedTuple):
    """Divergence of the rows of one chunk and what its gradient needs. `slope_TW` is kept only where the forward had to build it.

    `clipped_T` is how many entries' summands exceed the clip, over the whole vocabulary; None without a clip.
    """

    value_T: torch.Tensor
    correction_T: torch.Tensor
    slope_TW: torch.Tensor | None = None
    clipped_T: torch.Tensor | None = None


class RowNorms(NamedTuple):
    """What turns a logit into a probability over the whole vocabulary: maximum and mass of each row, of both models."""

    student_max_T: torch.Tensor
    teacher_max_T: torch.Tensor
    student_mass_T: torch.Tensor
    teacher_mass_T: torch.Tensor


class Evaluated(NamedTuple):
    """The divergence of a chunk; the norms of its rows; the sums over all ranks of the caller's riders; and the student's mass, 0 in a fully masked row."""

    chunk: ChunkDivergence
    norms: RowNorms
    riders_T: tuple[torch.Tensor, ...]
    student_mass_T: torch.Tensor


# Sums over this rank's columns that join a collective, from the maximum of its slice minus that over the whole vocabulary, and its mass.
Riders = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def no_riders(_moved: torch.Tensor, _mass: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ()


def require_clip(pointwise_clip: float | None) -> None:
    """Raise ValueError unless the clip is absent or positive."""
    if pointwise_clip is not None and not pointwise_clip > 0:
        raise ValueError(f"pointwise_clip={pointwise_clip} must be positive, or None for none")


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Which divergence; `beta` is the teacher's weight in the mixture of jsd, `alpha` the skew, by default 0.1.

    Raises ValueError for an unknown kind, a beta outside [0, 1], an alpha outside [0, 1) or for a kind that has none.

    With `pointwise_clip` = c, each vocabulary entry's summand l_v counts as min(l_v, c), and clipped entries have no gradient (OPSD, arXiv 2601.18734).
    A clipped divergence can be negative.
    """

    kind: str
    beta: float = 0.5
    alpha: float | None = None
    pointwise_clip: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in FULL_KINDS:
            raise ValueError(f"kind={self.kind!r} is not known; use one of {', '.join(FULL_KINDS)}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} must be in [0, 1]")
        if self.kind == "jsd" and self.beta in (0, 1):
            object.__setattr__(self, "kind", "forward_kl" if self.beta == 0 else "reverse_kl")
        require_clip(self.pointwise_clip)
        if self.alpha is not None and not self.kind.startswith("skew"):
            raise ValueError(f"alpha={self.alpha} belongs to skew_forward and skew_reverse, not to kind={self.kind!r}")
        if self.kind.startswith("skew"):
            alpha = DEFAULT_ALPHA if self.alpha is None else self.alpha
            if not 0 <= alpha < 1:
                raise ValueError(f"alpha={alpha} must be in [0, 1): at 1 the divergence is 0 whatever the student does")
            object.__setattr__(self, "alpha", alpha)
            if alpha == 0:
                object.__setattr__(self, "kind", "forward_kl" if self.kind == "skew_forward" else "reverse_kl")

    @property
    def has_closed_form(self) -> bool:
        """Whether the value follows from sums of unnormalised exponentials, which saves a pass over the vocabulary."""
        return self.kind in ("reverse_kl", "forward_kl") and self.pointwise_clip is None

    def evaluate_(self, student: ShardSoftmax, teacher: ShardSoftmax, shard: VocabShard, riders: Riders = no_riders) -> Evaluated:
        """Return the divergence from raw logits, and leave normalised probabilities. Two collectives: the second is the SUM that `riders` join.

        The first is a MAX where the value has a closed form. Where it has none, the sum runs over normalised probabilities, and each rank's
        maximum and mass are gathered instead. `riders` is called with the student's logits minus a maximum, and is given that maximum minus the one over
        the whole vocabulary, and their mass.
        """
        if self.has_closed_form:
            maxima = shift_to_max_(student, teacher, shard)
            own_T = (self._moment(student, teacher), student.mass(), teacher.mass())
            moment_T, student_mass_T, teacher_mass_T, *riders_T = shard.sum(*own_T, *riders(torch.zeros_like(maxima[0]), own_T[1]))
            masses = live_masses(student_mass_T, teacher_mass_T)
            student.normalise_(masses[0])
            teacher.normalise_(masses[1])
            return Evaluated(self.closed_form(moment_T, *masses), RowNorms(maxima[0], maxima[1], *masses), tuple(riders_T), student_mass_T)
        maxima = (student.local_max(), teacher.local_max())
        student.shift_(maxima[0])
        teacher.shift_(maxima[1])
        own_mass_T = student.mass()
        norms, student_mass_T = gathered_norms(*maxima, own_mass_T, teacher.mass(), shard)
        moved_T = moved_maximum(maxima[0], norms.student_max_T)
        own_riders_T = riders(moved_T, own_mass_T)
        student.normalise_(norms.student_mass_T, moved_T)
        teacher.normalise_(norms.teacher_mass_T, moved_maximum(maxima[1], norms.teacher_max_T))
        summand_TW, slope_TW, clipped_TW = self._terms(student, teacher)
        own_clipped_T: tuple[torch.Tensor, ...] = ()
        if clipped_TW is not None:
            summand_TW = summand_TW.clamp(max=self.pointwise_clip)
            # Counted as integers, at half the time on CPU.
            own_clipped_T = (clipped_TW.sum(-1, dtype=torch.int32).to(summand_TW.dtype),)
        sums = shard.sum(summand_TW.sum(-1), slope_TW.sum(-1), *own_clipped_T, *own_riders_T)
        chunk, others_T = self.from_sums(sums, slope_TW)
        return Evaluated(chunk, norms, others_T, student_mass_T)

    def from_sums(self, sums_T: tuple[torch.Tensor, ...], slope_TW: torch.Tensor | None = None) -> tuple[ChunkDivergence, tuple[torch.Tensor, ...]]:
        """Return the divergence from the sums of summands and slopes, with a clip the number of clipped entries, and the riders that follow them."""
        value_T, correction_T, *others_T = sums_T
        clipped_T = None if self.pointwise_clip is None else others_T.pop(0)
        return ChunkDivergence(value_T, correction_T, slope_TW, clipped_T), tuple(others_T)

    def _moment(self, student: ShardSoftmax, teacher: ShardSoftmax) -> torch.Tensor:
        return kl_moment(student, teacher) if self.kind == "reverse_kl" else kl_moment(teacher, student)

    def closed_form(self, moment_T: torch.Tensor, student_mass_T: torch.Tensor, teacher_mass_T: torch.Tensor) -> ChunkDivergence:
        """Return the divergence from sums of exponentials. The slopes are p log(p/q), which sum to the value, or -q, which sum to -1."""
        if self.kind == "reverse_kl":
            value_T = kl_from_moment(moment_T, student_mass_T, teacher_mass_T)
            return ChunkDivergence(value_T, value_T)
        value_T = kl_from_moment(moment_T, teacher_mass_T, student_mass_T)
        return ChunkDivergence(value_T, torch.full_like(value_T, -1))

    def gradient(self, student: ShardSoftmax, teacher: ShardSoftmax, chunk: ChunkDivergence) -> torch.Tensor:
        """Return dL/dz of this rank's columns, with z the student's logits after the temperature, from normalised probabilities: no collective."""
        slope_TW = chunk.slope_TW
        if slope_TW is None:
            only_teacher = self.kind == "forward_kl" and self.has_closed_form
            slope_TW = torch.neg(teacher.prob_TW, out=student.product()) if only_teacher else self._terms(student, teacher)[1]
        return slope_TW.addcmul_(student.prob_TW, chunk.correction_T[:, None], value=-1)

    def _terms(self, student: ShardSoftmax, teacher: ShardSoftmax) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return of every vocabulary entry the summand, not yet clipped, the slope, 0 where the summand is clipped, and with a clip whether it is."""
        # dL/dp = a + c with a constant c has the gradient of dL/dp = a: over all entries, c cancels against the correction. Leaving it out
        # keeps the precision of a small divergence. Over the unclipped entries alone it does not cancel.
        constant = 0.0
        if self.kind == "reverse_kl":
            gap_TW = torch.sub(student.logp_TW, teacher.logp_TW, out=student.product())
            summand_TW, constant = _xlog(student.prob_TW, gap_TW), 1.0
            slope_TW = summand_TW
        elif self.kind == "forward_kl":
            gap_TW = torch.sub(teacher.logp_TW, student.logp_TW, out=student.product())
            summand_TW, slope_TW = _xlog(teacher.prob_TW, gap_TW), teacher.prob_TW.neg()
        elif self.kind == "jsd":
            summand_TW, slope_TW = _jsd_terms(student, teacher, self.beta)
        else:
            assert self.alpha is not None
            forward = self.kind == "skew_forward"
            summand_TW, slope_TW = (_skew_forward_terms if forward else _skew_reverse_terms)(student, teacher, self.alpha)
            constant = self.alpha - 1 if forward else 1 - self.alpha
        if self.pointwise_clip is None:
            return summand_TW, slope_TW, None
        clipped_TW = summand_TW > self.pointwise_clip
        return summand_TW, slope_TW.add(student.prob_TW, alpha=constant).masked_fill_(clipped_TW, 0), clipped_TW


def _mixture(gap_TW: torch.Tensor, teacher_share: float, student: ShardSoftmax) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return r, expm1(-|d|) and 1[d > 0], where d = log q - log p and the mixture is log m = max(log p, log q) + r.

    r = log(1 + w expm1(-|d|)), where w is the share of the smaller of the two. This never overflows, and it is exactly 0 where p = q.
    """
    gap_exp_TW = torch.abs(gap_TW, out=student.term("gap_exp")).neg_().expm1_()
    # As (d > 0).to(dtype), at a third of its time on CPU. Where |d| is so small that this is neither 0 nor 1, expm1(-|d|) is 0.
    ahead_TW = torch.mul(gap_TW, 1e38, out=student.term("ahead")).clamp_(0, 1)
    mixture_TW = torch.mul(ahead_TW, 1 - 2 * teacher_share, out=student.term("mixture")).add_(teacher_share)
    return mixture_TW.mul_(gap_exp_TW).log1p_(), gap_exp_TW, ahead_TW


def _jsd_terms(student: ShardSoftmax, teacher: ShardSoftmax, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return beta q log(q/m) + (1 - beta) p log(p/m) and its slope (1 - beta) p log(p/m) of every entry."""
    gap_TW = torch.sub(teacher.logp_TW, student.logp_TW, out=student.product())
    mixture_TW, _, _ = _mixture(gap_TW, beta, student)
    slope_TW = torch.clamp(gap_TW, min=0, out=student.term("slope")).add_(mixture_TW)
    slope_TW = _xlog(student.prob_TW, slope_TW).mul_(beta - 1)
    teacher_TW = _xlog(teacher.prob_TW, gap_TW.clamp_(max=0).sub_(mixture_TW))
    return teacher_TW.mul_(beta).add_(slope_TW), slope_TW


def _skew_forward_terms(student: ShardSoftmax, teacher: ShardSoftmax, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q log(q/m) and the slope (1 - alpha)^2 p (p - q)/m, that is -(1 - alpha) p q/m without its constant, m = alpha q + (1 - alpha) p."""
    gap_TW = torch.sub(teacher.logp_TW, student.logp_TW, out=student.product())
    mixture_TW, gap_exp_TW, ahead_TW = _mixture(gap_TW, alpha, student)
    slope_TW = _xlog(student.prob_TW, _student_excess(gap_exp_TW, ahead_TW, mixture_TW)).mul_((1 - alpha) ** 2)
    return _xlog(teacher.prob_TW, gap_TW.clamp_(max=0).sub_(mixture_TW)), slope_TW


def _skew_reverse_terms(student: ShardSoftmax, teacher: ShardSoftmax, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p log(p/m) and the slope p (log(p/m) - alpha (1 - alpha) (p - q)/m), again without its constant, m = (1 - alpha) q + alpha p."""
    gap_TW = torch.sub(teacher.logp_TW, student.logp_TW, out=student.product())
    mixture_TW, gap_exp_TW, ahead_TW = _mixture(gap_TW, 1 - alpha, student)
    excess_TW = _xlog(student.prob_TW, _student_excess(gap_exp_TW, ahead_TW, mixture_TW))
    summand_TW = _xlog(student.prob_TW, gap_TW.clamp_(min=0).add_(mixture_TW).neg_())
    return summand_TW, excess_TW.mul_(-alpha * (1 - alpha)).add_(summand_TW)


def _student_excess(gap_exp_TW: torch.Tensor, ahead_TW: torch.Tensor, mixture_TW: torch.Tensor) -> torch.Tensor:
    """Return (p - q)/m in the storage of `ahead_TW`: with e = expm1(-|d|) it is e/e^r where the teacher is ahead and -e/e^r elsewhere."""
    return ahead_TW.mul_(2).sub_(1).mul_(gap_exp_TW).div_(torch.exp(mixture_TW, out=gap_exp_TW))


def _xlog(prob_TW: torch.Tensor, log_TW: torch.Tensor) -> torch.Tensor:
    """Return prob * log with 0 * inf = 0, in the storage of `log_TW`."""
    log_TW.mul_(prob_TW)
    # Masking costs several times the product. On CPU a look at the sum tells whether there is anything to mask.
    if log_TW.is_cuda or not math.isfinite(log_TW.sum()):
        log_TW.masked_fill_(prob_TW == 0, 0)
    return log_TW


def kl_moment(left: ShardSoftmax, right: ShardSoftmax) -> torch.Tensor:
    """Return this rank's part of sum_v e^{u_l} (u_l - u_r), with u the shifted logits. Exactly 0 for equal logits."""
    gap_TW = torch.sub(left.logp_TW, right.logp_TW, out=left.product())
    return weighted_sum(left.prob_TW, gap_TW, gap_TW)


def kl_from_moment(moment_T: torch.Tensor, left_mass_T: torch.Tensor, right_mass_T: torch.Tensor) -> torch.Tensor:
    """Return KL(left||right) = moment / a_l - log a_l + log a_r; 0 where a mass is infinite, the mark of a row masked in either model."""
    value_T = moment_T / left_mass_T - left_mass_T.log() + right_mass_T.log()
    return value_T.masked_fill_(torch.isinf(left_mass_T), 0)


def live_masses(student_mass_T: torch.Tensor, teacher_mass_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both masses, with infinity on the rows that are fully masked in either model: their probabilities, loss and gradient all become 0."""
    dead_T = (student_mass_T == 0) | (teacher_mass_T == 0)
    return student_mass_T.masked_fill(dead_T, math.inf), teacher_mass_T.masked_fill(dead_T, math.inf)


def gathered_norms(
    student_max_T: torch.Tensor, teacher_max_T: torch.Tensor, student_mass_T: torch.Tensor, teacher_mass_T: torch.Tensor, shard: VocabShard
) -> tuple[RowNorms, torch.Tensor]:
    """Return the norms over the whole vocabulary from this rank's maxima and masses relative to them, and the student's mass: one collective."""
    student_max_RT, teacher_max_RT, student_mass_RT, teacher_mass_RT = shard.gather(student_max_T, teacher_max_T, student_mass_T, teacher_mass_T)
    student_max_T, student_mass_T = merged_softmax(student_max_RT, student_mass_RT)
    teacher_max_T, teacher_mass_T = merged_softmax(teacher_max_RT, teacher_mass_RT)
    return RowNorms(student_max_T, teacher_max_T, *live_masses(student_mass_T, teacher_mass_T)), student_mass_T


def shift_to_max_(student: ShardSoftmax, teacher: ShardSoftmax, shard: VocabShard) -> tuple[torch.Tensor, ...]:
    """Subtract from both models' logits their maxima over the whole vocabulary, which are returned: one collective."""
    maxima = shard.max(student.local_max(), teacher.local_max())
    student.shift_(maxima[0])
    teacher.shift_(maxima[1])
    return maxima
