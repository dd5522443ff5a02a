"""Which Hugging Face tensors make up which Megatron-Core tensor, as data: one row per Megatron tensor.

Global Megatron tensors carry the names and shapes of a distributed checkpoint: whole, layers numbered globally, the vocabulary unpadded.
A checkpoint stacks the experts of a layer in one tensor; each expert has a row of its own, so that a rank reads its experts alone.
One map serves loading, checkpoint conversion and export; `weight_slices.py` has the arithmetic of its rows. Nothing here imports torch, so that
`recipes.run --check` reads it.

Shapes: V vocabulary, H hidden, F feed-forward, Q query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from opd_megatron.models.architecture import Architecture, Experts

Kind = Literal["plain", "qkv", "gate_up"]

# Checkpoints name the norms as Transformer Engine's fused layers do, so that models of either layer kind load them; it fuses none into experts.
_FUSED_NORMS = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
_FUSED_DENSE_NORMS = {**_FUSED_NORMS, "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"


@dataclass(frozen=True, kw_only=True)
class MappedTensor:
    """One Megatron tensor, or one expert's slice of a stacked one: its global name, its Hugging Face parts in order, how tensor parallelism splits it."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind = "plain"
    # The dimension split over tensor-parallel ranks, of an expert's over expert-tensor-parallel ranks; None is replicated.
    split_dim: int | None = None
    is_vocab: bool = False
    # The place in a tensor stacked over the layer's experts.
    expert: int | None = None
    part_shapes: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """The Megatron name, and which expert's slice of it: unlike `megatron`, no two rows share it."""
        return self.megatron if self.expert is None else f"{self.megatron}[{self.expert}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """The global, unpadded Megatron shape; of an expert's slice, without the stacked dimension."""
        return (sum(part[0] for part in self.part_shapes), *self.part_shapes[0][1:])


def weight_map(architecture: Architecture) -> list[MappedTensor]:
    """Return one row per Megatron tensor of the whole model, and one per expert of the stacked ones."""
    a = architecture
    rows = [MappedTensor(megatron=EMBEDDING, hf=("model.embed_tokens.weight",), split_dim=0, is_vocab=True, part_shapes=((a.vocab_size, a.hidden_size),))]
    for layer in range(a.num_layers):
        megatron, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        rows += _attention_rows(a, megatron, hf)
        rows += _dense_rows(a, megatron, hf) if a.experts is None else _expert_rows(a, a.experts, megatron, hf)
    rows.append(MappedTensor(megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",), part_shapes=((a.hidden_size,),)))
    if not a.tied:
        rows.append(MappedTensor(megatron=HEAD, hf=("lm_head.weight",), split_dim=0, is_vocab=True, part_shapes=((a.vocab_size, a.hidden_size),)))
    return rows


def _attention_rows(a: Architecture, megatron: str, hf: str) -> list[MappedTensor]:
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
    ]
    if a.qkv_bias:
        names = tuple(f"{name}.bias" for name in projections)
        rows.append(MappedTensor(megatron=f"{attention}linear_qkv.bias", hf=names, kind="qkv", split_dim=0, part_shapes=((query,), (key_value,), (key_value,))))
    if a.qk_norm:
        rows += [MappedTensor(megatron=f"{attention}{x}_layernorm.weight", hf=(f"{hf_attention}{x}_norm.weight",), part_shapes=((a.head_dim,),)) for x in "qk"]
    return rows


def _dense_rows(a: Architecture, megatron: str, hf: str) -> list[MappedTensor]:
    return [
        MappedTensor(megatron=f"{megatron}mlp.linear_fc1.layer_norm_weight", hf=(f"{hf}post_attention_layernorm.weight",), part_shapes=((a.hidden_size,),)),
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


def _expert_rows(a: Architecture, experts: Experts, megatron: str, hf: str) -> list[MappedTensor]:
    """Return the norm, the router, and every expert."""
    rows = [
        MappedTensor(megatron=f"{megatron}pre_mlp_layernorm.weight", hf=(f"{hf}post_attention_layernorm.weight",), part_shapes=((a.hidden_size,),)),
        MappedTensor(megatron=f"{megatron}mlp.router.weight", hf=(f"{hf}mlp.gate.weight",), part_shapes=((experts.num_experts, a.hidden_size),)),
    ]
    stack, width = f"{megatron}mlp.experts.experts.", experts.ffn_hidden_size
    for expert in range(experts.num_experts):
        one = f"{hf}mlp.experts.{expert}."
        gate_up = (f"{one}gate_proj.weight", f"{one}up_proj.weight")
        rows += [
            MappedTensor(
                megatron=f"{stack}linear_fc1.weight", hf=gate_up, kind="gate_up", split_dim=0, expert=expert, part_shapes=((width, a.hidden_size),) * 2
            ),
            MappedTensor(
                megatron=f"{stack}linear_fc2.weight", hf=(f"{one}down_proj.weight",), split_dim=1, expert=expert, part_shapes=((a.hidden_size, width),)
            ),
        ]
    return rows


def name_in_layer(local: str, architecture: Architecture, local_experts: Sequence[int]) -> str:
    """Return the row name, after its layer, of a parameter that a Megatron layer calls `local`; `local_experts` are the layer's, numbered globally."""
    if expert := re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.*)", local):
        return f"mlp.experts.experts.{expert[2]}[{local_experts[int(expert[1])]}]"
    return (_FUSED_DENSE_NORMS if architecture.experts is None else _FUSED_NORMS).get(local, local)
