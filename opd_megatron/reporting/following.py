"""What a run has written so far, read again and again while it goes on: a step costs the reading of its own line. Standard library only."""

from __future__ import annotations

import json
import math
import os
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_megatron.reporting.run_directory import RunDirectory, Status

# What "lately" means in the numbers, in steps.
WINDOW = 20
# A running job that has written nothing for this long, and for this many of its steps, is called silent.
_SILENT_SECONDS = 120.0
_SILENT_STEPS = 5
_LOG_TAIL_BYTES = 16384


class JsonLines:
    """Follows a file of JSON lines: `new` returns the records added since the last call, and whether the file began anew."""

    def __init__(self, path: Path):
        self._path = path
        self._file: tuple[int, int] | None = None
        self._read_bytes = 0

    def new(self) -> tuple[list[dict[str, Any]], bool]:
        """Half a line stays for the next call. A continued run replaces its files, which then begin anew."""
        try:
            with self._path.open("rb") as file:
                state = os.fstat(file.fileno())
                is_new = (state.st_dev, state.st_ino) != self._file or state.st_size < self._read_bytes
                self._file, self._read_bytes = (state.st_dev, state.st_ino), 0 if is_new else self._read_bytes
                file.seek(self._read_bytes)
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError:
            began_anew, self._file, self._read_bytes = self._file is not None, None, 0
            return [], began_anew
        self._read_bytes += len(whole) + 1 if whole else 0
        return [record for line in whole.split(b"\n") if (record := _record(line)) is not None], is_new


@dataclass
class RunView:
    """What is known of a run; `refresh` reads what was written since."""

    run: RunDirectory
    steps: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    first_steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[tuple[str, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._metrics, self._evals = JsonLines(self.run.metrics_path), JsonLines(self.run.evals_path)
        self.description: dict[str, Any] | None = None
        self.status: Status | None = None

    def refresh(self) -> None:
        """Raise ValueError where the folder is not there."""
        if not self.run.path.is_dir():
            raise ValueError(f"{self.run.path} is not a run directory: there is no such folder")
        try:
            self.description, self.status = None, self.run.read_status()
            self.description = self.run.read_description()
        except (OSError, ValueError):
            pass  # not there yet, or replaced at this moment
        records, is_new = self._metrics.new()
        if is_new:
            self.steps.clear()
            self.first_steps.clear()
        for record in records:
            while self.steps and self.steps[-1]["step"] >= record["step"]:
                self.steps.pop()
            self.steps.append(record)
            if len(self.first_steps) < WINDOW:
                self.first_steps.append(record)
        records, is_new = self._evals.new()
        if is_new:
            self.evaluations.clear()
        for record in records:
            if isinstance(record.get("who"), str) and (accuracy := finite_number(record, "accuracy")) is not None:
                self.evaluations[record["who"], record["step"]] = accuracy

    @property
    def step(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0

    def setting(self, dotted_key: str) -> Any:
        """Return one value of the resolved config; None where there is none."""
        node: Any = self.description["config"] if self.description else None
        for name in dotted_key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def lately(self, key: str) -> list[float]:
        """Return the numbers of the last steps that have this one."""
        return [value for record in self.steps if (value := finite_number(record, key)) is not None]

    def at_first(self, key: str) -> list[float]:
        """The same of the first steps."""
        return [value for record in self.first_steps if (value := finite_number(record, key)) is not None]

    def accuracies(self, who: str) -> list[tuple[int, float]]:
        return sorted((step, accuracy) for (name, step), accuracy in self.evaluations.items() if name == who)

    def last_checkpoint(self) -> tuple[int, float] | None:
        """Return the step of the newest checkpoint and when it was written."""
        found = []
        for folder in _entries(self.run.checkpoints):
            if re.fullmatch(r"step_(0|[1-9]\d*)", folder.name) and (written := modified(folder)) is not None:
                found.append((int(folder.name[5:]), written))
        return max(found, default=None)

    def last_written(self) -> float | None:
        """Return when the run last wrote anything that tells of progress."""
        run = self.run
        files = [run.metrics_path, run.evals_path, run.searches_path, run.status_path, run.config_path]
        files += [*_entries(run.checkpoints), *_entries(run.path / "logs" / "latest")]
        return max((written for file in files if (written := modified(file)) is not None), default=None)

    def silent_seconds(self, now: float) -> float | None:
        """Return for how long a job that calls itself running has written nothing, where that is long for its steps."""
        written = self.last_written()
        if self.status != "running" or written is None:
            return None
        usual = max([_SILENT_SECONDS, *(_SILENT_STEPS * seconds for seconds in self.lately("step_seconds"))])
        return now - written if now - written > usual else None

    def log_tail(self, num_lines: int) -> tuple[str, list[str]] | None:
        """Return the name of the newest attempt and the last lines of its first rank; None where no log is kept."""
        file = self.run.path / "logs" / "latest" / "rank_0.log"
        try:
            with file.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                text = log.read().decode("utf-8", errors="replace")
        except OSError:
            return None
        # What a carriage return overwrites is not seen on a terminal either.
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        return file.parent.resolve().name, [line for line in lines if line.strip()][-num_lines:]


def finite_number(record: dict[str, Any], key: str) -> float | None:
    """Return a number of a record; None for what is no number, or not finite."""
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def modified(path: Path) -> float | None:
    """Return when a file or folder was last written, in seconds since the epoch; None where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _entries(folder: Path) -> Sequence[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return ()


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a whole line; None for one that is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
