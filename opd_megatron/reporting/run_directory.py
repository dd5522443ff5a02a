"""The folder of one run: where each file lives, which run may continue in it, and in what state it was left. Standard library only."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from opd_megatron.reporting.cause import attempt_file

logger = logging.getLogger(__name__)

Status = Literal["running", "finished", "interrupted", "crashed"]

_ABSENT = object()


def given_path(text: str) -> Path:
    """Return a path of the command line (argparse's `type=`); an empty one, as of a variable that is not set, is no path."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; is a variable of your shell not set?")
    return Path(text)


class RunDirectory:
    """The paths of a run directory. Constructing one touches no disk; `open` creates or re-enters the folder."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.evals_path = self.path / "evals.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.hf = self.path / "hf"
        self.report_path = self.path / "report.html"
        self.status_path = self.path / "status"
        self.rollouts = self.path / "rollouts"
        self.modules_path = self.path / "modules.json"
        self.searches_path = self.path / "effopd.jsonl"
        self.shared_vocabulary = self.path / "shared_vocabulary.json"
        self.tensorboard = self.path / "tensorboard"
        self.trackers = self.path / "trackers"
        self.wandb = self.path / "wandb"
        self.mlflow = self.path / "mlruns"
        self.lock_path = self.path / "lock"
        self._lock: int | None = None
        # What `open` found: whether the folder held a run, its last status, and the size of its metrics.
        self._held_a_run = True
        self._status_before: Status | None = None
        self._metrics_before = 0

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, recipe: str, config: Mapping[str, Any], may_change: Collection[str]) -> RunDirectory:
        """Return the run directory at `path`, new or continued, with `config` as its config.json. Rank 0 alone calls it.

        `may_change` holds dotted keys or sections (`training.steps`, `checkpoint`) that a continued run may set anew.
        Raises ValueError when the folder cannot be written, is in use, or belongs to another recipe or to another config.
        """
        run = cls(path)
        description = json.dumps({"recipe": recipe, "config": config}, indent=2) + "\n"
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run._held_a_run, run._status_before, run._metrics_before = run.config_path.exists(), run.read_status(), run._metrics_bytes()
            run.check(recipe=recipe, config=config, may_change=may_change)
            run._take_lock()
            replace_text(run.config_path, description)
        except OSError as error:
            raise ValueError(f"run directory {run.path} cannot be written: {error.strerror or error}; choose another --run-dir") from error
        return run

    def check(self, *, recipe: str, config: Mapping[str, Any], may_change: Collection[str]) -> None:
        """Raise ValueError where the folder belongs to another recipe or to another config; touches nothing."""
        if self.config_path.exists():
            # As it would be read back: lists for tuples.
            self._refuse_another_run(json.loads(json.dumps({"recipe": recipe, "config": config})), may_change)

    def unlock(self) -> None:
        """Let another process open the folder; the end of this process does the same."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_in_use(self) -> bool:
        """Return whether a job holds the folder now, as far as its file system knows locks."""
        if not self.lock_path.is_file():
            return False
        lock = os.open(self.lock_path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(lock)
        return False

    def _metrics_bytes(self) -> int:
        return self.metrics_path.stat().st_size if self.metrics_path.is_file() else 0

    def rollout_file(self, step: int) -> Path:
        """Return where the samples of one step are recorded."""
        return self.rollouts / f"step_{step}.jsonl"

    def step_back(self) -> bool:
        """Undo `open` after a mistake that was found before a step was done, so that it can be corrected; return False after a step.

        A new folder loses what describes the mistaken run; one that is continued gets its last status again.
        """
        if self._metrics_bytes() != self._metrics_before:
            return False
        if (own := attempt_file("status")) is not None:
            # The word that stays is an older attempt's.
            own.unlink(missing_ok=True)
        if self._held_a_run:
            replace_text(self.status_path, ("crashed" if self._status_before in (None, "running") else self._status_before) + "\n")
            return True
        for file in (
            *(self.config_path, self.status_path, self.metrics_path, self.evals_path, self.lock_path),
            *(self.shared_vocabulary, self.modules_path, self.searches_path),
        ):
            file.unlink(missing_ok=True)
        for folder in (self.tensorboard, self.trackers, self.wandb, self.mlflow):
            shutil.rmtree(folder, ignore_errors=True)
        return True

    def _take_lock(self) -> None:
        """Hold the folder against a second job that would write into the same files. The lock ends with its process; the file itself says nothing."""
        # A file that is open for writing: NFS refuses this lock of a folder.
        lock = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ValueError(f"another job is running in {self.path}; wait for it, stop it, or use another --run-dir") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): keep other jobs out of it", self.path, error.strerror)
        self._lock = lock

    def write_status(self, word: Status) -> None:
        """Replace the status in one move, so that a reader never sees half a word; a job script finds this attempt's own in the attempt's folder."""
        assert word in get_args(Status), f"status {word!r} is not one of {get_args(Status)}"
        for file in (self.status_path, attempt_file("status")):
            if file is not None:
                replace_text(file, word + "\n")

    def read_status(self) -> Status | None:
        """Return the last status written, or None before the first or for a word that is no status."""
        if not self.status_path.is_file():
            return None
        word = self.status_path.read_text(errors="replace").strip()
        return cast(Status, word) if word in get_args(Status) else None

    def read_description(self) -> dict[str, Any]:
        """Return config.json, `{"recipe": name, "config": tree}`; raise ValueError where it is not that."""
        try:
            description = json.loads(self.config_path.read_text())
        except ValueError as error:
            raise ValueError(f"{self.config_path} is not JSON ({error}); move the folder away or use another --run-dir") from error
        if not (isinstance(description, dict) and isinstance(description.get("recipe"), str) and isinstance(description.get("config"), dict)):
            raise ValueError(f'{self.config_path} is not the config of a run, {{"recipe": ..., "config": ...}}; use another --run-dir')
        return description

    def _refuse_another_run(self, wanted: dict[str, Any], may_change: Collection[str]) -> None:
        found = self.read_description()
        if found["recipe"] != wanted["recipe"]:
            raise ValueError(
                f"{self.path} is the run directory of another recipe: it holds {found['recipe']!r}, this run is {wanted['recipe']!r}; use another --run-dir"
            )
        differing = _differences(found["config"], wanted["config"], may_change)
        if differing:
            raise ValueError(
                f"{self.path} holds a run with another config; use another --run-dir or restore these keys:\n" + "\n".join(f"  {line}" for line in differing)
            )


def replace_text(path: Path, text: str) -> None:
    """Write `text` at `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], may_change: Collection[str]) -> list[str]:
    """Return one line for each dotted key whose values differ and that no entry of `may_change` covers."""
    old, new = config_leaves(found), config_leaves(wanted)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        covered = any(key == prefix or key.startswith(prefix + ".") for prefix in may_change)
        if before != after and not covered:
            lines.append(f"{key}: {_shown(before)} in the folder, {_shown(after)} now")
    return lines


def config_leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of a nested config with its value; lists and empty sections are values."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= config_leaves(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
