"""Logits of transformers' own model against those of this rank's Megatron-Core model, on the same tokens.

Shapes: B sequences, S length, V vocabulary, W this rank's slice of V.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from opd_megatron.models.forward import forward_hidden, inference_mode
from opd_megatron.models.gpt import ModelChunks, head_weight
from opd_megatron.parallel.groups import ModelGroups


def megatron_logits(model: ModelChunks, groups: ModelGroups, tokens_BS: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """Return fp32 logits [B, S, V] without padded columns on the last stage, None on the others."""
    with inference_mode(model, groups):
        hidden_BSH = forward_hidden(model, groups, tokens_BS)
        if hidden_BSH is None:
            return None
        logits_BSW = (hidden_BSH @ head_weight(model).t()).float().contiguous()
    parts = [torch.empty_like(logits_BSW) for _ in range(groups.layout.tensor)]
    dist.all_gather(parts, logits_BSW, group=groups.collection.tp)
    return torch.cat(parts, dim=-1)[..., :vocab_size]


def transformers_logits(folder: Path, sequences: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return fp32 logits [S, V] of each sequence by transformers' implementation of the folder's model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa").eval()
    with torch.no_grad():
        return [model(sequence[None]).logits[0].float() for sequence in sequences]
