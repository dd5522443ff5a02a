"""From a micro-batch's hidden states to (sum, count): what `opd` and `sft` minimize. Last stage only.

Shapes: T scored positions, H student hidden, G teacher hidden, W this rank's slice of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from opd_megatron.config import LossConfig
from opd_megatron.data.batches import TokenBatch
from opd_megatron.losses.class_divergence import SAMPLED_KINDS, TOP_K_KINDS
from opd_megatron.losses.fused_head import FusedDivergence, TokenStatistics, fused_head_cross_entropy, fused_head_divergence, token_statistics


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples, padded or packed, and, for distillation on the last stage, the teacher's hidden states [T, G] at the scored positions.

    `token_T` are the places of the scored positions among all response tokens of the step; `weight_T` is None where all weigh 1.
    """

    batch: TokenBatch
    token_T: torch.Tensor
    teacher_hidden_TG: torch.Tensor | None = None
    weight_T: torch.Tensor | None = None

    def weighted(self, weight_T: torch.Tensor) -> MicroBatch:
        """Return it with these weights, and without the rows that weigh nothing."""
        kept_T = weight_T != 0
        hidden_TG = self.teacher_hidden_TG[kept_T] if self.teacher_hidden_TG is not None else None
        return MicroBatch(batch=self.batch.scored_only(kept_T), token_T=self.token_T[kept_T], teacher_hidden_TG=hidden_TG, weight_T=weight_T[kept_T])


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The divergence of the configured kind between the student's and the teacher's full next-token distributions."""

    loss: LossConfig
    vocab_size: int
    tp_group: dist.ProcessGroup
    teacher_head_WG: torch.Tensor | None
    # Whether the sampled tokens' log-probabilities are recomputed, to be compared with those the sampler saw.
    recompute_logp: bool = False

    @property
    def counts_clipped(self) -> bool:
        """Whether the results tell how many entries of the vocabulary were clipped."""
        return self.loss.pointwise_clip is not None

    def __call__(self, hidden_TH: torch.Tensor, head_WH: torch.Tensor, micro_batch: MicroBatch) -> FusedDivergence:
        assert self.teacher_head_WG is not None
        assert micro_batch.teacher_hidden_TG is not None, "scores arrive on the last stage"
        by_sampled_token = self.loss.kind in SAMPLED_KINDS
        result = fused_head_divergence(
            hidden_TH,
            head_WH,
            micro_batch.teacher_hidden_TG,
            self.teacher_head_WG,
            kind=self.loss.kind,
            tp_group=self.tp_group,
            token_weight_T=micro_batch.weight_T,
            beta=self.loss.beta,
            alpha=self.loss.alpha,
            top_k=self.loss.top_k,
            support=self.loss.support if self.loss.kind in TOP_K_KINDS else None,
            vocab_size=self.vocab_size,
            temperature=self.loss.temperature,
            pointwise_clip=self.loss.pointwise_clip,
            chunk_tokens=self.loss.chunk_tokens,
            sampled_ids_T=micro_batch.batch.target_T if self.recompute_logp or by_sampled_token else None,
            accumulate_main_grad=_accumulates(head_WH),
        )
        return result if self.recompute_logp else replace(result, sampled_logp_T=None)

    def statistics(self, hidden_TH: torch.Tensor, head_WH: torch.Tensor, micro_batch: MicroBatch, temperature: float) -> TokenStatistics:
        """Return what selection rules look at, for every row, without gradient."""
        assert self.teacher_head_WG is not None
        assert micro_batch.teacher_hidden_TG is not None, "scores arrive on the last stage"
        return token_statistics(
            hidden_TH,
            head_WH,
            micro_batch.teacher_hidden_TG,
            self.teacher_head_WG,
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
            temperature=temperature,
            chunk_tokens=self.loss.chunk_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning:
    """Cross entropy of the reference answer's tokens."""

    loss: LossConfig
    vocab_size: int
    tp_group: dist.ProcessGroup

    @property
    def counts_clipped(self) -> bool:
        return False

    def __call__(self, hidden_TH: torch.Tensor, head_WH: torch.Tensor, micro_batch: MicroBatch) -> FusedDivergence:
        return fused_head_cross_entropy(
            hidden_TH,
            head_WH,
            micro_batch.batch.target_T,
            tp_group=self.tp_group,
            token_weight_T=micro_batch.weight_T,
            vocab_size=self.vocab_size,
            chunk_tokens=self.loss.chunk_tokens,
            accumulate_main_grad=_accumulates(head_WH),
        )


Objective = Distillation | SupervisedFineTuning


def _accumulates(head_WH: torch.Tensor) -> bool:
    """Return whether the head's gradient goes straight into Megatron's fp32 buffer, without a rounding to bf16 per micro-batch."""
    return torch.is_grad_enabled() and head_WH.requires_grad and hasattr(head_WH, "main_grad")
