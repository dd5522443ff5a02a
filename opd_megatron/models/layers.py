"""Transformer layers that need neither Transformer Engine nor Apex: Megatron-Core's local layers with our norm and attention.

They run on CPU and on CUDA alike; on CUDA, PyTorch's scaled-dot-product attention picks its flash kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight tells Megatron-Core to reduce its gradient under sequence parallelism (the stock torch norm refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPAttention(MegatronModule):
    """Causal grouped-query attention by PyTorch's scaled_dot_product_attention; [S, B, heads, head_dim] in, [S, B, hidden] out.

    Under context parallelism S are this rank's positions, and keys and values of all are gathered (in the backward their gradients are scattered).
    """

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, pg_collection: Any = None, **__: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attend causally. One query over a longer key is a decoding step: it sees the whole cache.

        Responses are padded on the right, so a causal mask alone keeps padding out of every real position. Packed sequences come without B, and each is
        attended on its own.
        """
        assert attention_mask is None, "padding is on the right: no mask is needed"
        size = self.cp_group.size() if self.cp_group is not None else 1
        lengths = [query.size(0)]
        if packed_seq_params is not None:
            lengths = [length // size for length in packed_seq_params.cu_seqlens_q.diff().tolist()]
            query, key, value = (x[:, None] for x in (query, key, value))
        if size > 1:
            return self._over_context(query, key, value, lengths)
        if packed_seq_params is not None:
            return torch.cat([self._attend(*qkv, is_causal=True) for qkv in zip(*(x.split(lengths) for x in (query, key, value)))])
        num_queries, num_keys = query.size(0), key.size(0)
        assert num_queries in (1, num_keys), "a cached prompt is continued one token at a time"
        return self._attend(query, key, value, is_causal=num_queries > 1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **causality: Any) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=q.size(1) != k.size(1), **causality)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _over_context(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Attend from this rank's two chunks of every sequence, each to everything before it and to itself causally; `lengths` are of these chunks."""
        gathered = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1).contiguous(), group=self.cp_group)
        parts = gathered.unflatten(0, (self.cp_group.size(), key.size(0))).split(lengths, dim=1)
        return torch.cat([self._own_chunks(own, pairs, key.size(-1)) for own, pairs in zip(query.split(lengths), parts)])

    def _own_chunks(self, query: torch.Tensor, gathered: torch.Tensor, key_width: int) -> torch.Tensor:
        """Attend within one sequence; `gathered` [C, two chunks, ...] are the keys and values of every context rank."""
        size, rank, chunk = self.cp_group.size(), self.cp_group.rank(), query.size(0) // 2
        # Each rank sent its chunk c, then its chunk 2C-1-c.
        pairs = gathered.unflatten(1, (2, chunk))
        key, value = torch.cat([pairs[:, 0], pairs[:, 1].flip(0)]).flatten(0, 1).split([key_width, gathered.size(-1) - key_width], dim=-1)
        out = []
        for number, part in zip((rank, 2 * size - 1 - rank), query.split(chunk)):
            seen = (number + 1) * chunk
            out.append(self._attend(part, key[:seen], value[:seen], attn_mask=causal_lower_right(chunk, seen)))
        return torch.cat(out)


def packed_sequences(lengths: Sequence[int]) -> PackedSeqParams:
    """Return how Megatron-Core is told where the sequences of a packed row begin; their lengths are those before a split over context ranks.

    The boundaries stay on the host: rotary embedding and attention read them as numbers, which from a GPU would cost a synchronization each time.
    """
    boundaries = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device="cpu")
    longest = max(lengths)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest)


def block_spec(config: TransformerConfig, stage: int, chunk: int | None) -> TransformerBlockSubmodules:
    """Return the layers of one pipeline stage, or of one of its chunks."""
    layer: ModuleSpec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    if config.num_moe_experts is not None:
        _route_without_transformer_engine()
        # Transformer Engine's layers fuse this norm into no expert, so checkpoints know it by its own name.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SDPAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, chunk, stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _route_without_transformer_engine() -> None:
    """Let a router compute without Transformer Engine: 0.16.1 asks `te_general_gemm is not None` of a name it then never bound. Delete from 0.17."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
