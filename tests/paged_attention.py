"""Megatron-Core's paged inference on a CPU: its own context and layers, with plain functions where it calls flash-attention and a Triton kernel.

The functions follow the contract of flash-attention 2's: pages [blocks, tokens of a block, heads, size], a row of page numbers for each sequence, causal
from the end of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _attend(query_QAD: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor], block_ids: torch.Tensor, num_keys: int, scale: float) -> torch.Tensor:
    """Return [Q, A, D] of the last Q of a sequence's positions, head by head."""
    block_tokens, num_groups = pages[0].shape[1:3]
    places = [(int(block_ids[position // block_tokens]), position % block_tokens) for position in range(num_keys)]
    key_KGD, value_KGD = (torch.stack([part[place] for place in places]) for part in pages)
    num_queries, num_heads = query_QAD.shape[:2]
    out_QAD = torch.empty_like(query_QAD)
    for query in range(num_queries):
        seen = num_keys - num_queries + query + 1
        for head in range(num_heads):
            group = head // (num_heads // num_groups)
            prob_K = (key_KGD[:seen, group] @ query_QAD[query, head] * scale).softmax(0)
            out_QAD[query, head] = prob_K @ value_KGD[:seen, group]
    return out_QAD


def paged_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """Queries [N, A, D] of several sequences, one after another; what is beyond the last of them is padding."""
    assert causal
    bounds, num_keys = cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
    # Padding is undefined in the original as well.
    out = torch.full_like(q, 1e3)
    for row, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        assert stop - start <= max_seqlen_q
        assert num_keys[row] <= max_seqlen_k
        if stop > start:
            out[start:stop] = _attend(q[start:stop], (k, v), block_table[row], num_keys[row], softmax_scale)
    return out


def paged_decode(
    *, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache_seqlens: torch.Tensor, causal: bool, block_table: torch.Tensor, num_splits: int
) -> torch.Tensor:
    """One query [B, 1, A, D] of each sequence, at its last position; one without keys is padding."""
    assert causal
    out = torch.full_like(q, 1e3)
    for row, num_keys in enumerate(cache_seqlens.tolist()):
        if num_keys:
            out[row] = _attend(q[row], (k_cache, v_cache), block_table[row], num_keys, q.size(-1) ** -0.5)
    return out


@contextmanager
def paged_attention_on_cpu() -> Iterator[None]:
    """Have Megatron-Core's dynamic inference call these functions, and append to its pages by its own code for machines without Triton."""
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.transformer import attention

    changes: list[tuple[Any, str, Any]] = [
        (attention, "flash_attn_varlen_func", paged_varlen),
        (attention, "flash_attn_with_kvcache", paged_decode),
        (attention, "is_fa_min_version", lambda _version: True),
        (dynamic_context, "triton_append_key_value_cache", None),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
