"""The dynamic engine: continuous batching over a paged cache. Finished sequences leave, and waiting ones enter, at every step.

On a GPU it needs flash-attention; the tests run it on the CPU with a plain paged attention in its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from opd_megatron.models.forward import forward_paged, inference_mode
from opd_megatron.models.gpt import ModelChunks
from opd_megatron.models.paging import BLOCK_TOKENS, block_bytes, check_budget, num_blocks, sequence_blocks
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.rollout.decode_graphs import DecodeGraphs
from opd_megatron.rollout.engine import Response
from opd_megatron.rollout.next_token import NextToken
from opd_megatron.rollout.paged_cache import PagedCache
from opd_megatron.rollout.sampling import SamplingSettings, uniform_stream


class DynamicSampler:
    """The model as it is, and a cache that lives as long as one `generate`: its memory is training's again afterwards."""

    def __init__(
        self,
        model: ModelChunks,
        groups: ModelGroups,
        *,
        vocab_size: int,
        eos_ids: Sequence[int],
        batch_sequences: int,
        kv_cache_gib: float | None = None,
        cuda_graphs: bool = False,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.model = model
        self.groups = groups
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.batch_sequences = batch_sequences
        self.kv_cache_gib = kv_cache_gib
        self.block_tokens = block_tokens
        self._has_graphs = cuda_graphs
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._next = NextToken(model=model, groups=groups, vocab_size=vocab_size, device=self.device)

    def generate(self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int | str, ...]], settings: SamplingSettings) -> list[Response]:
        """Return one response per prompt, in order: what the static engine writes, whatever enters when. ValueError for a prompt that never fits."""
        with inference_mode(self.model, self.groups):
            if not prompts:
                return []
            cache = self._make_cache([len(prompt) for prompt in prompts], settings.max_response_tokens)
            try:
                return self._write(cache, prompts, keys, settings)
            finally:
                cache.free()

    def _make_cache(self, prompt_tokens: Sequence[int], response_tokens: int) -> PagedCache:
        longest, config = max(prompt_tokens), self.model.config
        bytes_of_one = block_bytes(
            self.groups.layout,
            num_layers=config.num_layers,
            num_kv_heads=config.num_query_groups,
            head_dim=config.kv_channels,
            itemsize=config.params_dtype.itemsize,
            block_tokens=self.block_tokens,
        )
        check_budget(self.kv_cache_gib, bytes_of_one, longest, response_tokens, self.block_tokens)
        slots = min(self.batch_sequences, len(prompt_tokens))
        return PagedCache(
            self.model,
            self.groups,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            num_slots=slots,
            num_blocks=num_blocks(self.kv_cache_gib, bytes_of_one, slots, sequence_blocks(longest, response_tokens, self.block_tokens)),
            block_bytes=bytes_of_one,
            block_tokens=self.block_tokens,
            graphed=self._has_graphs,
        )

    def _write(self, cache: PagedCache, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int | str, ...]], settings: SamplingSettings) -> list[Response]:
        limit, graphs = settings.max_response_tokens, DecodeGraphs() if self._has_graphs and torch.cuda.is_available() else None
        uniform_BR = torch.stack([uniform_stream(limit, *key) for key in keys])
        ids: list[list[int]] = [[] for _ in prompts]
        logp: list[list[float]] = [[] for _ in prompts]
        waiting, num_left = deque(range(len(prompts))), len(prompts)
        while num_left:
            # In the order of the prompts: a long one that waits is not overtaken for ever.
            while waiting and cache.try_to_add(waiting[0], prompts[waiting[0]]):
                waiting.popleft()
            indices = cache.begin_step()
            size = cache.graphed_tokens
            hidden_1NH = forward_paged(self.model, self.groups, cache.context, graphs.of_size(size) if graphs is not None and size is not None else None)
            hidden_BH = cache.last_hidden(hidden_1NH) if hidden_1NH is not None else None
            token_B, logp_B = self._next.draw(hidden_BH, uniform_BR[indices, [len(ids[index]) for index in indices]], settings)
            for index, token, value in zip(indices, token_B.tolist(), logp_B.tolist(), strict=True):
                ids[index].append(token)
                logp[index].append(value)
            done = [ids[index][-1] in self.eos_ids or len(ids[index]) == limit for index in indices]
            cache.end_step(indices, token_B, done)
            num_left -= sum(done)
        return [Response(torch.tensor(own), torch.tensor(values), own[-1] in self.eos_ids) for own, values in zip(ids, logp, strict=True)]
