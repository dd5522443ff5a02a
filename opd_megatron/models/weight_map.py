"""Which Hugging Face tensors make up which Megatron-Core tensor, as data: one row per Megatron tensor.

Global Megatron tensors carry the names and shapes of a distributed checkpoint: whole, layers numbered globally, the vocabulary unpadded.
One map serves loading, checkpoint conversion and export.

Shapes: V vocabulary, H hidden, F feed-forward, Q query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from opd_megatron.models.architecture import Architecture

Kind = Literal["plain", "qkv", "gate_up"]

# Checkpoints name the norms as Transformer Engine's fused layers do, so that models of either layer kind load them.
LOCAL_TO_CHECKPOINT = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight", "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"


@dataclass(frozen=True, kw_only=True)
class MappedTensor:
    """One Megatron tensor: its global name, its Hugging Face parts in order, and how tensor parallelism splits it."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind = "plain"
    # The dimension split over tensor-parallel ranks; None is replicated.
    split_dim: int | None = None
    is_vocab: bool = False
    part_shapes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The global, unpadded Megatron shape."""
        return (sum(part[0] for part in self.part_shapes), *self.part_shapes[0][1:])


def weight_map(architecture: Architecture) -> list[MappedTensor]:
    """Return one row per Megatron tensor of the whole model."""
    a = architecture
    rows = [MappedTensor(megatron=EMBEDDING, hf=("model.embed_tokens.weight",), split_dim=0, is_vocab=True, part_shapes=((a.vocab_size, a.hidden_size),))]
    for layer in range(a.num_layers):
        rows += _layer_rows(a, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    rows.append(MappedTensor(megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",), part_shapes=((a.hidden_size,),)))
    if not a.tied:
        rows.append(MappedTensor(megatron=HEAD, hf=("lm_head.weight",), split_dim=0, is_vocab=True, part_shapes=((a.vocab_size, a.hidden_size),)))
    return rows


def _layer_rows(a: Architecture, megatron: str, hf: str) -> list[MappedTensor]:
    query, key_value = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    projections = tuple(f"{hf}self_attn.{name}_proj" for name in "qkv")
    attention, hf_attention = f"{megatron}self_attention.", f"{hf}self_attn."
    norm = ((a.hidden_size,),)
    rows = [
        MappedTensor(megatron=f"{attention}linear_qkv.layer_norm_weight", hf=(f"{hf}input_layernorm.weight",), part_shapes=norm),
        MappedTensor(
            megatron=f"{attention}linear_qkv.weight",
            hf=tuple(f"{name}.weight" for name in projections),
            kind="qkv",
            split_dim=0,
            part_shapes=tuple((rows_, a.hidden_size) for rows_ in (query, key_value, key_value)),
        ),
        MappedTensor(megatron=f"{attention}linear_proj.weight", hf=(f"{hf_attention}o_proj.weight",), split_dim=1, part_shapes=((a.hidden_size, query),)),
        MappedTensor(megatron=f"{megatron}mlp.linear_fc1.layer_norm_weight", hf=(f"{hf}post_attention_layernorm.weight",), part_shapes=norm),
        MappedTensor(
            megatron=f"{megatron}mlp.linear_fc1.weight",
            hf=(f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"),
            kind="gate_up",
            split_dim=0,
            part_shapes=((a.ffn_hidden_size, a.hidden_size),) * 2,
        ),
        MappedTensor(
            megatron=f"{megatron}mlp.linear_fc2.weight", hf=(f"{hf}mlp.down_proj.weight",), split_dim=1, part_shapes=((a.hidden_size, a.ffn_hidden_size),)
        ),
    ]
    if a.qkv_bias:
        names = tuple(f"{name}.bias" for name in projections)
        rows.append(MappedTensor(megatron=f"{attention}linear_qkv.bias", hf=names, kind="qkv", split_dim=0, part_shapes=((query,), (key_value,), (key_value,))))
    if a.qk_norm:
        rows += [MappedTensor(megatron=f"{attention}{x}_layernorm.weight", hf=(f"{hf_attention}{x}_norm.weight",), part_shapes=((a.head_dim,),)) for x in "qk"]
    return rows


def to_megatron(row: MappedTensor, parts: list[torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """Return the global Megatron tensor made of its Hugging Face parts; ValueError if a part has another shape than the config says."""
    for name, part, shape in zip(row.hf, parts, row.part_shapes, strict=True):
        if tuple(part.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(part.shape)} where config.json implies {shape}")
    if row.kind == "qkv":
        # Megatron keeps each key-value group together: [its query heads, its key head, its value head].
        groups = architecture.num_kv_heads
        return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def to_hf(row: MappedTensor, tensor: torch.Tensor, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Return the Hugging Face parts of a global Megatron tensor; the inverse of `to_megatron`."""
    if row.kind == "qkv":
        groups = architecture.num_kv_heads
        sizes = [shape[0] // groups for shape in row.part_shapes]
        split = tensor.reshape(groups, -1, *tensor.shape[1:]).split(sizes, dim=1)
        parts = [part.flatten(0, 1) for part in split]
    else:
        parts = list(tensor.split([shape[0] for shape in row.part_shapes]))
    return {name: part.contiguous() for name, part in zip(row.hf, parts, strict=True)}


def local_slice(row: MappedTensor, tensor: torch.Tensor, *, tensor_rank: int, tensor_size: int, padded_vocab: int) -> torch.Tensor:
    """Return what one tensor-parallel rank holds of a global tensor; vocabulary rows are padded with zeros first."""
    if row.split_dim is None:
        return tensor
    if row.is_vocab:
        return vocab_slice(tensor, tensor_rank=tensor_rank, tensor_size=tensor_size, padded_vocab=padded_vocab)
    if row.kind == "gate_up":
        return torch.cat([half.chunk(tensor_size)[tensor_rank] for half in tensor.chunk(2)])
    return tensor.chunk(tensor_size, dim=row.split_dim)[tensor_rank]


def vocab_slice(tensor_VH: torch.Tensor, *, tensor_rank: int, tensor_size: int, padded_vocab: int) -> torch.Tensor:
    """Return one rank's rows [W, H] of a vocabulary matrix, zeros where the padding lies."""
    width = padded_vocab // tensor_size
    rows = tensor_VH[tensor_rank * width : (tensor_rank + 1) * width]
    if rows.size(0) == width:
        return rows
    return torch.cat([rows, rows.new_zeros(width - rows.size(0), rows.size(1))])
