"""From the last position's hidden states to a token and its log-probability, the same on every rank of a replica.

Shapes: B sequences, H hidden, V vocabulary, W this rank's slice of V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.losses.head_products import head_logits
from opd_megatron.losses.logit_scaling import LogitScaling
from opd_megatron.models.gpt import ModelChunks, head_weight
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.rollout.sampling import SamplingSettings, sample_tokens


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """The writing rank of each replica draws, and one broadcast tells the others."""

    model: ModelChunks
    groups: ModelGroups
    vocab_size: int
    device: torch.device

    def draw(self, hidden_BH: torch.Tensor | None, uniform_B: torch.Tensor, settings: SamplingSettings) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids [B] and log-probabilities [B]; `hidden_BH` is None before the last stage."""
        # Ids below 2**53 are exact in fp64, so one broadcast carries both.
        packed_2B = torch.empty(2, uniform_B.numel(), dtype=torch.float64, device=self.device)
        source = self.groups.writing_rank
        if hidden_BH is not None:
            logits_BV = self._gather_logits(hidden_BH)
            if dist.get_rank() == source:
                token_B, logp_B = sample_tokens(logits_BV, uniform_B, settings)
                packed_2B = torch.stack([token_B.double(), logp_B.double()])
        if self.groups.layout.tensor * self.groups.layout.pipeline > 1:
            dist.broadcast(packed_2B, src=source, group=self.groups.collection.mp)
        return packed_2B[0].long(), packed_2B[1].float()

    def _gather_logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        """Return full logits [B, V] in fp32, without temperature, on every tensor rank of the last stage; padded columns are cut off."""
        product_BW = head_logits(hidden_BH, head_weight(self.model), torch.float32)
        logits_BW = LogitScaling(softcap=self.model.logit_softcap).apply_(product_BW)
        if self.groups.layout.tensor == 1:
            return logits_BW[:, : self.vocab_size]
        parts = [torch.empty_like(logits_BW) for _ in range(self.groups.layout.tensor)]
        dist.all_gather(parts, logits_BW.contiguous(), group=self.groups.collection.tp)
        return torch.cat(parts, dim=-1)[:, : self.vocab_size]
