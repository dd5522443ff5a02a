"""Transformer layers that need neither Transformer Engine nor Apex: Megatron-Core's local layers with our norm and attention.

They run on CPU and on CUDA alike; on CUDA, PyTorch's scaled-dot-product attention picks its flash kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight tells Megatron-Core to reduce its gradient under sequence parallelism (the stock torch norm refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPAttention(MegatronModule):
    """Causal grouped-query attention by PyTorch's scaled_dot_product_attention; [S, B, heads, head_dim] in, [S, B, hidden] out."""

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **_: Any) -> torch.Tensor:
        """Attend causally. One query over a longer key is a decoding step: it sees the whole cache.

        Responses are padded on the right, so a causal mask alone keeps padding out of every real position.
        """
        assert attention_mask is None, "padding is on the right: no mask is needed"
        num_queries, num_keys = query.size(0), key.size(0)
        assert num_queries in (1, num_keys), "a cached prompt is continued one token at a time"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=num_queries > 1, scale=self.scale, enable_gqa=q.size(1) != k.size(1))
        return out.permute(2, 0, 1, 3).reshape(num_queries, query.size(1), -1)


def block_spec(config: TransformerConfig, stage: int) -> TransformerBlockSubmodules:
    """Return the layers of one pipeline stage."""
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SDPAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, None, stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
