"""What a selection did, for the record: where tokens lie in TIP's four quadrants, and the divergence of what was kept and of what was dropped.

Shapes: T tokens of the whole step. Nothing here enters the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from opd_megatron.losses.fused_head import TokenStatistics
from opd_megatron.losses.token_importance import exact_quantile


class QuadrantShares(NamedTuple):
    """Shares of the quadrants Q1 to Q4 among all tokens and among kept ones, each adding up to 1, or all 0 where there are none; thresholds in nats.

    Q1 high entropy, high divergence. Q2 high, low. Q3 low, high: confident errors. Q4 low, low: solved.
    """

    tokens: tuple[float, ...]
    kept: tuple[float, ...]
    entropy_threshold: float
    divergence_threshold: float


class KeptDivergence(NamedTuple):
    """Mean divergence of kept and of dropped tokens in nats, None where there are none."""

    kept: float | None
    dropped: float | None


def quadrant_shares(
    statistics: TokenStatistics, weights_T: torch.Tensor, *, entropy_threshold: float | None = None, divergence_threshold: float | None = None
) -> QuadrantShares:
    """Return where the tokens lie: "high" is above the threshold, which is the median of the given tokens unless a number of nats is given.

    **The medians are this project's convention.** The paper names no thresholds, so its shares (Q4 40 to 47 %, Q3 3 to 15 %) are not comparable.
    Divergence is the reverse KL. A token of weight other than 0 is kept.
    """
    entropy_T, divergence_T = (values_T.detach().double().cpu() for values_T in (statistics.student_entropy_T, statistics.reverse_kl_T))
    thresholds = [
        given if given is not None else (exact_quantile(values_T, 0.5) if values_T.numel() else 0.0)
        for given, values_T in ((entropy_threshold, entropy_T), (divergence_threshold, divergence_T))
    ]
    quadrant_T = 2 * (entropy_T <= thresholds[0]) + 1 * (divergence_T <= thresholds[1])
    return QuadrantShares(_shares(quadrant_T), _shares(quadrant_T[weights_T.detach().cpu() != 0]), *thresholds)


def _shares(quadrant_T: torch.Tensor) -> tuple[float, ...]:
    return tuple((torch.bincount(quadrant_T, minlength=4) / max(quadrant_T.numel(), 1)).tolist())


def kept_divergence(divergence_T: torch.Tensor, weights_T: torch.Tensor) -> KeptDivergence:
    """Return the mean divergence of tokens with a weight and of those without: how much of it a selection leaves out."""
    values_T, kept_T = divergence_T.detach().double(), weights_T.detach() != 0
    means = (values_T[part_T].mean().item() if part_T.any() else None for part_T in (kept_T, ~kept_T))
    return KeptDivergence(*means)
