"""Measures the student, and once the teacher, on the run's held-out prompts."""

from __future__ import annotations

from opd_megatron.config import RunConfig
from opd_megatron.evaluation.accuracy import evaluate
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.rollout.engine import Sampler
from opd_megatron.rollout.sampling import SamplingSettings
from opd_megatron.teacher.teacher import Teacher
from opd_megatron.training.recorder import Recorder
from opd_megatron.training.setup import Parts, Sources


class Evaluator:
    """Every rank calls it alike; without held-out prompts it does nothing."""

    def __init__(self, config: RunConfig, sources: Sources, parts: Parts, recorder: Recorder) -> None:
        self._config = config
        self._sources = sources
        self._parts = parts
        self._recorder = recorder
        self._settings = SamplingSettings(
            max_response_tokens=config.evaluation.max_response_tokens or config.rollout.max_response_tokens, temperature=config.evaluation.temperature
        )

    def measure_student(self, step: int) -> None:
        """Record the accuracy of the weights after `step` steps."""
        self._measure("student", self._parts.sampler, self._parts.student.groups, step)

    def measure_teacher(self) -> None:
        """Record the accuracy to compare with; the teacher generates in its own layout."""
        teacher = self._parts.teacher
        if teacher is not None and self._config.evaluation.teacher:
            with teacher.on_device():
                self._measure("teacher", self._teacher_sampler(teacher), teacher.groups, step=0)

    def _teacher_sampler(self, teacher: Teacher) -> Sampler:
        vocab_size, eos_ids, batch = self._sources.vocab_size, self._sources.eos_ids, self._config.rollout.batch_sequences
        return Sampler(teacher.model, teacher.groups, vocab_size=vocab_size, eos_ids=eos_ids, batch_sequences=batch)

    def _measure(self, who: str, sampler: Sampler, groups: ModelGroups, step: int) -> None:
        if self._sources.evaluation_prompts is None:
            return
        record = evaluate(
            sampler,
            groups,
            self._sources.evaluation_prompts.prompts,
            self._sources.tokenizer,
            self._sources.grader,
            self._settings,
            samples_per_prompt=self._config.evaluation.samples_per_prompt,
            seed=self._config.seed,
        )
        if record is not None:
            self._recorder.log_evaluation({"step": step, "who": who, **record})
