"""Divergences that look at few tokens: top-k and sampled ones, with the vocabulary split across tensor-parallel ranks.

Shapes: N tokens of one chunk, W = this rank's slice of the vocabulary, K picked ids per token, C = the K ids, then the rest of the vocabulary
as one class where the kind counts it.

Every kind here depends on the student only through the C class probabilities. The picked logits and the rest's log-sum-exp, a few numbers per
token, are made the same on all ranks; on them a full divergence over C "tokens" is computed, and its gradient G_C expands by the chain rule:
dL/dz_v = G_v for a picked id, G_rest t_v for another one, where t is the student's softmax over the rest alone, and 0 without a rest.

    topk_tail_*     KL between the K + 1 classes: a lower bound of the full KL          topk_renorm_*   KL between the conditionals on the K ids
    k1   log p_y - log q_y           k3   q_y/p_y - 1 - log(q_y/p_y)        on a given, sampled id y

*_forward is KL(teacher||student), *_reverse KL(student||teacher). With y drawn from the student, k1 and k3 both estimate the reverse KL without
bias, but the expected gradients of the losses are others: that of k1 is **zero** (it is useful only as a detached reward), that of k3 is the
gradient of the **forward** KL.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from opd_megatron.losses.full_divergence import FULL_KINDS, Divergence, live_masses, require_clip, shift_to_max_
from opd_megatron.losses.vocab_parallel import ShardSoftmax, VocabShard, local_ids, merged_softmax, moved_maximum, require_count

SAMPLED_KINDS = ("k1", "k3")
TOP_K_KINDS = {
    "topk_tail_forward": "forward_kl",
    "topk_tail_reverse": "reverse_kl",
    "topk_renorm_forward": "forward_kl",
    "topk_renorm_reverse": "reverse_kl",
}
ALL_KINDS = (*FULL_KINDS, *TOP_K_KINDS, *SAMPLED_KINDS)
DEFAULT_TOP_K = 64


class ClassChunk(NamedTuple):
    """Divergence of one chunk's rows; the ids and the gradient G of their classes; and what the student's softmax over the rest needs.

    On this rank, t_v = rest_scale exp(z_v - own_max). These two are the rank's own; all else is the same on every rank. `clipped_N` is how many
    classes exceed the clip; None without a clip.
    """

    value_N: torch.Tensor
    ids_NK: torch.Tensor
    grad_NC: torch.Tensor
    own_max_N: torch.Tensor
    rest_scale_N: torch.Tensor
    student_lse_N: torch.Tensor
    student_entropy_N: torch.Tensor
    clipped_N: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class ClassDivergence:
    """Which divergence over few tokens. `support` says whose `top_k` highest logits are picked, at equal logits the lower id.

    `top_k` is by default 64; a vocabulary with fewer ids counts whole. `pointwise_clip` counts each class, the rest among them, as min(l, clip).
    Raises ValueError for an unknown kind or support, a top_k below 1, and an option that the kind does not have.
    """

    kind: str
    top_k: int | None = None
    support: str | None = None
    pointwise_clip: float | None = None
    _full: Divergence = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind in SAMPLED_KINDS:
            for name in ("top_k", "support", "pointwise_clip"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"{name}={value!r} does not belong to kind={self.kind!r}, which looks at one sampled token")
            return
        if self.kind not in TOP_K_KINDS:
            raise ValueError(f"kind={self.kind!r} is not known; use one of {', '.join(ALL_KINDS)}")
        require_clip(self.pointwise_clip)
        top_k, support = DEFAULT_TOP_K if self.top_k is None else self.top_k, self.support or "teacher"
        require_count("top_k", top_k)
        if support not in ("teacher", "student"):
            raise ValueError(f"support={support!r} is not known; use teacher or student")
        object.__setattr__(self, "top_k", top_k)
        object.__setattr__(self, "support", support)
        object.__setattr__(self, "_full", Divergence(kind=TOP_K_KINDS[self.kind], pointwise_clip=self.pointwise_clip))

    @property
    def counts_rest(self) -> bool:
        return not self.kind.startswith("topk_renorm")

    def pick(self, student: ShardSoftmax, teacher: ShardSoftmax, shard: VocabShard, sampled_ids_N: torch.Tensor | None) -> torch.Tensor:
        """Return the global ids [N, K] that are looked at, the same on all ranks: those sampled, or the highest logits, with one all-gather."""
        if self.kind in SAMPLED_KINDS:
            assert sampled_ids_N is not None
            return sampled_ids_N[:, None]
        assert self.top_k is not None
        return top_ids((teacher if self.support == "teacher" else student).logp_TW, self.top_k, shard)

    def evaluate_(
        self, student: ShardSoftmax, teacher: ShardSoftmax, ids_NK: torch.Tensor, shard: VocabShard, *extra_N: torch.Tensor
    ) -> tuple[ClassChunk, tuple[torch.Tensor, ...]]:
        """Return the divergence from raw logits, and the sums of `extra_N`, which ride along: one all-gather.

        Leaves in the student's `prob_TW` the exponentials of the rest, relative to this rank's maximum.
        """
        num_picked = ids_NK.size(1)
        student_KN, owners_KN = cut_out_(student, ids_NK, shard)
        teacher_KN, _ = cut_out_(teacher, ids_NK, shard)
        own_max_N, own_teacher_max_N = student.local_max(), teacher.local_max()
        student.shift_(own_max_N)
        teacher.shift_(own_teacher_max_N)
        own = (own_max_N, student.mass(), student.entropy_moment(), own_teacher_max_N, teacher.mass())
        parts = shard.gather(*own, *student_KN, *teacher_KN, *owners_KN, *extra_N)
        student_max_N, rest_mass_N, moment_N = merged_softmax(*parts[:3])
        teacher_max_N, teacher_mass_N = merged_softmax(*parts[3:5])
        # Each of these is 0 on all ranks but the one that holds the id.
        picked = [part_RN.sum(0) for part_RN in parts[5:]]
        student_KN, teacher_KN, owners_KN = (torch.stack(picked[first * num_picked : (first + 1) * num_picked]) for first in range(3))
        nobody_KN = owners_KN == 0
        student_classes, student_shift_N = _class_logits(student_KN.masked_fill(nobody_KN, -math.inf), student_max_N, rest_mass_N)
        teacher_classes, _ = _class_logits(teacher_KN.masked_fill(nobody_KN, -math.inf), teacher_max_N, teacher_mass_N)
        lse_N = student_classes.logsumexp(-1)
        entropy_N = _entropy(student_classes - lse_N[:, None], rest_mass_N, moment_N).masked_fill_(lse_N == -math.inf, 0)
        num_classes = num_picked + self.counts_rest
        value_N, grad_NC, clipped_N = self._over_classes(student_classes[:, :num_classes].clone(), teacher_classes[:, :num_classes].clone())
        if self.kind in SAMPLED_KINDS:
            # A sampled id that no rank holds is the caller's error. A top-k one stands for a vocabulary of fewer than K ids: a class without mass.
            value_N.masked_fill_(nobody_KN[0], math.nan)
            grad_NC.masked_fill_(nobody_KN[0][:, None], math.nan)
        rest_scale_N = (moved_maximum(own_max_N, student_max_N).exp() / rest_mass_N).masked_fill_(rest_mass_N == 0, 0)
        chunk = ClassChunk(value_N, ids_NK, grad_NC, own_max_N, rest_scale_N, student_shift_N + lse_N, entropy_N, clipped_N)
        return chunk, tuple(picked[3 * num_picked :])

    def _over_classes(self, student_NC: torch.Tensor, teacher_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the divergence, its gradient in the class logits and, with a clip, the number of clipped classes: replicated arithmetic, nothing is sent."""
        student, teacher, whole = ShardSoftmax(student_NC), ShardSoftmax(teacher_NC), VocabShard(0, student_NC.size(1), None)
        if self.kind not in SAMPLED_KINDS:
            chunk = self._full.evaluate_(student, teacher, whole).chunk
            return chunk.value_T, self._full.gradient(student, teacher, chunk), chunk.clipped_T
        shift_to_max_(student, teacher, whole)
        masses = live_masses(student.mass(), teacher.mass())
        student.normalise_(masses[0])
        teacher.normalise_(masses[1])
        log_ratio_N = teacher.logp_TW[:, 0] - student.logp_TW[:, 0]
        # d/d log p_y is 1 for k1 and 1 - q_y/p_y for k3; d log p_y / d(class logits) = (1 - p_y, -p_rest) = (p_rest, -p_rest).
        slope_N = torch.ones_like(log_ratio_N) if self.kind == "k1" else log_ratio_N.expm1().neg()
        value_N = -log_ratio_N if self.kind == "k1" else log_ratio_N.expm1() - log_ratio_N
        dead_N = torch.isinf(masses[0])
        rest_N = (slope_N * student.prob_TW[:, 1]).masked_fill(dead_N, 0)
        return value_N.masked_fill(dead_N, 0), torch.stack([rest_N, -rest_N], -1), None

    def gradient(self, rest_NW: torch.Tensor, chunk: ClassChunk, shard: VocabShard) -> torch.Tensor:
        """Return dL/dz of this rank's columns from the exponentials of the rest, in their storage: no collective."""
        num_picked = chunk.ids_NK.size(1)
        if self.counts_rest:
            grad_NW = rest_NW.mul_((chunk.grad_NC[:, num_picked] * chunk.rest_scale_N)[:, None])
        else:
            grad_NW = rest_NW.zero_()
        if shard.width:
            local_NK, owned_NK = local_ids(chunk.ids_NK, shard)
            # Added, not written: the columns picked are 0, and ids of other ranks, clamped to some column, add 0.
            grad_NW.scatter_add_(1, local_NK, torch.where(owned_NK, chunk.grad_NC[:, :num_picked], 0))
        return grad_NW


def top_ids(logits_NW: torch.Tensor, top_k: int, shard: VocabShard) -> torch.Tensor:
    """Return the global ids [N, K] of the highest logits, equal ones by the lower id, the same on all ranks; -1 beyond a vocabulary of fewer ids.

    One all-gather of (logit, id) pairs; the ids take part in no derivative. Each rank sends its best in the order of their ids, and ranks hold
    ascending ids, so a stable sort by logit breaks ties as it should.
    """
    num_tokens = logits_NW.size(0)
    ids_NK = _local_top(logits_NW, min(top_k, logits_NW.size(1)))
    candidates = torch.full((2, num_tokens, top_k), -math.inf, dtype=torch.float64, device=logits_NW.device)
    candidates[0, :, : ids_NK.size(1)], candidates[1, :, : ids_NK.size(1)] = logits_NW.gather(1, ids_NK), ids_NK + shard.start
    logits, ids = (torch.cat(part_RNK.unbind(), -1) for part_RNK in shard.gather(*candidates))
    # First the places that no id fills go last, then the highest logits come first.
    filled = torch.isfinite(ids).to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    logits, ids = logits.gather(1, filled), ids.gather(1, filled)
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return ids.gather(1, best).nan_to_num(neginf=-1).long()


def _local_top(logits_NW: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the local columns of the highest logits in ascending order; among equal logits the lower columns."""
    if top_k == 0:
        return torch.empty((logits_NW.size(0), 0), dtype=torch.long, device=logits_NW.device)
    values_NK, columns_NK = logits_NW.topk(top_k)
    threshold_N1 = values_NK[:, -1:]
    # topk leaves open which of several equal logits it takes. That matters only where more of them reach the threshold than it took.
    tied_N = (logits_NW >= threshold_N1).sum(-1) > top_k
    if tied_N.any():
        rows, columns = logits_NW[tied_N], torch.arange(logits_NW.size(1), device=logits_NW.device)
        order = torch.where(rows > threshold_N1[tied_N], -1, torch.where(rows == threshold_N1[tied_N], columns, columns.numel()))
        columns_NK[tied_N] = order.topk(top_k, largest=False).indices
    return columns_NK.sort(-1).values


def cut_out_(softmax: ShardSoftmax, ids_NK: torch.Tensor, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the raw logits [K, N] of the ids and a count of one, both 0 where another rank holds the id; and set these logits to -inf in place."""
    logits_NW = softmax.logp_TW
    if shard.width == 0:
        return (zeros_KN := logits_NW.new_zeros(ids_NK.T.shape)), zeros_KN
    local_NK, owned_NK = local_ids(ids_NK, shard)
    picked_NK = logits_NW.gather(1, local_NK).masked_fill_(~owned_NK, 0)
    # Ids of other ranks are clamped onto a column of this one, which must stay: minus infinity is put in by a minimum.
    logits_NW.scatter_reduce_(1, local_NK, torch.where(owned_NK, -math.inf, math.inf).to(logits_NW.dtype), "amin")
    return picked_NK.T, owned_NK.T.to(logits_NW.dtype)


def _class_logits(picked_KN: torch.Tensor, rest_max_N: torch.Tensor, rest_mass_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [N, K + 1] of the picked ids and of the rest, minus their shift, and the shift.

    The rest's maximum is shifted before the logarithm of its mass is added: the other way round a large maximum would round the logarithm away.
    """
    shift_N = torch.maximum(picked_KN.amax(0), rest_max_N)
    shift_N = shift_N.masked_fill(shift_N == -math.inf, 0)
    rest_N = (rest_max_N - shift_N) + rest_mass_N.log()
    return torch.cat([picked_KN - shift_N, rest_N[None]]).T, shift_N


def _entropy(class_logp_NC: torch.Tensor, rest_mass_N: torch.Tensor, rest_moment_N: torch.Tensor) -> torch.Tensor:
    """Return the entropy over the whole vocabulary: that between the classes, plus that within the rest times the rest's probability."""
    prob_NC = class_logp_NC.exp()
    between_N = -(prob_NC * class_logp_NC).masked_fill(prob_NC == 0, 0).sum(-1)
    within_N = prob_NC[:, -1] * (rest_mass_N.log() - rest_moment_N / rest_mass_N)
    return between_N + within_N.masked_fill(rest_mass_N == 0, 0)
