"""Same-tokenizer distillation losses over a sharded vocabulary, and which tokens they count: pure functions of tensors and process groups."""

from opd_megatron.losses.divergences import vocab_parallel_divergence
from opd_megatron.losses.fused_head import FusedDivergence, TokenStatistics, fused_head_cross_entropy, fused_head_divergence, token_statistics
from opd_megatron.losses.importance_metrics import KeptDivergence, QuadrantShares, kept_divergence, quadrant_shares
from opd_megatron.losses.token_importance import Selection, SelectionRule, TokenWeights, position_weights, select_tokens, token_selection, token_weights

__all__ = [
    "FusedDivergence",
    "KeptDivergence",
    "QuadrantShares",
    "Selection",
    "SelectionRule",
    "TokenStatistics",
    "TokenWeights",
    "fused_head_cross_entropy",
    "fused_head_divergence",
    "kept_divergence",
    "position_weights",
    "quadrant_shares",
    "select_tokens",
    "token_selection",
    "token_statistics",
    "token_weights",
    "vocab_parallel_divergence",
]
