"""A run from its first step to its last: the straight path of one step, and what surrounds it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch.distributed as dist

from opd_megatron.config import RunConfig
from opd_megatron.data.prompts import PromptSet
from opd_megatron.reporting.cause import leave_cause
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.training.alignment import ALIGNMENT_TROUBLES, AlignmentTrouble
from opd_megatron.training.checkpoint import CheckpointFolder, Progress
from opd_megatron.training.clock import StepClock, StragglerWatch
from opd_megatron.training.evaluator import Evaluator
from opd_megatron.training.free_memory import naming_memory
from opd_megatron.training.recorder import Recorder
from opd_megatron.training.setup import Parts
from opd_megatron.training.signals import StopRequest
from opd_megatron.training.student import LossSums
from opd_megatron.training.watchdog import Watchdog

_PHASES = ("rollout", "align", "teacher", "weigh", "train", "probe")
# In which replicas do not wait for one another before the end.
_INDEPENDENT_PHASES = ("rollout", "align", "teacher")


class Trainer:
    """Runs the steps of one configuration. Every rank has one; the recorder writes on rank 0 only."""

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptSet,
        parts: Parts,
        recorder: Recorder,
        evaluator: Evaluator,
        checkpoints: CheckpointFolder,
        progress: Progress,
        ahead: Rollouts | None,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.student = parts.student
        self.teacher = parts.teacher
        self.write = parts.write
        self.align = parts.align
        self.objective = parts.objective
        self.importance = parts.importance
        self.search = parts.search
        self.recorder = recorder
        self.evaluator = evaluator
        self.checkpoints = checkpoints
        self.progress = progress
        self.stop = stop
        self._writes_ahead = config.teacher is not None and config.teacher.staleness > 0 and self.teacher is not None
        self._ahead = self.align(ahead) if self._writes_ahead and ahead is not None else None
        self.clock = StepClock(_PHASES, parts.student.device)
        self.throughput = parts.throughput
        self._stragglers = StragglerWatch(_INDEPENDENT_PHASES)
        self._saved_step = progress.step
        self._watchdog = Watchdog(config.training.watchdog_seconds, dist.get_rank(), leave_cause)
        self._unsaid = list(ALIGNMENT_TROUBLES) if not config.alignment.is_identity else []

    def run(self) -> Literal["finished", "interrupted"]:
        """Train to the last step, or to the step boundary at which a stop was asked for. Either way a checkpoint is left."""
        try:
            with naming_memory(lambda: self._watchdog.doing):
                return self._run()
        finally:
            self._watchdog.end()

    def _run(self) -> Literal["finished", "interrupted"]:
        last_step = self.config.training.steps
        if self.progress.step == 0:
            # An evaluation may outlast the time that a scheduler grants after its signal.
            self._watchdog.begin("the teacher's evaluation")
            if not self.stop.agreed():
                self.evaluator.measure_teacher()
            if not self.stop.agreed():
                self._evaluate()
        if self._ahead is not None and self.teacher is not None and self.progress.step < last_step:
            self.teacher.ask(self._ahead)
        # A run that was stopped while it searched has saved the step, and not its search.
        if self._probe(self.progress.step):
            self._saved_step -= 1
            if self.progress.step < last_step and self._is_due(self.config.evaluation.every_steps):
                self._evaluate()
        while self.progress.step < last_step:
            with self.clock.between("checkpoint"):
                self.checkpoints.publish(wait=False)
            if self.stop.agreed():
                self._save()
                return "interrupted"
            step = self.progress.step + 1
            metrics = self.step(step)
            self.recorder.log_step(metrics)
            self._unsaid = [kind for kind in self._unsaid if not self._said(kind, metrics)]
            if self._has_search_left():
                continue
            if step < last_step and self._is_due(self.config.evaluation.every_steps):
                self._evaluate()
            if step < last_step and self._is_due(self.config.checkpoint.every_steps):
                self._save(in_background=self.config.checkpoint.in_background)
        self._save()
        if self._has_search_left():
            return "interrupted"
        self._evaluate()
        return "finished"

    def _has_search_left(self) -> bool:
        """Return whether a stop left the search that follows the last step to the resumed run: nothing is measured before it."""
        return self.search is not None and self.search.is_pending(self.progress.step)

    def _said(self, kind: AlignmentTrouble, metrics: Mapping[str, float]) -> bool:
        """Return whether the step's metrics answer a question about the two tokenizers; what is amiss is noted, once."""
        answer = kind(metrics)
        if answer:
            self.recorder.note(answer)
        return answer is not None

    def step(self, step: int) -> dict[str, float | int]:
        """One optimizer step; returns its metrics, equal on every rank but for the step's own time and the rates made of it."""
        self.clock.begin()
        rollouts = self._ahead or self._write(step)
        with self._measured("teacher"):
            teacher_rows = self.teacher.fetch() if self.teacher is not None else None
        self._ahead = self._write(step + 1) if self._writes_ahead and step < self.config.training.steps else None
        micro_batches = self.student.micro_batches(rollouts, teacher_rows)
        with self._measured("weigh"):
            micro_batches, weighing = self.importance.weigh(self.student, micro_batches, self.objective, step)
        with self._measured("train"):
            sums, norm, updated = self.student.train_step(micro_batches, self.objective, self.clock.part)
        self._advance(step, updated, sums, norm)
        metrics = self._metrics(rollouts, micro_batches.plan.num_positions, sums, norm)
        with self._measured("probe"):
            probing = self._probe(step)
        return {"step": step, **metrics, **weighing, **probing, **self._costs(rollouts, sums)}

    def _write(self, step: int) -> Rollouts:
        """Return a step's samples, written by the weights as they are; the teacher is asked for their scores."""
        prompts = self.prompts.batch(step - 1, self.config.data.batch_prompts, self.config.seed)
        with self._measured("rollout"):
            rollouts = self.write(step, prompts, self.progress.step)
        with self._measured("align"):
            rollouts = self.align(rollouts)
        if self.teacher is not None:
            with self._measured("teacher"):
                self.teacher.ask(rollouts)
        return rollouts

    def _probe(self, step: int) -> dict[str, float | int]:
        """Let EffOPD search, where a search follows the step; return its metrics. A stop leaves it for the resumed run."""

        def should_stop() -> bool:
            """Asked before every candidate, each of which takes as long as an evaluation."""
            self._watchdog.begin(f"the search after step {step}")
            return self.stop.agreed()

        search = self.search.maybe_probe(step, should_stop) if self.search is not None else None
        if self.search is None or search is None:
            return {}
        self.progress = replace(self.progress, searches=tuple(self.search.history))
        self.recorder.log_search(search.to_json())
        return search.metrics()

    def _metrics(self, rollouts: Rollouts, num_positions: int, sums: LossSums, norm: float) -> dict[str, float | int]:
        samples, response_tokens = rollouts.samples, rollouts.num_response_tokens
        payload_bytes, gathered_bytes = (self.teacher.payload_bytes, self.teacher.gathered_bytes) if self.teacher is not None else (0, 0)
        return {
            # A mean over nothing is no agreement: null in the record.
            "loss": sums.per_token(sums.loss) if sums.rows else math.nan,
            "divergence": sums.per_row(sums.divergence) if sums.rows else math.nan,
            "student_entropy": sums.per_scored(sums.entropy),
            "kept_fraction": sums.scored / max(1, response_tokens),
            "rollout_staleness": self.progress.step - 1 - rollouts.policy_version,
            "response_tokens": response_tokens,
            "response_length_mean": response_tokens / len(samples),
            "truncated_fraction": sum(not sample.finished for sample in samples) / len(samples),
            "grad_norm": norm,
            "lr": self.student.learning_rate,
            "skipped_steps": self.progress.skipped_steps,
            "rollout_drift_mean": sums.per_scored(sums.drift),
            "rollout_drift_max": sums.drift_max,
            **_clip_metrics(sums),
            **_unit_metrics(sums),
            **rollouts.notes,
            "padding_share": 1 - sum(rollouts.num_tokens) / num_positions,
            "payload_bytes_per_token": payload_bytes / max(1, response_tokens),
            "payload_gathered_bytes_per_token": gathered_bytes / max(1, response_tokens),
        }

    def _costs(self, rollouts: Rollouts, sums: LossSums) -> dict[str, float | int]:
        """Return where the step's time went, and how fast it was; a rank that keeps the others waiting is noted."""
        times = self.clock.finish()
        self._stragglers.notice(times, self.recorder.note)
        rates = self.throughput.metrics(rollouts, sums.scored, times.seconds, times.step_seconds)
        return {**rates, **times.metrics()}

    def _advance(self, step: int, updated: bool, sums: LossSums, norm: float) -> None:
        """Count the step; end the run when too many in a row changed nothing."""
        in_a_row = 0 if updated else self.progress.skipped_in_a_row + 1
        self.progress = replace(self.progress, step=step, skipped_steps=self.progress.skipped_steps + (not updated), skipped_in_a_row=in_a_row)
        if not updated:
            self.recorder.note(f"step {step} changed nothing: {sums.tokens:.0f} tokens, loss sum {sums.loss}, gradient norm {norm}")
        if in_a_row < self.config.training.max_skipped_steps:
            return
        # All ranks end here: what is on its way to the disk arrives.
        self.checkpoints.publish(wait=True)
        if sums.rows == 0:
            importance = self.config.importance
            if not self.config.alignment.is_identity:
                raise ValueError(
                    f"{in_a_row} steps in a row were skipped because no unit of any response was left to compare: see aligned_share, lost_bytes_share, "
                    "special_token_share and uncovered_unit_share in metrics.jsonl, and tools/align_report.py for how the two tokenizers meet"
                )
            raise ValueError(
                f"{in_a_row} steps in a row were skipped because no token was left to train on: importance.rule={importance.rule} keeps none of responses as "
                f"short as these at importance.ratio={importance.ratio}; raise it, or set importance.min_keep=1 or importance.select_scope=step"
            )
        raise RuntimeError(
            f"{in_a_row} steps in a row were skipped, the last with loss sum {sums.loss} and gradient norm {norm}; "
            "lower training.learning_rate, or resume from an earlier checkpoint"
        )

    def _evaluate(self) -> None:
        self._watchdog.begin(f"the evaluation after step {self.progress.step}")
        with self.clock.between("evaluation"):
            self.evaluator.measure_student(self.progress.step)

    def _save(self, *, in_background: bool = False) -> None:
        """Have a checkpoint of this step, and of nothing older on its way; in the background, it may be on its way itself."""
        self._watchdog.begin(f"the checkpoint of step {self.progress.step}")
        with self.clock.between("checkpoint"):
            if self._saved_step < self.progress.step:
                self.checkpoints.save(self.student, self.progress, self._ahead, self.search, in_background=in_background)
                self._saved_step = self.progress.step
            elif not in_background:
                self.checkpoints.publish(wait=True)

    def _is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.progress.step % every_steps == 0

    @contextmanager
    def _measured(self, phase: str) -> Iterator[None]:
        """Have the clock and the watchdog see a phase."""
        self._watchdog.begin(f"the phase {phase!r} of step {self.progress.step + (phase != 'probe')}")
        with self.clock.phase(phase):
            yield


def _clip_metrics(sums: LossSums) -> dict[str, float]:
    """Return the share of tokens with a clipped entry and the clipped entries per token; nothing without a clip."""
    if (clipped := sums.observed.get("clipped")) is None:
        return {}
    return {"clip_fraction": sums.per_token(clipped.nonzero), "clipped_entries_mean": sums.per_token(clipped.total)}


def _unit_metrics(sums: LossSums) -> dict[str, float]:
    """Return what the teacher thinks of the columns it is compared on; nothing where both models have the same."""
    if "covered" not in sums.observed:
        return {}
    covered = sums.observed["covered"]
    means = {f"teacher_{key}": sums.observed[key].mean for key in ("shared_mass", "eos_mass") if key in sums.observed}
    return {"uncovered_unit_share": 1 - covered.mean if covered.rows else 0.0, **{key: mean for key, mean in means.items() if math.isfinite(mean)}}
