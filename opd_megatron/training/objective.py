"""From a micro-batch's hidden states to (sum, count): what `opd` and `sft` minimize. Last stage only.

Shapes: T scored positions, H student hidden, G teacher hidden, W this rank's slice of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from opd_megatron.align.rows import PairedShard, UnitRows
from opd_megatron.align.simct import AlignedObjective, Scoring, simct_divergence
from opd_megatron.align.uld import UniversalObjective, uld_divergence
from opd_megatron.config import AlignmentConfig, LossConfig
from opd_megatron.data.batches import TokenBatch
from opd_megatron.losses.class_divergence import SAMPLED_KINDS, TOP_K_KINDS
from opd_megatron.losses.fused_head import FusedDivergence, TokenStatistics, fused_head_cross_entropy, fused_head_divergence, token_statistics


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples, padded or packed, and, for distillation on the last stage, the teacher's hidden states [T, G] at the scored positions.

    `token_T` are the places of the scored positions among all response tokens of the step; `weight_T` is None where all weigh 1.

    With `units`, for a teacher with another tokenizer, the scored positions are those of the units, one unit after another, counted in the windows of all
    context ranks put together; the teacher's hidden states are those of its own positions [U, G]. `num_tokens` is then how many response tokens there are.
    """

    batch: TokenBatch
    token_T: torch.Tensor
    teacher_hidden_TG: torch.Tensor | None = None
    weight_T: torch.Tensor | None = None
    units: UnitRows | None = None
    num_tokens: int | None = None

    @property
    def count(self) -> int:
        """What the loss sum is divided by, added over all micro-batches: scored positions, or the response tokens that units are cut from."""
        return len(self.token_T) if self.num_tokens is None else self.num_tokens

    def weighted(self, weight_T: torch.Tensor) -> MicroBatch:
        """Return it with these weights, and without the rows that weigh nothing."""
        if self.units is not None:
            return replace(self, weight_T=weight_T)
        # Found once: every selection by a mask waits for the GPU.
        kept_T = weight_T.nonzero().squeeze(1)
        hidden_TG = self.teacher_hidden_TG[kept_T] if self.teacher_hidden_TG is not None else None
        return MicroBatch(batch=self.batch.scored_only(kept_T), token_T=self.token_T[kept_T], teacher_hidden_TG=hidden_TG, weight_T=weight_T[kept_T])


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The divergence of the configured kind between the student's and the teacher's full next-token distributions."""

    loss: LossConfig
    vocab_size: int
    tp_group: dist.ProcessGroup
    teacher_head_WG: torch.Tensor | None
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    # Whether the sampled tokens' log-probabilities are recomputed, to be compared with those the sampler saw.
    recompute_logp: bool = False

    @property
    def observes(self) -> tuple[str, ...]:
        """What the results tell of a row besides, by name."""
        return ("clipped",) if self.loss.pointwise_clip is not None else ()

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
            student_softcap=self.student_softcap,
            teacher_softcap=self.teacher_softcap,
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
            student_softcap=self.student_softcap,
            teacher_softcap=self.teacher_softcap,
        )


@dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning:
    """Cross entropy of the reference answer's tokens."""

    loss: LossConfig
    vocab_size: int
    tp_group: dist.ProcessGroup
    student_softcap: float | None = None

    observes: ClassVar[tuple[str, ...]] = ()

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
            student_softcap=self.student_softcap,
        )


@dataclass(frozen=True, kw_only=True)
class AlignedDistillation:
    """The divergence on units of text, from a teacher with another tokenizer."""

    loss: LossConfig
    alignment: AlignmentConfig
    shard: PairedShard
    tp_group: dist.ProcessGroup
    teacher_head_CG: torch.Tensor | None
    student_softcap: float | None = None
    teacher_softcap: float | None = None

    @property
    def observes(self) -> tuple[str, ...]:
        """What the results tell of a row besides, by name."""
        return UniversalObjective.observes if self.alignment.kind == "uld" else AlignedObjective.observes

    def __call__(self, hidden_TH: torch.Tensor, head_WH: torch.Tensor, micro_batch: MicroBatch) -> FusedDivergence:
        units = micro_batch.units
        assert units is not None, "samples were aligned"
        assert self.teacher_head_CG is not None
        assert micro_batch.teacher_hidden_TG is not None, "scores arrive on the last stage"
        models = (hidden_TH, head_WH, micro_batch.teacher_hidden_TG, self.teacher_head_CG)
        options: dict[str, Any] = {
            "tp_group": self.tp_group,
            "unit_weight_N": self._weights(units, micro_batch),
            "temperature": self.loss.temperature,
            "chunk_tokens": self.loss.chunk_tokens,
            "accumulate_main_grad": _accumulates(head_WH),
            "student_softcap": self.student_softcap,
            "teacher_softcap": self.teacher_softcap,
        }
        if self.alignment.kind == "uld":
            return uld_divergence(*models, units, self.shard, top_k=self.alignment.top_k, **options)
        return simct_divergence(*models, units, self.shard, scoring=self._scoring, **options)

    @property
    def _scoring(self) -> Scoring:
        # The configuration has the options under their names.
        options = {option.name: getattr(self.alignment, option.name) for option in fields(Scoring) if option.name != "kind"}
        return Scoring(kind=self.loss.kind, **options)  # type: ignore[arg-type]

    def _weights(self, units: UnitRows, micro_batch: MicroBatch) -> torch.Tensor | None:
        """Return each unit's weight: that of its first token, once or for each of its tokens."""
        weight_N = None if micro_batch.weight_T is None else micro_batch.weight_T[units.student_first_N]
        if self.alignment.span_weight == "unit":
            return weight_N
        length_N = units.student_lengths.to(units.student_ids_T.device, torch.float32)
        return length_N if weight_N is None else weight_N * length_N


Objective = Distillation | AlignedDistillation | SupervisedFineTuning


def _accumulates(head_WH: torch.Tensor) -> bool:
    """Return whether the head's gradient goes straight into Megatron's fp32 buffer, without a rounding to bf16 per micro-batch."""
    return torch.is_grad_enabled() and head_WH.requires_grad and hasattr(head_WH, "main_grad")
