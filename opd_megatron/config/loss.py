"""What is minimized: the divergence at a response position, which positions count, and how much. Standard library only."""

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
    # token: mean over all kept tokens of the step. sequence: mean over its responses of each one's mean. auto: sequence where position weights are
    # enabled, as PW-OPSD, else token.
    reduction: Literal["auto", "token", "sequence"] = "auto"
    # What the weighted sum is divided by: kept tokens, their position weights, or all response tokens (a lower ratio is then a lower learning rate).
    denominator: Literal["kept", "weights", "all"] = "kept"
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


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """Which response tokens are worth a loss: TIP (arXiv 2604.14084) and its baselines. Defaults are the paper's reading."""

    # soft_or_topk is TIP; bottom_topk keeps what it would drop, as a control.
    rule: Literal["all", "entropy_sample", "entropy_topk", "soft_or_topk", "q3_topk", "div_topk", "bottom_topk"] = "all"
    # Share of the tokens that is kept; without effect under rule=all.
    ratio: float = 0.5
    # Scores are scaled over the whole optimizer step, or within each response.
    norm_scope: Literal["step", "sequence"] = "step"
    # The best tokens of each response, or of the whole step.
    select_scope: Literal["sequence", "step"] = "sequence"
    # The divergence in the scores, whatever the loss is.
    delta: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    # Quantile at which entropies, or divergences, are cut before they are scaled; null cuts nothing.
    entropy_clip_quantile: float | None = 0.98
    delta_clip_quantile: float | None = None
    # At least this many tokens of a response, however short it is.
    min_keep: int = 0
    # entropy_sample only: draw each token by itself and divide by its probability, for an unbiased gradient with loss.denominator=all.
    importance_weights: bool = False
    # Of both models in the scores; loss.temperature is the loss's alone.
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.ratio <= 1, f"importance.ratio={self.ratio} must be in (0, 1]; importance.rule=all keeps every token")
        for name in ("entropy_clip_quantile", "delta_clip_quantile"):
            quantile = getattr(self, name)
            require(quantile is None or 0 < quantile <= 1, f"importance.{name}={quantile} must be in (0, 1], or null for none")
        require(self.min_keep >= 0, f"importance.min_keep={self.min_keep} must not be negative")
        require(0 < self.temperature < math.inf, f"importance.temperature={self.temperature} must be positive and not infinite")
        scaled = self.rule in ("soft_or_topk", "bottom_topk")
        require(
            self.delta == "reverse_kl" or scaled or self.rule == "div_topk",
            f"importance.delta={self.delta} belongs to soft_or_topk, div_topk and bottom_topk, not to importance.rule={self.rule}; set it to reverse_kl",
        )
        require(
            self.delta_clip_quantile is None or scaled,
            f"importance.delta_clip_quantile={self.delta_clip_quantile} belongs to soft_or_topk and bottom_topk, not to importance.rule={self.rule}; "
            "set it to null",
        )
        require(
            not self.importance_weights or self.rule == "entropy_sample",
            f"importance.importance_weights=true belongs to entropy_sample, not to importance.rule={self.rule}; set it to false",
        )
        require(
            not self.importance_weights or self.min_keep == 0,
            f"importance.min_keep={self.min_keep} does not go with importance.importance_weights=true, which draws every token by itself; set it to 0",
        )


@dataclass(frozen=True, kw_only=True)
class PositionWeightsConfig:
    """How much a token weighs for its place in its response (PW-OPSD, arXiv 2605.21606): from `minimum` up to 1, half way at `center`, within about `slope`.

    Made for a privileged self-teacher and responses of about 1024 tokens. With another teacher, early tokens teach most (arXiv 2606.22600).
    """

    enabled: bool = False
    minimum: float = 0.25
    center: float = 0.30
    slope: float = 0.10
    # Divide by the mean of the response; the paper's weights average 0.77 and so shrink the gradient.
    normalize: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.minimum <= 1, f"position_weights.minimum={self.minimum} must be in [0, 1]")
        require(math.isfinite(self.center), f"position_weights.center={self.center} must be a finite share of the response")
        require(0 <= self.slope < math.inf, f"position_weights.slope={self.slope} must not be negative or infinite; 0 is a step at center")
