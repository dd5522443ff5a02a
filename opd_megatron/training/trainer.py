"""A run from its first step to its last: the straight path of one step, and what surrounds it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from opd_megatron.config import RunConfig
from opd_megatron.data.batches import Sample
from opd_megatron.data.prompts import Prompt, response_ids
from opd_megatron.evaluation.accuracy import evaluate
from opd_megatron.parallel.world import shared_errors
from opd_megatron.rollout.engine import Sampler
from opd_megatron.rollout.rollouts import Rollouts, record_rollouts, replay_rollouts, sample_rollouts
from opd_megatron.rollout.sampling import SamplingSettings
from opd_megatron.training.batching import make_micro_batches
from opd_megatron.training.checkpoint import CheckpointFolder, Progress
from opd_megatron.training.recorder import Recorder
from opd_megatron.training.setup import Parts
from opd_megatron.training.signals import StopRequest


class Trainer:
    """Runs the steps of one configuration. Every rank has one; the recorder writes on rank 0 only."""

    def __init__(self, config: RunConfig, parts: Parts, recorder: Recorder, checkpoints: CheckpointFolder, progress: Progress) -> None:
        self.config = config
        self.parts = parts
        self.student = parts.student
        self.teacher = parts.teacher
        self.recorder = recorder
        self.checkpoints = checkpoints
        self.progress = progress
        self.stop = StopRequest(parts.device)
        self._seconds: dict[str, float] = {}

    def run(self) -> Literal["finished", "interrupted"]:
        """Train to the last step, or to the step boundary at which a stop was asked for. Either way a checkpoint is left."""
        if self.progress.step == 0:
            self._evaluate_teacher()
            self._evaluate_student()
        saved = self.progress.step
        while self.progress.step < self.config.training.steps:
            step = self.progress.step + 1
            self.recorder.log_step(self.step(step))
            if self._is_due(self.config.evaluation.every_steps) and step < self.config.training.steps:
                self._evaluate_student()
            if self._is_due(self.config.checkpoint.every_steps):
                self.checkpoints.save(self.student, self.progress)
                saved = step
            if step < self.config.training.steps and self.stop.agreed():
                if saved < step:
                    self.checkpoints.save(self.student, self.progress)
                return "interrupted"
        if saved < self.progress.step or self.checkpoints.latest() is None:
            self.checkpoints.save(self.student, self.progress)
        self._evaluate_student()
        return "finished"

    def step(self, step: int) -> dict[str, float | int]:
        """One optimizer step; returns its metrics, equal on every rank."""
        self._seconds = {}
        started = time.perf_counter()
        prompts = self.parts.prompts.batch(step - 1, self.config.data.batch_prompts, self.config.seed)
        with self._timed("rollout"):
            rollouts = self._write(step, prompts)
        with self._timed("teacher"):
            teacher_hidden = self.teacher.score(rollouts) if self.teacher is not None else {}
        with self._timed("train"):
            sums, norm, updated = self.student.train_step(make_micro_batches(self.student, rollouts, teacher_hidden), self.parts.objective)
        self._advance(step, updated, sums.loss, norm)
        step_seconds = time.perf_counter() - started
        return {
            "step": step,
            "loss": sums.mean_loss,
            "divergence": sums.per_token(sums.divergence),
            "student_entropy": sums.per_token(sums.entropy),
            "kept_fraction": sums.per_token(sums.weight),
            "response_tokens": rollouts.num_response_tokens,
            "response_length_mean": rollouts.num_response_tokens / len(rollouts.samples),
            "truncated_fraction": sum(not sample.finished for sample in rollouts.samples) / len(rollouts.samples),
            "grad_norm": norm,
            "lr": self.student.learning_rate,
            "skipped_steps": self.progress.skipped_steps,
            "rollout_drift_mean": sums.per_token(sums.drift),
            "rollout_drift_max": sums.drift_max,
            "payload_bytes_per_token": (self.teacher.payload_bytes if self.teacher else 0) / max(1, rollouts.num_response_tokens),
            "tokens_per_second": sum(sample.num_tokens for sample in rollouts.samples) / step_seconds,
            **{f"{phase}_seconds": seconds for phase, seconds in self._seconds.items()},
            "step_seconds": step_seconds,
        }

    def _write(self, step: int, prompts: list[Prompt]) -> Rollouts:
        """Return the step's samples: written by the student, replayed from a record, or the reference answers."""
        config = self.config
        if config.training.objective == "sft":
            return self._reference_answers(prompts)
        if config.rollout.replay:
            with shared_errors():
                rollouts = replay_rollouts(Path(config.rollout.replay) / "rollouts" / f"step_{step}.jsonl")
                if len(rollouts.samples) != config.num_sequences:
                    raise ValueError(f"{config.rollout.replay} recorded {len(rollouts.samples)} samples for step {step}, this run takes {config.num_sequences}")
            return rollouts
        settings = SamplingSettings(
            max_response_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
        )
        rollouts = sample_rollouts(
            self.parts.sampler,
            self.student.groups,
            [(prompt.index, prompt.ids) for prompt in prompts],
            settings,
            samples_per_prompt=config.rollout.samples_per_prompt,
            key=(config.seed, step),
            policy_version=step - 1,
        )
        if config.rollout.record and dist.get_rank() == 0:
            record_rollouts(rollouts, self.recorder.directory.rollouts / f"step_{step}.jsonl")
        return rollouts

    def _reference_answers(self, prompts: list[Prompt]) -> Rollouts:
        samples = [
            Sample(prompt.index, 0, torch.tensor(prompt.ids), torch.tensor(response_ids(prompt, self.parts.tokenizer)), None, True) for prompt in prompts
        ]
        return Rollouts(tuple(samples), policy_version=self.progress.step)

    def _advance(self, step: int, updated: bool, loss: float, norm: float) -> None:
        """Count the step; end the run when too many in a row changed nothing."""
        in_a_row = 0 if updated else self.progress.skipped_in_a_row + 1
        self.progress = dataclasses.replace(self.progress, step=step, skipped_steps=self.progress.skipped_steps + (not updated), skipped_in_a_row=in_a_row)
        if not updated:
            self.recorder.note(f"step {step} changed nothing: loss sum {loss}, gradient norm {norm}")
        if in_a_row >= self.config.training.max_skipped_steps:
            raise RuntimeError(
                f"{in_a_row} steps in a row were skipped, the last with loss sum {loss} and gradient norm {norm}; "
                "lower training.learning_rate, or resume from an earlier checkpoint"
            )

    def _is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.progress.step % every_steps == 0

    def _evaluate_student(self) -> None:
        self._evaluate("student", self.parts.sampler, self.student.groups)

    def _evaluate_teacher(self) -> None:
        if self.teacher is None or not self.config.evaluation.teacher:
            return
        sampler = Sampler(
            self.teacher.model,
            self.teacher.groups,
            vocab_size=self.parts.vocab_size,
            eos_ids=self.parts.eos_ids,
            batch_sequences=self.config.rollout.batch_sequences,
        )
        self._evaluate("teacher", sampler, self.teacher.groups)

    def _evaluate(self, who: str, sampler: Sampler, groups: Any) -> None:
        if self.parts.evaluation_prompts is None:
            return
        evaluation = self.config.evaluation
        settings = SamplingSettings(
            max_response_tokens=evaluation.max_response_tokens or self.config.rollout.max_response_tokens, temperature=evaluation.temperature
        )
        record = evaluate(
            sampler,
            groups,
            self.parts.evaluation_prompts.prompts,
            self.parts.tokenizer,
            self.parts.grader,
            settings,
            samples_per_prompt=evaluation.samples_per_prompt,
            seed=self.config.seed,
        )
        if record is not None:
            self.recorder.log_evaluation({"step": self.progress.step, "who": who, **record})

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        torch.cuda.synchronize()
        started = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self._seconds[phase] = time.perf_counter() - started
