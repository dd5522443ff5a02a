"""EffOPD: updates that are extrapolated where that helps. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from opd_megatron.config.checks import require


@dataclass(frozen=True, kw_only=True)
class EffOPDConfig:
    """After steps 1, 2, 4, 8, ... the weights go on along what they moved since the last such step, as far as a few training prompts get no worse.

    arXiv 2605.11739, section 4.1; where paper and released code differ, the default is named with the field.
    """

    enabled: bool = False
    # The steps after which it is tried; null for the powers of two.
    trigger_steps: tuple[int, ...] | None = None
    # Candidates are W + spacing * k * (W - anchor), k = 1 .. max_k; the first that is refused ends the search.
    max_k: int = 5
    spacing: float = 2.0
    # gt: a candidate must be better than the last accepted weights (released code). ge: it must not be worse (paper).
    accept: Literal["gt", "ge"] = "gt"
    # A candidate must be better by more than this.
    min_gain: float = 0.0
    # accuracy: share of responses with full marks. points: their mean mark, where graders give parts. divergence: needs no grader; minus the mean loss to the
    # teacher at the positions of one set of responses, which the weights before the search write.
    score: Literal["accuracy", "points", "divergence"] = "accuracy"
    # How many training prompts are asked, or a source of its own, named as `data.prompts` is.
    prompts: int | str = 50
    # Keep these prompts out of training.
    hold_out: bool = False
    samples_per_prompt: int = 1
    # 0 is greedy; else every candidate draws the same random numbers.
    temperature: float = 0.0
    # What moves: paper, released, or what `models.modules.chosen_rows` takes.
    modules: str = "paper"
    # Adam's moments are untouched; true begins them anew after an accepted extrapolation.
    reset_moments: bool = False

    def __post_init__(self) -> None:
        steps = self.trigger_steps
        require(
            steps is None or (len(steps) > 0 and list(steps) == sorted(set(steps)) and steps[0] >= 1),
            f"effopd.trigger_steps={steps} must be steps from 1 on, each once, in order; null for 1, 2, 4, 8, ...",
        )
        require(self.max_k >= 1, f"effopd.max_k={self.max_k} must be at least 1")
        require(0 < self.spacing < math.inf, f"effopd.spacing={self.spacing} must be a positive number")
        require(0 <= self.min_gain < math.inf, f"effopd.min_gain={self.min_gain} must be a finite number, not negative")
        require(not isinstance(self.prompts, int) or self.prompts >= 1, f"effopd.prompts={self.prompts} must be at least 1, or a source")
        require(self.prompts != "", "effopd.prompts is empty; give a number of training prompts, or a source")
        require(
            not self.hold_out or isinstance(self.prompts, int),
            f"effopd.hold_out=true keeps training prompts out of training, and effopd.prompts={self.prompts!r} is a source of its own; set it to false",
        )
        require(self.samples_per_prompt >= 1, f"effopd.samples_per_prompt={self.samples_per_prompt} must be at least 1")
        require(0 <= self.temperature < math.inf, f"effopd.temperature={self.temperature} must not be negative or infinite; 0 is greedy")
        require(
            self.samples_per_prompt == 1 or self.temperature > 0 or self.score == "divergence",
            f"effopd.samples_per_prompt={self.samples_per_prompt} greedy samples would all be equal; set effopd.temperature",
        )
        require(bool(self.modules.strip()), "effopd.modules is empty; use paper, released, or patterns")

    def is_due(self, step: int) -> bool:
        """Return whether the search follows this step."""
        if not self.enabled or step < 1:
            return False
        return step & (step - 1) == 0 if self.trigger_steps is None else step in self.trigger_steps
