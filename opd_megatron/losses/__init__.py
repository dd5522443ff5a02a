"""Same-tokenizer distillation losses over a sharded vocabulary: pure functions of tensors and process groups."""

from opd_megatron.losses.divergences import vocab_parallel_divergence
from opd_megatron.losses.fused_head import FusedDivergence, TokenStatistics, fused_head_cross_entropy, fused_head_divergence, token_statistics

__all__ = [
    "FusedDivergence",
    "TokenStatistics",
    "fused_head_cross_entropy",
    "fused_head_divergence",
    "token_statistics",
    "vocab_parallel_divergence",
]
