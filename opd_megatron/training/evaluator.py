"""Measures the student, and once the teacher, on the run's held-out prompts."""

from __future__ import annotations

from typing import Any

from opd_megatron.config import RunConfig
from opd_megatron.data.prompts import Prompt
from opd_megatron.evaluation.accuracy import evaluate
from opd_megatron.rollout.engine import RolloutEngine
from opd_megatron.rollout.sampling import SamplingSettings
from opd_megatron.training.recorder import Recorder
from opd_megatron.training.setup import Parts, Sources, make_sampler


class Evaluator:
    """Every rank of the student calls it alike; without held-out prompts it does nothing."""

    def __init__(self, config: RunConfig, sources: Sources, parts: Parts, recorder: Recorder) -> None:
        self._config = config
        self._sources = sources
        self._parts = parts
        self._recorder = recorder

    def measure_student(self, step: int) -> None:
        """Record the accuracy of the weights after `step` steps."""
        self._record("student", step, evaluate_held_out(self._parts.sampler, self._config, self._sources, as_teacher=False))

    def measure_teacher(self) -> None:
        """Record the accuracy to compare with; the teacher generates in its own layout, on its own ranks where it has some."""
        teacher, sources = self._parts.teacher, self._sources
        if teacher is None or not self._config.evaluation.teacher or sources.evaluation_prompts is None:
            return
        if teacher.scorer is None:
            self._record("teacher", 0, teacher.evaluate())
        else:
            with teacher.scorer.on_device():
                sampler = make_sampler(teacher.scorer.model, teacher.scorer.groups, self._config, sources.teacher_text)
                self._record("teacher", 0, evaluate_held_out(sampler, self._config, sources, as_teacher=True))

    def _record(self, who: str, step: int, record: dict[str, Any] | None) -> None:
        if record is not None:
            self._recorder.log_evaluation({"step": step, "who": who, **record})


def evaluate_held_out(sampler: RolloutEngine, config: RunConfig, sources: Sources, *, as_teacher: bool) -> dict[str, Any] | None:
    """Return accuracy and examples on rank 0 of the sampler's world; None elsewhere, and without held-out prompts.

    A privileged teacher answers what it reads in training: its accuracy is what the solutions are worth to it.
    """
    if sources.evaluation_prompts is None:
        return None
    prompts = sources.evaluation_prompts.prompts
    if as_teacher and not (prompts := _read_by_teacher(prompts)):
        return None
    settings = SamplingSettings(
        max_response_tokens=config.evaluation.max_response_tokens or config.rollout.max_response_tokens, temperature=config.evaluation.temperature
    )
    return evaluate(
        sampler,
        sampler.groups,
        prompts,
        (sources.teacher_text if as_teacher else sources.student_text).tokenizer,
        sources.grader,
        settings,
        samples_per_prompt=config.evaluation.samples_per_prompt,
        seed=config.seed,
    )


def _read_by_teacher(prompts: list[Prompt]) -> list[Prompt]:
    """Return the prompts as a teacher reads them; of a privileged one, without those that leave no room for its answer."""
    return [prompt.as_teacher_reads() for prompt in prompts if prompt.teacher_message is None or prompt.teacher_ids is not None]
