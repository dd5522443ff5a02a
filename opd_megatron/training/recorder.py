"""What a run leaves behind while it runs: metrics, evaluations and progress, written by rank 0; the other ranks keep silent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from opd_megatron.config import TrackingConfig
from opd_megatron.reporting.metrics import MetricsWriter
from opd_megatron.reporting.progress import Progress
from opd_megatron.reporting.run_directory import RunDirectory, Status
from opd_megatron.reporting.trackers import Background, MlflowTracker, Tracker, WandbTracker


class Recorder:
    """Every rank has one and calls it alike."""

    def __init__(self, directory: RunDirectory, tracking: TrackingConfig, *, first_step: int, total_steps: int) -> None:
        self.directory = directory
        self._writer: MetricsWriter | None = None
        self._progress: Progress | None = None
        if dist.get_rank() == 0:
            self._progress = Progress(total_steps, first_step)
            self._writer = MetricsWriter(directory, first_step=first_step, trackers=self._trackers(tracking))

    def log_step(self, metrics: Mapping[str, float | int]) -> None:
        if self._writer is not None and self._progress is not None:
            self._writer.log_step(metrics)
            self._progress.step(metrics)

    def log_evaluation(self, record: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.log_evaluation(record)
            what = f"{record['who']} accuracy {record['accuracy']:.1%} on {record['prompts']} held-out prompts"
            self.note(f"{what} at step {record['step']} ({record['seconds']:.1f} s)")

    def log_search(self, record: Mapping[str, Any]) -> None:
        """Record one search of EffOPD."""
        if self._writer is not None:
            self._writer.log_search(record)

    def note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.note(text)

    def close(self, status: Status) -> None:
        """End what was opened, crash or not; trackers are told how the run ended."""
        if self._writer is not None and self._progress is not None:
            self._writer.close(status)
            self._progress.close()

    def _trackers(self, tracking: TrackingConfig) -> list[Tracker]:
        name = tracking.run_name or self.directory.path.resolve().name
        trackers: list[Tracker] = []
        if tracking.wandb_project is not None:
            wandb = WandbTracker(self.directory, run_name=name, project=tracking.wandb_project, entity=tracking.wandb_entity, mode=tracking.wandb_mode)
            trackers.append(Background(wandb, self.directory.trackers / "wandb.json", self.note))
        if tracking.mlflow_experiment is not None:
            uri = tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
            mlflow = MlflowTracker(self.directory, run_name=name, experiment=tracking.mlflow_experiment, uri=uri)
            trackers.append(Background(mlflow, self.directory.trackers / "mlflow.json", self.note))
        return trackers
