"""The same layers of Transformer Engine's modules: norms fused into the projections behind them, its attention, a rank's experts in one grouped product.

Imported only where the probe found a working Transformer Engine (`opd_megatron.packages`). Written from the sources of Megatron-Core 0.16.1 and of Transformer
Engine, and not yet run on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm, TERowParallelLinear
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.layers import OutputNorm, own_attention
from opd_megatron.parallel.megatron import feed_forward_parts

FINAL_NORM = TENorm


class TENormedRowParallelLinear(OutputNorm, TERowParallelLinear):
    """Transformer Engine's row-parallel projection with a norm behind it; the norm is ours, which has no state of its own in a checkpoint."""


class TEAttention(TEDotProductAttention):
    """Transformer Engine's attention, given the boundaries of packed sequences where its kernels read them."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Attend as TEDotProductAttention does. `models.layers.packed_sequences` keeps the boundaries on the host, for the rotary embedding."""
        if packed_seq_params is not None:
            boundaries = packed_seq_params.cu_seqlens_q.to(query.device, non_blocking=True)
            packed_seq_params = replace(packed_seq_params, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
        return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)


def te_layer(architecture: Architecture, config: TransformerConfig, *, own_attention_reason: str | None) -> ModuleSpec:
    """Return the layer of an architecture; with a reason, our attention stands in it."""
    layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = TEAttention if own_attention_reason is None else own_attention(architecture)
    if architecture.norms_outputs:
        attention.linear_proj = feed_forward_parts(layer).linear_fc2 = TENormedRowParallelLinear
    return layer


def fuse_gradients(model: torch.nn.Module) -> None:
    """Let the backward of every projection add its weight's gradient to DistributedDataParallel's buffer.

    Megatron-Core's own switch is one for all modules, its LM head among them, which then asks for a kernel of Apex that our head has no use for.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
