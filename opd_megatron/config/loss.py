"""What is minimized: the divergence at every response position. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from opd_megatron.config.checks import require


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimized at every response position. `beta` is the teacher's weight in the JSD mixture (GKD)."""

    # k1 and k3 look at the sampled token alone. The expected gradient of k1 is zero, that of k3 is the one of forward_kl.
    kind: Literal[
        "reverse_kl",
        "forward_kl",
        "jsd",
        "skew_forward",
        "skew_reverse",
        "topk_tail_forward",
        "topk_tail_reverse",
        "topk_renorm_forward",
        "topk_renorm_reverse",
        "k1",
        "k3",
    ] = "reverse_kl"
    beta: float = 0.5
    # Share in the mixture of the distribution that comes first in a skewed KL; null is 0.1.
    alpha: float | None = None
    # Ids of the highest logits of the teacher, or of the student, that the top-k kinds look at; null is 64.
    top_k: int | None = None
    support: Literal["teacher", "student"] = "teacher"
    temperature: float = 1.0
    pointwise_clip: float | None = None
    # Rows of the fused LM head computed at once; None lets the head choose.
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        require(0 <= self.beta <= 1, f"loss.beta={self.beta} must be in [0, 1]")
        top_k_kind, sampled_kind = self.kind.startswith("topk"), self.kind in ("k1", "k3")
        require(self.alpha is None or self.kind.startswith("skew"), f"loss.alpha={self.alpha} belongs to skewed kinds, not to loss.kind={self.kind}")
        require(self.alpha is None or 0 <= self.alpha < 1, f"loss.alpha={self.alpha} must be in [0, 1); at 1 there is nothing to learn")
        require(self.top_k is None or top_k_kind, f"loss.top_k={self.top_k} belongs to top-k kinds, not to loss.kind={self.kind}")
        require(self.top_k is None or self.top_k >= 1, f"loss.top_k={self.top_k} must be at least 1, or null for 64")
        require(self.support == "teacher" or top_k_kind, f"loss.support={self.support} belongs to top-k kinds, not to loss.kind={self.kind}")
        require(
            self.pointwise_clip is None or not sampled_kind,
            f"loss.pointwise_clip={self.pointwise_clip} does not belong to loss.kind={self.kind}, which looks at one sampled token; set it to null",
        )
        require(0 < self.temperature < math.inf, f"loss.temperature={self.temperature} must be positive and not infinite")
        require(self.pointwise_clip is None or self.pointwise_clip > 0, f"loss.pointwise_clip={self.pointwise_clip} must be positive, or null for none")
        require(self.chunk_tokens is None or self.chunk_tokens >= 1, f"loss.chunk_tokens={self.chunk_tokens} must be at least 1, or null")
