"""Transformer layers: Megatron-Core's local ones with our norms and attention, which need neither Transformer Engine nor Apex, or those of `te_layers.py`.

Local layers run on CPU and on CUDA alike; on CUDA, PyTorch's scaled-dot-product attention picks its flash kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from opd_megatron.config import ParallelLayout
from opd_megatron.models.architecture import Architecture
from opd_megatron.models.attention import SDPAttention
from opd_megatron.models.layer_options import own_attention_reason
from opd_megatron.parallel.megatron import feed_forward_parts, route_without_transformer_engine


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight tells Megatron-Core to reduce its gradient under sequence parallelism (the stock torch norm refuses it).

    With `layernorm_zero_centered_gamma` it multiplies by 1 + weight, and rounds only then.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.is_zero_centered = config.layernorm_zero_centered_gamma
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).type_as(x)


class OutputNorm(torch.nn.Module):
    """Before a row-parallel projection among a class's bases: its output, once summed over tensor ranks, is normed before it joins the residual stream."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **settings: Any) -> None:
        super().__init__(input_size, output_size, config=config, **settings)
        self.post_layernorm = RMSNorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias


class NormedRowParallelLinear(OutputNorm, RowParallelLinear):
    """Megatron-Core's row-parallel projection with a norm behind it."""


def packed_sequences(lengths: Sequence[int]) -> PackedSeqParams:
    """Return how Megatron-Core is told where the sequences of a packed row begin; their lengths are those before a split over context ranks.

    The boundaries stay on the host: rotary embedding and attention read them as numbers, which from a GPU would cost a synchronization each time.
    """
    boundaries = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device="cpu")
    longest = max(lengths)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest)


def block_spec(
    architecture: Architecture, config: TransformerConfig, layout: ParallelLayout, stage: int, chunk: int | None, kind: Literal["te", "local"] = "local"
) -> TransformerBlockSubmodules:
    """Return the layers of one pipeline stage, or of one of its chunks."""
    if kind == "te":
        from opd_megatron.models import te_layers  # where it is not installed, its modules are none

        reason = own_attention_reason(architecture, layout, "bf16" if config.bf16 else "fp32")
        layer = te_layers.te_layer(architecture, config, own_attention_reason=reason)
        final_norm: type = te_layers.FINAL_NORM
    else:
        layer, final_norm = _local_layer(architecture, config), RMSNorm
    num_layers = get_num_layers_to_build(config, chunk, stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)


def _local_layer(architecture: Architecture, config: TransformerConfig) -> ModuleSpec:
    layer: ModuleSpec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    if config.num_moe_experts is not None:
        route_without_transformer_engine()
        # Transformer Engine's layers fuse this norm into no expert, so checkpoints know it by its own name.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = own_attention(architecture)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if architecture.norms_outputs:
        attention.linear_proj = feed_forward_parts(layer).linear_fc2 = NormedRowParallelLinear
    return layer


def own_attention(architecture: Architecture) -> ModuleSpec:
    """Return our attention, with what it must know of the architecture."""
    return ModuleSpec(module=SDPAttention, params={"windows": architecture.windows, "softcap": architecture.attention_softcap})
