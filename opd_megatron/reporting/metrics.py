"""The numbers of a run: appended while it trains (JSON lines and TensorBoard), read back whatever state the run was left in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from opd_megatron.reporting.run_directory import RunDirectory, Status, replace_text
from opd_megatron.reporting.trackers import Entry, TensorBoardTracker, Tracker


class MetricsWriter:
    """Appends to metrics.jsonl and evals.jsonl and mirrors both to TensorBoard and to the other trackers. Rank 0 alone owns one.

    Training steps count from 1; an evaluation at step N saw the weights after N steps, so step 0 is before training.
    A crash after the last checkpoint leaves steps that will run again: records of `first_step` and later are dropped, as is a cut line.
    What is left is offered to the other trackers first: each takes what it does not have.
    """

    def __init__(self, run_directory: RunDirectory, *, first_step: int, trackers: Sequence[Tracker] = ()):
        self._metrics = _open_before(run_directory.metrics_path, first_step)
        self._evaluations = _open_before(run_directory.evals_path, first_step)
        # Of searches there may be none, and then no file.
        self._searches_path, self._first_step = run_directory.searches_path, first_step
        self._searches = _open_before(self._searches_path, first_step) if self._searches_path.exists() else None
        for entry in _recorded(run_directory) if trackers else ():
            for tracker in trackers:
                tracker.log(entry)
        self._trackers: tuple[Tracker, ...] = (TensorBoardTracker(run_directory.tensorboard, first_step=first_step), *trackers)

    def log_step(self, metrics: Mapping[str, float | int]) -> None:
        """Append one training step; `step` is required, every other key is free."""
        _append(self._metrics, metrics)
        self._track(_entry_of_step(metrics))

    def log_evaluation(self, record: Mapping[str, Any]) -> None:
        """Append one evaluation of the student or the teacher; its examples stay out of the trackers."""
        _append(self._evaluations, record)
        self._track(_entry_of_evaluation(record))

    def log_search(self, record: Mapping[str, Any]) -> None:
        """Append one search for extrapolated weights to effopd.jsonl; its numbers are in the metrics of its step as well."""
        if self._searches is None:
            self._searches = _open_before(self._searches_path, self._first_step)
        _append(self._searches, record)

    def close(self, status: Status) -> None:
        """End the files, and tell the trackers how the run ended."""
        for file in (self._metrics, self._evaluations, self._searches):
            if file is not None:
                file.close()
        for tracker in self._trackers:
            tracker.end(status)

    def _track(self, entry: Entry) -> None:
        for tracker in self._trackers:
            tracker.log(entry)


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """All that a run directory tells about its run. Evaluations are unique by (step, who), in order of step; the last written one counts."""

    directory: RunDirectory
    name: str
    recipe: str | None
    config: Mapping[str, Any]
    status: Status | None
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    # Of EffOPD, unique by step.
    searches: list[dict[str, Any]]
    remarks: list[str]  # what is missing or unreadable, one sentence each

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps that hold a finite number under `key`, and those numbers."""
        points = [(record["step"], record[key]) for record in self.steps if _is_finite(record.get(key))]
        return [step for step, _ in points], [value for _, value in points]

    def evaluations_of(self, who: str) -> list[dict[str, Any]]:
        """Return the evaluations of "student" or "teacher" that have an accuracy."""
        return [record for record in self.evaluations if record.get("who") == who and _is_finite(record.get("accuracy"))]

    def seconds_until(self, step: int) -> float:
        """Return what the steps up to this one took together, probes included, evaluations and checkpoints not."""
        in_steps = sum(seconds for number, seconds in zip(*self.series("step_seconds"), strict=True) if number <= step)
        return in_steps + sum(search["seconds"] for search in self._searches_after_a_resume() if search["step"] <= step)

    def probe_seconds(self) -> float:
        """Return what all searches for extrapolated weights took, those that a stop cut short included."""
        return sum(self.series("probe_seconds")[1]) * bool(self.searches) + sum(search["seconds"] for search in self._searches_after_a_resume())

    def _searches_after_a_resume(self) -> list[dict[str, Any]]:
        """Return the searches that a stop had left to the resumed run: their steps' metrics were written before."""
        in_steps = set(self.series("effopd_accepted_k")[0])
        return [search for search in self.searches if search["step"] not in in_steps and _is_finite(search.get("seconds"))]

    def step_reaching(self, accuracy: float) -> int | None:
        """Return the first step after which the student was measured at this accuracy or more; None if it never was."""
        return next((record["step"] for record in self.evaluations_of("student") if record["accuracy"] >= accuracy), None)

    def setting(self, dotted_key: str) -> Any:
        """Return one value of the resolved config, or None where the config does not have it."""
        node: Any = self.config
        for name in dotted_key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node


def read_history(path: Path) -> RunHistory:
    """Return what is left of the run at `path`; only a folder that does not exist raises ValueError."""
    run = RunDirectory(path)
    if not run.path.is_dir():
        raise ValueError(f"{run.path} is not a run directory: there is no such folder")
    remarks: list[str] = []
    description: dict[str, Any] = {"recipe": None, "config": {}}
    if run.config_path.is_file():
        try:
            description = run.read_description()
        except ValueError:
            remarks.append("config.json is not the config of a run")
    else:
        remarks.append("config.json is missing: recipe and settings are unknown")
    if run.read_status() is None:
        remarks.append("status is missing: the run ended before its first step, or is not a run")
    steps = _by_key(_read_records(run.metrics_path, remarks, "training steps"), "step")
    evaluations = _by_key(_read_records(run.evals_path, remarks, "evaluations"), "step", "who")
    searches = _by_key(_read_records(run.searches_path, remarks, "searches"), "step") if run.searches_path.is_file() else []
    return RunHistory(
        directory=run,
        name=run.path.resolve().name,
        recipe=description["recipe"],
        config=description["config"],
        status=run.read_status(),
        steps=steps,
        evaluations=evaluations,
        searches=searches,
        remarks=remarks,
    )


def strict_json(value: Any) -> Any:
    """Return `value` without NaN or infinity, which JSON does not have: null, and in an object a `<key>_nonfinite` note beside it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        notes = {f"{key}_nonfinite": str(item) for key, item in value.items() if isinstance(item, float) and not math.isfinite(item)}
        return {key: strict_json(item) for key, item in value.items()} | notes
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    return value


def _entry_of_step(metrics: Mapping[str, Any]) -> Entry:
    scalars = {f"train/{key}": value for key, value in metrics.items() if key != "step" and _is_number(value)}
    return Entry(series="train", step=int(metrics["step"]), scalars=scalars)


def _entry_of_evaluation(record: Mapping[str, Any]) -> Entry:
    who = record["who"]
    measures = {"accuracy": record.get("accuracy"), **{f"pass_at_{k}": value for k, value in (record.get("pass_at_k") or {}).items()}}
    return Entry(series=who, step=int(record["step"]), scalars={f"evaluation/{who}_{key}": value for key, value in measures.items() if _is_number(value)})


def _recorded(run: RunDirectory) -> list[Entry]:
    """Return what the run has written so far, in the order in which it was measured."""
    steps, evaluations = (_by_key(_read_records(path, [], ""), *keys) for path, keys in ((run.metrics_path, ("step",)), (run.evals_path, ("step", "who"))))
    entries = [*map(_entry_of_step, steps), *(_entry_of_evaluation(record) for record in evaluations if isinstance(record.get("who"), str))]
    return sorted(entries, key=lambda entry: entry.step)


def _append(file: TextIO, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(strict_json(record), allow_nan=False) + "\n")
    file.flush()


def _open_before(path: Path, first_step: int) -> TextIO:
    """Return the JSON lines file opened for appending, cut to whole records of steps before `first_step`."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        kept = [line for line in text.split("\n") if (record := _parse(line)) is not None and record["step"] < first_step]
        kept_text = "".join(line + "\n" for line in kept)
        if kept_text != text:
            replace_text(path, kept_text)
    return path.open("a", encoding="utf-8")


def _parse(line: str) -> dict[str, Any] | None:
    """Return the record of one line, or None for a cut, damaged or empty one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _read_records(path: Path, remarks: list[str], what: str) -> list[dict[str, Any]]:
    if not path.is_file():
        remarks.append(f"{path.name} is missing: no {what} were recorded")
        return []
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    records = [record for record in map(_parse, lines) if record is not None]
    if len(records) < len(lines):
        remarks.append(f"{path.name} has {len(lines) - len(records)} unreadable line(s) of {len(lines)}, left out here")
    if not lines:
        remarks.append(f"{path.name} is empty: no {what} were recorded")
    return records


def _by_key(records: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Return the last record of each key, sorted by step: a repeated step counts once."""
    unique = {tuple(str(record.get(key)) for key in keys): record for record in records}
    return sorted(unique.values(), key=lambda record: record["step"])


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
