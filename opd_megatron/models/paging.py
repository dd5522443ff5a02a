"""The paged key-value cache of the dynamic rollout engine as numbers: which models it can hold, what its blocks take, and how many steps it makes.

No torch.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

from opd_megatron.config import ParallelLayout
from opd_megatron.models.architecture import Architecture

# Tokens of prompts that enter in one step: Megatron-Core's own default, which bounds the activations.
_PREFILL_TOKENS = 16_384
# flash-attention 2 reads pages of a multiple of 256 tokens only.
BLOCK_TOKENS = 256
# Its kernels are compiled for heads of at most this size.
_LARGEST_HEAD = 256


def why_not_paged(architecture: Architecture, layout: ParallelLayout, precision: Literal["bf16", "fp32"]) -> str | None:
    """Return why Megatron-Core's paged attention cannot write with a model, or None where it can.

    It calls flash-attention itself, not the layer's core attention: what only that knows is lost.
    """
    if any(window is not None for window in architecture.windows):
        return "layers attend to a window of positions, which paged attention does not know"
    if architecture.attention_softcap is not None:
        return f"attention scores are capped at {architecture.attention_softcap}, which paged attention does not do"
    if architecture.attention_scale is not None:
        return f"attention scores are scaled by {architecture.attention_scale:.4g}, and paged attention scales by 1 / sqrt(head_dim)"
    if architecture.rope.attention_factor != 1.0:
        return f"rotated queries and keys are lengthened by {architecture.rope.attention_factor:.4g}, which the paged cache does not do"
    if architecture.head_dim > _LARGEST_HEAD or architecture.head_dim % 8:
        return f"heads have {architecture.head_dim} dimensions, and flash-attention takes multiples of 8 up to {_LARGEST_HEAD}"
    if precision != "bf16":
        return f"training.precision={precision}, and flash-attention computes in half precision only"
    if layout.virtual > 1:
        return f"layout.virtual={layout.virtual}, and Megatron-Core's paged cache takes one chunk of layers a stage"
    return None


def block_bytes(layout: ParallelLayout, *, num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Return what one block of a model takes on a rank: keys and values of its tokens, in the layers of the stage."""
    return 2 * itemsize * (num_layers // layout.pipeline) * block_tokens * (num_kv_heads // layout.tensor) * head_dim


def model_block_bytes(architecture: Architecture, layout: ParallelLayout, itemsize: int) -> int:
    """Return the same of an architecture."""
    shape = {"num_layers": architecture.num_layers, "num_kv_heads": architecture.num_kv_heads, "head_dim": architecture.head_dim}
    return block_bytes(layout, **shape, itemsize=itemsize)


def sequence_blocks(prompt_tokens: int, response_tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Return the blocks of a sequence that reaches its limit; its last token is never read, so never cached."""
    return -(-(prompt_tokens + response_tokens - 1) // block_tokens)


def num_blocks(kv_cache_gib: float | None, bytes_of_one: int, num_sequences: int, longest_blocks: int) -> int:
    """Return the blocks of a cache, the spare one among them that padding is written to.

    Without a budget, as many as `num_sequences` of the longest sequences fill.
    """
    if kv_cache_gib is None:
        return num_sequences * longest_blocks + 1
    return int(kv_cache_gib * 2**30) // bytes_of_one


def check_budget(kv_cache_gib: float | None, bytes_of_one: int, prompt_tokens: int, response_tokens: int, block_tokens: int = BLOCK_TOKENS) -> None:
    """Raise ValueError if the budget does not hold one sequence of this prompt and the longest response."""
    wanted = sequence_blocks(prompt_tokens, response_tokens, block_tokens)
    held = num_blocks(kv_cache_gib, bytes_of_one, 1, wanted) - 1
    if wanted > held:
        raise ValueError(
            f"rollout.kv_cache_gib={kv_cache_gib} holds {max(held, 0)} blocks of {block_tokens} tokens, {bytes_of_one / 2**20:.1f} MiB each, beside a spare "
            f"one, and a prompt of {prompt_tokens} tokens with a response of {response_tokens} needs {wanted}; set it to "
            f"{(wanted + 1) * bytes_of_one / 2**30:.3g} or more, or to null for room for rollout.batch_sequences of them"
        )


def step_tokens(longest_prompt: int, all_prompts: int, num_slots: int) -> int:
    """Return the most tokens of one step, of prompts that enter in it and of sequences that go on."""
    return max(longest_prompt + num_slots, min(_PREFILL_TOKENS, all_prompts))


def num_steps(num_sequences: int, prompt_tokens: int, response_tokens: int, *, num_slots: int, free_blocks: int, most_tokens: int) -> int:
    """Return the steps in which so many sequences reach their limit: how they enter, as `rollout.paged_cache` lets them."""
    together = min(num_slots, free_blocks // sequence_blocks(prompt_tokens, response_tokens))
    waiting, live, step = num_sequences, 0, 0
    # When how many of them end.
    ends: deque[tuple[int, int]] = deque()
    while waiting or live:
        entering = min(waiting, together - live, max(0, most_tokens - live) // prompt_tokens)
        if entering:
            ends.append((step + response_tokens, entering))
        waiting, live = waiting - entering, live + entering
        step += 1
        while ends and ends[0][0] == step:
            live -= ends.popleft()[1]
    return step
