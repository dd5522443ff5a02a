"""How good the student's weights are while EffOPD tries others: by answers to a few prompts, or by the loss to the teacher."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from opd_megatron.config import DataConfig, EffOPDConfig, RunConfig
from opd_megatron.data.prompts import Prompt, PromptSet
from opd_megatron.evaluation.accuracy import answer
from opd_megatron.parallel.world import agreed_by_rank_0
from opd_megatron.rollout.engine import RolloutEngine
from opd_megatron.rollout.rollouts import Rollouts, WriterPrompt, sample_rollouts
from opd_megatron.rollout.sampling import SamplingSettings
from opd_megatron.teacher.teacher import Teacher
from opd_megatron.training.objective import Objective
from opd_megatron.training.student import Student


@dataclass(frozen=True)
class Scored:
    """A score, the higher the better, the same on every rank. `marks` are those of the prompts that it is the mean of, where it is one."""

    score: float
    marks: tuple[float, ...] = ()
    num_responses: int = 0


# A score of the weights as they are; every rank of the student calls it alike, and for equal weights it is the same.
Measure = Callable[[], Scored]


class SearchScore(Protocol):
    """What `effopd.score` names."""

    def begin(self, step: int) -> Measure:
        """Return what scores candidates after this step; every rank calls it while the student has the weights that the search begins with."""
        ...


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """The mean mark of answers: each candidate reads the same prompts, and where it samples, draws the same random numbers."""

    config: RunConfig
    sampler: RolloutEngine
    prompts: PromptSet
    tokenizer: Any
    grader: Callable[[Prompt, str], float]

    def begin(self, step: int) -> Measure:
        return lambda: self._measure(step)

    def _measure(self, step: int) -> Scored:
        effopd, num = self.config.effopd, self.config.effopd.samples_per_prompt
        settings = SamplingSettings(max_response_tokens=self.config.rollout.max_response_tokens, temperature=effopd.temperature)
        answers = answer(
            self.sampler,
            self.prompts.prompts,
            self.tokenizer,
            self.grader,
            settings,
            samples_per_prompt=num,
            key=(self.config.seed, "effopd", step),
        )
        marks: tuple[float, ...] = ()
        if answers is not None:
            points = [float(mark >= 1.0) if effopd.score == "accuracy" else mark for mark in answers.marks]
            marks = tuple(sum(points[first : first + num]) / num for first in range(0, len(points), num))
        # Rank 0 grades, all hear of it.
        marks = agreed_by_rank_0(marks)
        return Scored(sum(marks) / len(marks), marks, len(marks) * num)


@dataclass(frozen=True, kw_only=True)
class DivergenceScore:
    """Minus the mean loss to the teacher at the positions of one set of responses, which the weights before the search wrote: no grader is asked."""

    config: RunConfig
    sampler: RolloutEngine
    student: Student
    teacher: Teacher
    align: Callable[[Rollouts], Rollouts]
    objective: Objective
    prompts: PromptSet

    def begin(self, step: int) -> Measure:
        """Return the loss to the teacher, on responses that the weights of this moment write and the teacher scores once."""
        rollout = self.config.rollout
        rollouts = self.align(
            sample_rollouts(
                self.sampler,
                self.sampler.groups,
                [WriterPrompt(prompt.index, prompt.ids, prompt.teacher_ids) for prompt in self.prompts.prompts],
                SamplingSettings(max_response_tokens=rollout.max_response_tokens, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k),
                samples_per_prompt=self.config.effopd.samples_per_prompt,
                key=(self.config.seed, "effopd", step),
                policy_version=step,
            )
        )
        micro_batches = self.student.micro_batches(rollouts, self.teacher.score(rollouts))

        def measure() -> Scored:
            sums = self.student.measure(micro_batches, self.objective)
            loss = sums.per_token(sums.loss) if sums.rows else math.nan
            return Scored(agreed_by_rank_0(-loss), num_responses=len(rollouts.samples))

        return measure


def drawn_prompts(prompts: PromptSet, effopd: EffOPDConfig, data: DataConfig, seed: int) -> tuple[PromptSet, PromptSet]:
    """Return (the prompts that candidates are scored on, those that are left to train on): a sample drawn from the seed; ValueError if there are too few."""
    assert isinstance(effopd.prompts, int)
    if len(prompts) < effopd.prompts + effopd.hold_out:
        beside = " and leave one to train on (effopd.hold_out=true)" if effopd.hold_out else ""
        raise ValueError(
            f"effopd.prompts={effopd.prompts} are more than the {len(prompts)} training prompts of data.prompts={data.prompts!r} can give{beside}; "
            "ask for fewer, or name a source of their own"
        )
    places = sorted(random.Random(f"{seed}/effopd").sample(range(len(prompts)), effopd.prompts))
    drawn = replace(prompts, prompts=[prompts.prompts[place] for place in places], num_dropped_long=0, num_dropped_privileged=0)
    if not effopd.hold_out:
        return drawn, prompts
    # The same prompt may stand in the source more than once.
    asked = {_text(prompt) for prompt in drawn.prompts}
    left = [prompt for prompt in prompts.prompts if _text(prompt) not in asked]
    if not left:
        raise ValueError(f"effopd.hold_out=true leaves no prompt of data.prompts={data.prompts!r} to train on: all repeat the {effopd.prompts} held out")
    return drawn, replace(prompts, prompts=left)


def _text(prompt: Prompt) -> str:
    return json.dumps(prompt.messages, sort_keys=True)
