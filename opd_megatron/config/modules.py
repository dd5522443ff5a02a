"""Which modules of the student train, and how fast. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from opd_megatron.config.checks import require


@dataclass(frozen=True, kw_only=True)
class ModulesConfig:
    """What does not train costs no gradient, no optimizer state and no gradient message."""

    # all, measured, or what `models.modules.chosen_rows` takes: kinds and patterns with commas between, ! for all but.
    train: str = "all"
    # measured: this many plain steps are tried and taken back. Modules (one kind in one layer) are ranked by update norm per parameter, and the last ones,
    # which together have at most this share of the squared update norm, do not train.
    probe_steps: int = 8
    freeze_share: float = 0.25
    # {choice: factor} of the learning rate; a tensor that several choices name takes the last one's.
    learning_rate_factors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.train.strip()), "modules.train is empty; use all, measured, paper, or patterns")
        require(self.probe_steps >= 1, f"modules.probe_steps={self.probe_steps} must be at least 1")
        require(0 <= self.freeze_share < 1, f"modules.freeze_share={self.freeze_share} must be in [0, 1)")
        for choice, factor in self.learning_rate_factors.items():
            good = isinstance(factor, int | float) and not isinstance(factor, bool) and 0 < factor < math.inf
            require(
                good, f"modules.learning_rate_factors={{{choice!r}: {factor!r}}} must be a positive number; what shall not train is left out of modules.train"
            )
