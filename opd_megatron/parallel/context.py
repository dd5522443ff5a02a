"""Context parallelism: which positions of a padded sequence a rank holds.

S positions are cut into 2C chunks, and context rank c holds chunks c and 2C-1-c: under a causal mask every rank then has the same work.
Megatron-Core cuts its rotary embedding the same way.
"""

from __future__ import annotations

import torch

from opd_megatron.config import ParallelLayout


def padded_length(longest: int, layout: ParallelLayout, rank_multiple: int = 1) -> int:
    """Return `longest` rounded up to what the layout can split, so that a rank's part is a multiple of `rank_multiple`."""
    multiple = layout.row_multiple * rank_multiple
    return -(-longest // multiple) * multiple


def context_rank(position_R: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """Return the context rank [R] that holds each position of a sequence of `length` positions."""
    if size == 1:
        return torch.zeros_like(position_R)
    chunk_R = position_R // (length // (2 * size))
    return torch.minimum(chunk_R, 2 * size - 1 - chunk_R)
