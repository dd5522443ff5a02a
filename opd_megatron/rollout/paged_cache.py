"""Megatron-Core's paged key-value cache as one rollout uses it: sequences come and go, and each has the blocks of its longest text set aside.

Shapes: B sequences of a step, N their tokens, padded, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.sampling_params import SamplingParams

from opd_megatron.models.gpt import ModelChunks
from opd_megatron.models.paging import sequence_blocks, step_tokens
from opd_megatron.parallel.groups import ModelGroups

# Padded batch sizes that a decoding step is recorded for, evenly spaced.
_MOST_GRAPHS = 16


class PagedCache:
    """One `DynamicInferenceContext`. Every rank of a replica makes the same calls, so all of them hold the same sequences in the same order."""

    def __init__(
        self,
        model: ModelChunks,
        groups: ModelGroups,
        *,
        prompt_tokens: Sequence[int],
        response_tokens: int,
        num_slots: int,
        num_blocks: int,
        block_bytes: int,
        block_tokens: int,
        graphed: bool,
    ) -> None:
        """Allocate `num_blocks` blocks, the spare one among them, for prompts of these lengths, at most `num_slots` of them at a time."""
        config, longest = model.config, max(prompt_tokens)
        self._response_tokens = response_tokens
        self._block_tokens = block_tokens
        self._num_slots = num_slots
        most_tokens = step_tokens(longest, sum(prompt_tokens), num_slots)
        self.context = DynamicInferenceContext(
            params_dtype=config.params_dtype,
            num_layers=config.num_layers // groups.layout.pipeline,
            kv_channels=config.kv_channels,
            num_attention_heads=config.num_query_groups,
            max_sequence_length=longest + response_tokens,
            # A power of two divides exactly, so the context counts the same blocks.
            buffer_size_gb=num_blocks * block_bytes / 2**30,
            max_requests=num_slots,
            # A step is padded to this multiple, beyond which its buffers must not end.
            max_tokens=DynamicInferenceContext.round_up_tokens(most_tokens),
            block_size_tokens=block_tokens,
            tensor_model_parallel_size=groups.layout.tensor,
            pipeline_model_parallel_size=groups.layout.pipeline,
            pg_collection=groups.collection,
            # Steps of fewer than 8 sequences differ by less than its rounding.
            num_cuda_graphs=min(_MOST_GRAPHS, max(1, num_slots // 8)) if graphed else None,
            use_cuda_graphs_for_non_decode_steps=False,
            materialize_only_last_token_logits=False,
        )
        # FlashAttention 3, which Megatron-Core prefers where it is, multiplies what lies behind a sequence's end in its last page by 0: it must be a number.
        # https://github.com/Dao-AILab/flash-attention/issues/2374
        self.context.memory_buffer.zero_()
        self._free_blocks = self.context.block_allocator.total_count - 1
        self._reserved: dict[int, int] = {}

    def try_to_add(self, index: int, prompt: Sequence[int]) -> bool:
        """Let a sequence enter the next step, if a slot, the blocks of its longest response, and room for its prompt in that step are free.

        Blocks are set aside whole: a sequence that has begun always ends, and none is evicted to be computed again.
        """
        blocks = sequence_blocks(len(prompt), self._response_tokens, self._block_tokens)
        has_room = self.context.active_token_count + len(prompt) <= self.context.max_tokens
        if len(self._reserved) == self._num_slots or blocks > self._free_blocks or not has_room:
            return False
        parameters = SamplingParams(num_tokens_to_generate=self._response_tokens, termination_id=-1)
        self.context.add_request(DynamicInferenceRequest(request_id=index, prompt_tokens=torch.tensor(prompt), sampling_params=parameters))
        self._free_blocks -= blocks
        self._reserved[index] = blocks
        return True

    def begin_step(self) -> list[int]:
        """Make ready for a forward pass; return the sequences in the order in which the step has them."""
        self.context.initialize_attention_state()
        if not self.context.is_decode_only():
            # With prompts of one token alone, flash-attn would take the step for one of decoding, in which rows are sequences. As Megatron does for graphs.
            state = self.context.active_attn_metadata["mha_metadata"].state_data
            state["max_seqlen_q"] = max(2, state["max_seqlen_q"])
        assert self.context.paused_request_count == 0, "blocks were set aside for every sequence"
        indices: list[int] = self.context.request_ids[: self.context.total_request_count].tolist()
        return indices

    @property
    def graphed_tokens(self) -> int | None:
        """The tokens that the step was padded to, if that is one of the sizes to record."""
        return self.context.padded_active_token_count if self.context.using_cuda_graph_this_step() else None

    def last_hidden(self, hidden_1NH: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [B, H] of each sequence's last token."""
        last_BH: torch.Tensor = self.context.last_token_logits(hidden_1NH)
        return last_BH

    def end_step(self, indices: Sequence[int], token_B: torch.Tensor, done: Sequence[bool]) -> None:
        """Append each sequence's new token, and let those that are done go."""
        active_B = torch.tensor([not one for one in done], dtype=torch.uint8, device=token_B.device)
        # The context reorders the tokens in place.
        self.context.update_requests(active_B, token_B.clone())
        for index in (index for index, ended in zip(indices, done, strict=True) if ended):
            self._free_blocks += self._reserved.pop(index)

    def free(self) -> None:
        """Give the memory back: the context and its allocator hold one another until Python's next collection of circles."""
        self.context.deallocate_all_tensors()
