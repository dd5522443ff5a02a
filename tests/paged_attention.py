"""Megatron-Core's paged inference on a CPU: its own context and layers, with plain functions where it calls flash-attention and a Triton kernel.

The functions follow the contract of flash-attention 2's: pages [blocks, tokens of a block, heads, size], a row of page numbers for each sequence, causal
from the end of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from opd_megatron.parallel.megatron import makes_paged_caches

needs_paged_caches = pytest.mark.skipif(not makes_paged_caches(), reason="needs megatron-core 0.16: newer versions make their paged cache in another way")


def _attend(query_QAD: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor], block_ids: torch.Tensor, num_keys: int, scale: float) -> torch.Tensor:
    """Return [Q, A, D] of the last Q of a sequence's positions."""
    num_blocks = -(-num_keys // pages[0].size(1))
    heads_of_group = query_QAD.size(1) // pages[0].size(2)
    key_KAD, value_KAD = (part[block_ids[:num_blocks].long()].flatten(0, 1)[:num_keys].repeat_interleave(heads_of_group, dim=1) for part in pages)
    score_AQK = torch.einsum("qad,kad->aqk", query_QAD, key_KAD) * scale
    query_Q1 = torch.arange(num_keys - query_QAD.size(0), num_keys)[:, None]
    prob_AQK = score_AQK.masked_fill(torch.arange(num_keys) > query_Q1, -torch.inf).softmax(-1)
    return torch.einsum("aqk,kad->qad", prob_AQK, value_KAD)


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
    for row, (start, stop) in enumerate(pairwise(bounds)):
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
