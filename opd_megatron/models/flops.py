"""The floating-point operations of a model's matrix products: what a model FLOP utilization counts, and nothing that is computed twice.

Two operations for a multiplication with its addition. Norms, softmax, rotary embedding and the look-up of embeddings are left out, as is usual.
"""

from __future__ import annotations

from collections.abc import Sequence

from opd_megatron.models.architecture import Architecture


def forward_flops(architecture: Architecture, num_tokens: Sequence[int], num_head_rows: float) -> float:
    """Return the operations of one forward pass over sequences of these lengths, with the LM head at `num_head_rows` positions.

    Causal attention: a token meets itself and what is before it, in a window where a layer has one. Writing a sequence token by token takes the same, as its
    cache saves the rest.
    """
    heads = architecture.num_heads * architecture.head_dim
    key_values = 2 * architecture.num_kv_heads * architecture.head_dim
    projections = architecture.hidden_size * (2 * heads + key_values)
    if architecture.experts is None:
        feed_forward = 3 * architecture.hidden_size * architecture.ffn_hidden_size
    else:
        experts = architecture.experts
        feed_forward = architecture.hidden_size * (experts.num_experts + 3 * experts.ffn_hidden_size * experts.experts_per_token)
    windows = architecture.windows or (None,) * architecture.num_layers
    pairs = sum(windows.count(window) * _pairs(length, window) for window in set(windows) for length in num_tokens)
    # Scores and their sums over values: each pair of tokens takes two products as long as all heads together.
    layers = 2 * sum(num_tokens) * architecture.num_layers * (projections + feed_forward) + 4 * pairs * heads
    return layers + head_flops(architecture, num_head_rows)


def _pairs(length: int, window: int | None) -> float:
    """Return how many pairs of a token and one that it sees a sequence has."""
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) / 2 + (length - seen) * seen


def head_flops(architecture: Architecture, num_rows: float) -> float:
    """Return the operations of the LM head at so many positions."""
    return 2.0 * num_rows * architecture.hidden_size * architecture.vocab_size
