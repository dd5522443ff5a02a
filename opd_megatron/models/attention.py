"""Causal attention by PyTorch's own kernels, with windows, soft caps, packed sequences and context parallelism; CPU and CUDA alike.

Shapes: S positions, B sequences; Q queries are the last Q of K keys' positions; A heads, R of them for each of G key-value heads; D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

# Scores of capped attention that exist at a time: with what is made of them, 128 MiB.
_MAX_SCORES = 1 << 23


class SDPAttention(MegatronModule):
    """Causal grouped-query attention; [S, B, A, D] in, [S, B, A * D] out.

    A layer may attend to its last `windows[layer]` positions alone, and cap its scores softly.
    Under context parallelism S are this rank's positions, and keys and values of all are gathered (in the backward their gradients are scattered).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_: Any,
        windows: Sequence[int | None] = (),
        softcap: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **__: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.softcap = softcap
        # Megatron-Core counts layers from 1, over all stages.
        self.window = windows[layer_number - 1] if windows else None
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
        """Attend causally. One query over a longer key is a decoding step: it sees the cache.

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
            return torch.cat([self._attend(*qkv) for qkv in zip(*(x.split(lengths) for x in (query, key, value)))])
        num_queries, num_keys = query.size(0), key.size(0)
        assert num_queries in (1, num_keys), "a cached prompt is continued one token at a time"
        return self._attend(query, key, value)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend from the last Q of K positions, [Q, B, A, D] to [K, B, G, D], each to itself and to what is before it and in its window."""
        if self.window is not None and key.size(0) >= query.size(0) + self.window:
            # What not even the first query sees.
            first = key.size(0) - query.size(0) - self.window + 1
            key, value = key[first:], value[first:]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.softcap is not None:
            scale = self.scale if self.scale is not None else q.size(-1) ** -0.5
            out = CappedAttention.apply(q.unflatten(1, (k.size(1), -1)), k, v, scale, self.softcap, self.window).flatten(1, 2)
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=q.size(1) != k.size(1), **self._causality(q, k.size(2)))
        return out.permute(2, 0, 1, 3).flatten(2)

    def _causality(self, query: torch.Tensor, num_keys: int) -> dict[str, Any]:
        """Return how scaled_dot_product_attention is told which keys a query sees."""
        num_queries = query.size(2)
        if num_queries == 1:
            return {}
        if self.window is not None and num_keys > self.window:
            return {"attn_mask": visible_keys(num_keys - num_queries, num_queries, num_keys, self.window, query.device)}
        return {"is_causal": True} if num_queries == num_keys else {"attn_mask": causal_lower_right(num_queries, num_keys)}

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
            out.append(self._attend(part, key[:seen], value[:seen]))
        return torch.cat(out)


class CappedAttention(torch.autograd.Function):
    """softmax(cap * tanh(q k^T * scale / cap)) v, causal, which no kernel of PyTorch's scaled_dot_product_attention computes.

    q [B, G, R, Q, D] and k, v [B, G, K, D] give [B, G, R, Q, D]; scores are at least fp32, of some queries at a time, and the backward makes them again.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float, window: int | None) -> torch.Tensor:
        """Return [B, G, R, Q, D] in the dtype of q; kept for the backward are q, k and v alone."""
        ctx.save_for_backward(q, k, v)
        ctx.settings = scale, softcap, window
        out = torch.empty_like(q)
        for rows, seen in _query_chunks(q, k):
            prob, _ = _capped_probabilities(q[..., rows, :], k[:, :, None, :seen], scale, softcap, window)
            out[..., rows, :] = prob.to(v.dtype) @ v[:, :, None, :seen]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of q [B, G, R, Q, D] and of k, v [B, G, K, D], summed over the R heads of a group; numbers have none."""
        q, k, v = ctx.saved_tensors
        scale, softcap, window = ctx.settings
        grad_q, (grad_k, grad_v) = torch.empty_like(q), (torch.zeros_like(x, dtype=_score_dtype(q)) for x in (k, v))
        for rows, seen in _query_chunks(q, k):
            prob, capped = _capped_probabilities(q[..., rows, :], k[:, :, None, :seen], scale, softcap, window)
            own = grad[..., rows, :]
            grad_v[:, :, :seen] += (prob.to(v.dtype).mT @ own).sum(dim=2)
            grad_prob = (own @ v[:, :, None, :seen].mT).to(prob.dtype)
            # d softmax, then d cap * tanh(x / cap) = 1 - (cap * tanh(x / cap) / cap)^2; where the mask hides a key its probability is 0.
            grad_score = prob * (grad_prob - (grad_prob * prob).sum(dim=-1, keepdim=True)) * (1 - (capped / softcap).square()) * scale
            grad_score = grad_score.to(q.dtype)
            grad_q[..., rows, :] = grad_score @ k[:, :, None, :seen]
            grad_k[:, :, :seen] += (grad_score.mT @ q[..., rows, :]).sum(dim=2)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _query_chunks(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, int]]:
    """Yield some queries at a time, and how many keys the last of them sees: none after itself."""
    num_queries, num_keys = q.size(-2), k.size(-2)
    step = max(1, _MAX_SCORES // (q[..., 0, 0].numel() * num_keys))
    for start in range(0, num_queries, step):
        end = min(start + step, num_queries)
        yield slice(start, end), num_keys - num_queries + end


def _capped_probabilities(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities and capped scores [B, G, R, Q, K] of the last queries of the keys' positions."""
    num_queries, num_keys = q.size(-2), k.size(-2)
    capped = (q @ k.mT).to(_score_dtype(q)).mul_(scale / softcap).tanh_().mul_(softcap)
    visible = visible_keys(num_keys - num_queries, num_queries, num_keys, window, q.device)
    return capped.masked_fill(~visible, -torch.inf).softmax(dim=-1), capped


def _score_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def visible_keys(first: int, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return [Q, K], true where a query at position `first`, `first` + 1, ... sees the key at position 0, 1, ..."""
    distance = torch.arange(first, first + num_queries, device=device)[:, None] - torch.arange(num_keys, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
