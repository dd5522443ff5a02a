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
    """One Megatron tensor, or one expert's slice of a stacked one: its global name, its parts in order, how tensor parallelism splits it.

    `hf` are the Hugging Face tensors: one for each part, or one that holds all parts, one after the other.
    """

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
    def hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the Hugging Face tensors, in the order of `hf`."""
        return self.part_shapes if len(self.hf) == len(self.part_shapes) else (self.shape,)

    @property
    def shape(self) -> tuple[int, ...]:
        """The global, unpadded Megatron shape; of an expert's slice, without the stacked dimension."""
        return (sum(part[0] for part in self.part_shapes), *self.part_shapes[0][1:])


def weight_map(architecture: Architecture) -> list[MappedTensor]:
    """Return one row per Megatron tensor of the whole model, and one per expert of the stacked ones."""
    a, names = architecture, architecture.tensors
    vocabulary = ((a.vocab_size, a.hidden_size),)
    rows = [MappedTensor(megatron=EMBEDDING, hf=(f"{names.embedding}.weight",), split_dim=0, is_vocab=True, part_shapes=vocabulary)]
    for layer in range(a.num_layers):
        megatron, hf = f"decoder.layers.{layer}.", names.layer.format(layer=layer)
        rows += _attention_rows(a, megatron, hf)
        rows += _dense_rows(a, megatron, hf) if a.experts is None else _expert_rows(a, a.experts, megatron, hf)
    rows.append(_norm_row(a, "decoder.final_layernorm.weight", names.final_norm))
    if not a.tied:
        rows.append(MappedTensor(megatron=HEAD, hf=(f"{names.head}.weight",), split_dim=0, is_vocab=True, part_shapes=vocabulary))
    return rows


def _norm_row(a: Architecture, megatron: str, hf: str, size: int | None = None) -> MappedTensor:
    return MappedTensor(megatron=megatron, hf=(f"{hf}.weight",), part_shapes=((size or a.hidden_size,),))


def _attention_rows(a: Architecture, megatron: str, hf: str) -> list[MappedTensor]:
    query, key_value = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    attention, names = f"{megatron}self_attention.", a.tensors
    sizes = (query, key_value, key_value)
    rows = [
        _norm_row(a, f"{attention}linear_qkv.layer_norm_weight", f"{hf}{names.attention_norm}"),
        MappedTensor(
            megatron=f"{attention}linear_qkv.weight",
            hf=tuple(f"{hf}{name}.weight" for name in names.qkv),
            kind="qkv",
            split_dim=0,
            part_shapes=tuple((size, a.hidden_size) for size in sizes),
        ),
        MappedTensor(
            megatron=f"{attention}linear_proj.weight", hf=(f"{hf}{names.attention_output}.weight",), split_dim=1, part_shapes=((a.hidden_size, query),)
        ),
    ]
    if a.qkv_bias:
        biases = tuple(f"{hf}{name}.bias" for name in names.qkv)
        rows.append(MappedTensor(megatron=f"{attention}linear_qkv.bias", hf=biases, kind="qkv", split_dim=0, part_shapes=tuple((size,) for size in sizes)))
    for megatron_name, name in (("q_layernorm", names.query_norm), ("k_layernorm", names.key_norm)):
        if name is not None:
            rows.append(_norm_row(a, f"{attention}{megatron_name}.weight", f"{hf}{name}", a.head_dim))
    if names.attention_output_norm is not None:
        rows.append(_norm_row(a, f"{attention}linear_proj.post_layernorm.weight", f"{hf}{names.attention_output_norm}"))
    return rows


def _dense_rows(a: Architecture, megatron: str, hf: str) -> list[MappedTensor]:
    mlp, names = f"{megatron}mlp.", a.tensors
    rows = [
        _norm_row(a, f"{mlp}linear_fc1.layer_norm_weight", f"{hf}{names.feed_forward_norm}"),
        MappedTensor(
            megatron=f"{mlp}linear_fc1.weight",
            hf=tuple(f"{hf}{name}.weight" for name in names.gate_up),
            kind="gate_up",
            split_dim=0,
            part_shapes=((a.ffn_hidden_size, a.hidden_size),) * 2,
        ),
        MappedTensor(megatron=f"{mlp}linear_fc2.weight", hf=(f"{hf}{names.down}.weight",), split_dim=1, part_shapes=((a.hidden_size, a.ffn_hidden_size),)),
    ]
    if names.feed_forward_output_norm is not None:
        rows.append(_norm_row(a, f"{mlp}linear_fc2.post_layernorm.weight", f"{hf}{names.feed_forward_output_norm}"))
    return rows


def _expert_rows(a: Architecture, experts: Experts, megatron: str, hf: str) -> list[MappedTensor]:
    """Return the norm, the router, and every expert."""
    names = a.tensors
    rows = [
        _norm_row(a, f"{megatron}pre_mlp_layernorm.weight", f"{hf}{names.feed_forward_norm}"),
        MappedTensor(megatron=f"{megatron}mlp.router.weight", hf=(f"{hf}{names.router}.weight",), part_shapes=((experts.num_experts, a.hidden_size),)),
    ]
    stack, width = f"{megatron}mlp.experts.experts.", experts.ffn_hidden_size
    for expert in range(experts.num_experts):
        one = f"{hf}{names.expert.format(expert=expert)}"
        gate_up = tuple(f"{one}{name}.weight" for name in names.expert_gate_up)
        rows += [
            MappedTensor(
                megatron=f"{stack}linear_fc1.weight", hf=gate_up, kind="gate_up", split_dim=0, expert=expert, part_shapes=((width, a.hidden_size),) * 2
            ),
            MappedTensor(
                megatron=f"{stack}linear_fc2.weight",
                hf=(f"{one}{names.expert_down}.weight",),
                split_dim=1,
                expert=expert,
                part_shapes=((a.hidden_size, width),),
            ),
        ]
    return rows


def name_in_layer(local: str, architecture: Architecture, local_experts: Sequence[int]) -> str:
    """Return the row name, after its layer, of a parameter that a Megatron layer calls `local`; `local_experts` are the layer's, numbered globally."""
    if expert := re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.*)", local):
        return f"mlp.experts.experts.{expert[2]}[{local_experts[int(expert[1])]}]"
    if expert := re.fullmatch(r"mlp\.experts\.(linear_fc[12]\.weight)(\d+)", local):
        # Of Transformer Engine's grouped experts.
        return f"mlp.experts.experts.{expert[1]}[{local_experts[int(expert[2])]}]"
    return (_FUSED_DENSE_NORMS if architecture.experts is None else _FUSED_NORMS).get(local, local)


def is_expert(name: str) -> bool:
    """Return whether Megatron-Core's name of a parameter is one of an expert's own, not of its router."""
    return ".mlp.experts." in name
