"""What a run leaves behind while it runs: metrics, evaluations and progress, written by rank 0; the other ranks keep silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from opd_megatron.reporting.metrics import MetricsWriter
from opd_megatron.reporting.progress import Progress
from opd_megatron.reporting.run_directory import RunDirectory


class Recorder:
    """Every rank has one and calls it alike."""

    def __init__(self, directory: RunDirectory, *, first_step: int, total_steps: int) -> None:
        self.directory = directory
        self._writer: MetricsWriter | None = None
        self._progress: Progress | None = None
        if dist.get_rank() == 0:
            self._writer = MetricsWriter(directory, first_step=first_step)
            self._progress = Progress(total_steps, first_step)

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

    def close(self) -> None:
        if self._writer is not None and self._progress is not None:
            self._writer.close()
            self._progress.close()
