"""Universal Logit Distillation (Boizard et al., arXiv 2402.12030): compare how a probability is spread, not over which tokens.

Position i of one tokenization is compared with position i of the other: L = sum_r |p_(r) - q_(r)| over ranks r of the sorted probabilities, the Wasserstein-1
distance of ULD. With `top_k` the K highest, and what is left as one class. A baseline: which token a probability belongs to is lost, and after the first
difference in length the two positions speak of different text.

Shapes: T positions, N those of one chunk, K ranks, W, C rows of the heads on this rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist

from opd_megatron.align.rows import PairedShard, UnitRows
from opd_megatron.losses.chunk_objectives import ChunkLoss, chunk_softmax
from opd_megatron.losses.class_divergence import top_ids
from opd_megatron.losses.fused_head import FusedDivergence, fused_head
from opd_megatron.losses.logit_scaling import LogitScaling, logit_scalings
from opd_megatron.losses.vocab_parallel import ShardSoftmax, VocabShard, entropy, local_ids, picked_logp, token_chunks, vocab_shard


def uld_divergence(
    student_hidden_TH: torch.Tensor,
    student_head_WH: torch.Tensor,
    teacher_hidden_TG: torch.Tensor,
    teacher_head_CG: torch.Tensor,
    rows: UnitRows,
    shard: PairedShard,
    *,
    top_k: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    unit_weight_N: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    accumulate_main_grad: bool = False,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> FusedDivergence:
    """Return the weighted sum of ULD's distance over units of one token each; arguments as in `simct_divergence`, five collectives per chunk.

    `top_k` is how many of the highest probabilities are compared rank by rank; 0 compares all. ValueError for units of several tokens.
    """
    scaling, teacher_scaling = logit_scalings(temperature, student_softcap, teacher_softcap)
    if len(rows.student_ids_T) != len(rows) or len(rows.teacher_ids_U) != len(rows):
        raise ValueError("ULD compares position by position: every unit must be one token of each model")
    own = vocab_shard(student_head_WH.size(0), tp_group=tp_group, vocab_size=shard.student_size)
    num_ranks = top_k or max(shard.student_size, len(shard.teacher_column_V))
    objective = UniversalObjective(teacher_hidden_TG.detach(), teacher_head_CG.detach(), num_ranks, shard, teacher_scaling, rows.student_ids_T)
    ids = {"sampled_ids_T": rows.student_ids_T}
    return fused_head(student_hidden_TH, student_head_WH, objective, own, unit_weight_N, scaling, chunk_tokens, ids, accumulate_main_grad)


@dataclass(frozen=True)
class UniversalObjective:
    """A `ChunkObjective`: sorted probabilities of both models, position by position."""

    teacher_hidden_TG: torch.Tensor
    teacher_head_CG: torch.Tensor
    num_ranks: int
    shard: PairedShard
    teacher_scaling: LogitScaling
    sampled_ids_T: torch.Tensor
    observes: ClassVar[tuple[str, ...]] = ("covered",)

    def chunks(self, num_tokens: int, num_columns: int, device: torch.device, chunk_tokens: int | None) -> Iterable[slice]:
        return token_chunks(num_tokens, max(num_columns, self.shard.most_columns), device, chunk_tokens)

    def __call__(self, student: ShardSoftmax, rows: slice, shard: VocabShard, scale_N: torch.Tensor | None) -> ChunkLoss:
        # The teacher's rows are dealt out in another order; ranks are all that is compared.
        their_shard = VocabShard(0, self.teacher_head_CG.size(0), shard.tp_group)
        dtype = student.logp_TW.dtype
        teacher = chunk_softmax("teacher", self.teacher_hidden_TG[rows], self.teacher_head_CG, their_shard, self.teacher_scaling, dtype, student.scratch)
        ids_NK = top_ids(student.logp_TW, self.num_ranks, shard)
        student_max_N, teacher_max_N = shard.max(student.local_max(), teacher.local_max())
        student.shift_(student_max_N)
        highest_NK = self._highest(teacher, teacher_max_N, their_shard)
        sampled = student.owned_logit(self.sampled_ids_T[rows], shard)
        local_NK, owned_NK = local_ids(ids_NK, shard)
        owned_NK &= ids_NK >= 0
        mine_NK = student.prob_TW.gather(1, local_NK) * owned_NK if shard.width else torch.zeros_like(highest_NK)
        sums = shard.sum(student.mass(), student.entropy_moment(), *sampled, *mine_NK.T)
        mass_N, moment_N, logit_N, owners_N = sums[:4]
        prob_NK = torch.stack(sums[4:], 1) / mass_N[:, None]
        sign_NK, rest_sign_N = (prob_NK - highest_NK).sign(), (highest_NK.sum(1) - prob_NK.sum(1)).sign()
        # With every probability ranked, what is left over is rounding.
        if self.num_ranks >= max(self.shard.student_size, len(self.shard.teacher_column_V)):
            rest_sign_N = torch.zeros_like(rest_sign_N)
        rest_N = (highest_NK.sum(1) - prob_NK.sum(1)) * rest_sign_N
        value_N = (prob_NK - highest_NK).abs().sum(1) + rest_N
        grad_NW = None
        if scale_N is not None:
            mean_N = (prob_NK * sign_NK).sum(1) + (1 - prob_NK.sum(1)) * rest_sign_N
            grad_NW = student.prob_TW.div_(mass_N[:, None])
            jump_NK = (grad_NW.gather(1, local_NK) * owned_NK * (sign_NK - rest_sign_N[:, None])) if shard.width else None
            grad_NW.mul_((rest_sign_N - mean_N)[:, None])
            if jump_NK is not None:
                grad_NW.scatter_add_(1, local_NK, jump_NK)
            grad_NW.mul_(scale_N[:, None])
        return ChunkLoss(value_N, entropy(moment_N, mass_N), picked_logp(logit_N, owners_N, mass_N), grad_NW, (torch.ones_like(value_N),))

    def _highest(self, teacher: ShardSoftmax, max_N: torch.Tensor, shard: VocabShard) -> torch.Tensor:
        """Return the teacher's probabilities [N, K] from the highest on; 0 where it has fewer ids. One gather of values, one sum of masses."""
        teacher.shift_(max_N)
        own_NK = teacher.prob_TW.topk(min(self.num_ranks, teacher.prob_TW.size(1)), dim=1).values
        padded_NK = own_NK.new_zeros(len(own_NK), self.num_ranks)
        padded_NK[:, : own_NK.size(1)] = own_NK
        (parts_RNK,) = shard.gather(padded_NK)
        highest_NK = torch.cat(parts_RNK.unbind(), 1).topk(self.num_ranks, dim=1).values
        return highest_NK / shard.sum(teacher.mass())[0][:, None]
