"""Where a run's numbers go besides its JSON lines: TensorBoard always, Weights & Biases and MLflow where the run asks for them.

Nothing here imports torch, wandb or mlflow before a run is tracked there.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from opd_megatron.reporting.run_directory import RunDirectory, Status, config_leaves, replace_text

# How long the end of a run waits for what a tracker has not taken yet. A crash must be heard of in seconds.
_END_SECONDS: Mapping[Status, float] = {"finished": 30.0, "interrupted": 30.0, "crashed": 5.0}
# W&B writes what it was given to disk at this interval; a process that is killed loses what it was given since.
_WANDB_FLUSH_SECONDS = 1.0
# Less than the end waits: the end of a process would wait for a beginning that is under way.
_WANDB_INIT_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The numbers of one step. `series` is `train`, or who was evaluated; scalars are named alike in every tracker."""

    series: str
    step: int
    scalars: Mapping[str, float]


class Tracker(Protocol):
    """What a run tells of itself while it runs. `end` is called once."""

    def log(self, entry: Entry) -> None: ...

    def end(self, status: Status) -> None: ...


class TensorBoardTracker:
    """Writes events; those of `first_step` and later, which a crash left behind, are declared void."""

    def __init__(self, folder: Path, *, first_step: int):
        from torch.utils.tensorboard import SummaryWriter  # torch costs seconds; readers of this module do without it

        self._writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=10)

    def log(self, entry: Entry) -> None:
        for name, value in entry.scalars.items():
            self._writer.add_scalar(name, value, entry.step)
        if entry.series != "train":
            self._writer.flush()

    def end(self, status: Status) -> None:
        self._writer.close()


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the run directory keeps of a run elsewhere: where it is, its id there, and the last step that is safe there, by series."""

    target: str
    run_id: str | None = None
    sent: Mapping[str, int] = field(default_factory=dict)


class Remote(Protocol):
    """A tracker beyond the run directory, as `Background` calls it: any call may block, or raise anything."""

    name: str
    # Where numbers go; to another place the run goes as a new one.
    target: str

    def start(self, run_id: str | None, keep_id: Callable[[str], None]) -> str:
        """Begin a run, or continue that of `run_id`; return what to tell the user. A new id is kept before anything else can fail."""

    def log(self, entry: Entry) -> None: ...

    def safe_step(self) -> int:
        """Return the last step that would be there if this process were killed now."""

    def end(self, status: Status) -> None: ...


class Background:
    """A tracker served by a thread of its own: no step waits for a network, and no failure there ends a run.

    What could not be sent is tried again, in order, when the next entry comes and once at the end. What was sent is kept in a file, so
    that a step which runs again after a crash is there once, and what a job could not send is made up for by the next one.
    """

    def __init__(self, remote: Remote, memory_path: Path, note: Callable[[str], None]):
        self._remote, self._path, self._note = remote, memory_path, note
        self._memory = _read_memory(memory_path, remote.target)
        self._logged = dict(self._memory.sent)
        self._entries: deque[Entry] = deque()
        self._has_news = threading.Condition()
        self._news, self._status = True, None  # type: bool, Status | None
        self._is_started = self._has_complained = False
        self._thread = threading.Thread(target=self._work, name=remote.name, daemon=True)
        self._thread.start()

    def log(self, entry: Entry) -> None:
        """Take an entry; one that the tracker has is left out. Numbers that are not finite are no points of a curve."""
        if entry.step > self._memory.sent.get(entry.series, -1):
            scalars = {name: value for name, value in entry.scalars.items() if math.isfinite(value)}
            with self._has_news:
                self._entries.append(replace(entry, scalars=scalars))
                self._news = True
                self._has_news.notify()

    def end(self, status: Status) -> None:
        """Have the run ended there, and wait for what is not sent yet: 30 seconds at most, 5 after a crash."""
        with self._has_news:
            self._status = status
            self._has_news.notify()
        self._thread.join(_END_SECONDS[status])
        if self._thread.is_alive() or self._entries:
            self._note(f"{self._remote.name} has not taken all of this run within {_END_SECONDS[status]:.0f} s; the run directory has it")

    def _work(self) -> None:
        status = None
        while status is None:
            with self._has_news:
                has_news = self._has_news.wait_for(lambda: self._news or self._status, timeout=2 * _WANDB_FLUSH_SECONDS)
                self._news, status = False, self._status
            try:
                if has_news:
                    self._send(status)
                else:
                    self._remember(self._remote.safe_step())
            except Exception as error:  # whatever a network or a foreign library raises: the run has its own record
                if not self._has_complained:
                    self._has_complained = True
                    self._note(f"{self._remote.name} failed ({_first_line(error)}); the run goes on, and this is tried again with every step")

    def _send(self, status: Status | None) -> None:
        if not self._is_started:
            self._note(f"{self._remote.name}: {self._remote.start(self._memory.run_id, self._keep_id)}")
            self._is_started = True
        try:
            while self._entries:
                entry = self._entries[0]
                self._remote.log(entry)
                self._entries.popleft()
                self._logged[entry.series] = entry.step
        finally:
            self._remember(self._remote.safe_step())
        if status is not None:
            self._remote.end(status)
            self._remember(max(self._logged.values(), default=0))

    def _remember(self, safe_step: int) -> None:
        """Keep what is safe there; nothing of what was safe before is forgotten."""
        sent = {series: max(min(step, safe_step), self._memory.sent.get(series, -1)) for series, step in self._logged.items()}
        if sent != self._memory.sent:
            self._memory = replace(self._memory, sent=sent)
            _write_memory(self._path, self._memory)

    def _keep_id(self, run_id: str) -> None:
        self._memory = replace(self._memory, run_id=run_id)
        _write_memory(self._path, self._memory)


class WandbTracker:
    """A run of Weights & Biases. Its step is the training step; evaluations have an axis of their own, `evaluation/step`."""

    name = "Weights & Biases"

    def __init__(self, run: RunDirectory, *, run_name: str, project: str, entity: str | None, mode: Literal["online", "offline"]):
        self._directory, self._run_name = run, run_name
        self._project, self._entity, self._mode = project, entity, mode
        self.target = f"{entity or ''}/{project}"
        self._run: Any = None
        # The row of a step stays open, in memory, until a later step begins: an evaluation may still join it.
        self._open_step = self._safe_step = -1
        self._closed: deque[tuple[float, int]] = deque()

    def start(self, run_id: str | None, keep_id: Callable[[str], None]) -> str:
        """Begin or continue the run, its files in the run directory; raises whatever W&B does where it cannot be reached."""
        # Without a word on the terminal, without reports of its own errors to its makers, and its own files with the run's.
        for name, value in (("SILENT", "true"), ("ERROR_REPORTING", "false"), ("CACHE_DIR", str(self._directory.wandb / "cache"))):
            os.environ.setdefault(f"WANDB_{name}", value)
        import wandb

        run_id = run_id or uuid.uuid4().hex[:12]
        keep_id(run_id)
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            name=self._run_name,
            id=run_id,
            resume="allow" if self._mode == "online" else None,
            mode=self._mode,
            dir=str(self._directory.path.resolve()),
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                save_code=False,
                silent=True,
                init_timeout=_WANDB_INIT_SECONDS,
                finish_timeout=_END_SECONDS["finished"],
                x_transaction_log_flush_interval=_WANDB_FLUSH_SECONDS,
            ),
        )
        description = self._directory.read_description()
        self._run.config.update({"recipe": description["recipe"], **description["config"]}, allow_val_change=True)
        self._run.define_metric("evaluation/*", step_metric="evaluation/step")
        folder = self._directory.wandb
        return str(self._run.url) if self._mode == "online" else f"offline in {folder}; `wandb sync --yes {shlex.quote(str(folder))}/offline-run-*` uploads it"

    def log(self, entry: Entry) -> None:
        """Put a training step into W&B's step of that number, and an evaluation into the step that is open."""
        if entry.step > self._open_step:
            self._closed.append((time.monotonic(), self._open_step))
            self._open_step = entry.step
        if entry.series == "train":
            self._run.log(dict(entry.scalars), step=entry.step)
        else:
            # W&B ignores what comes for an earlier step than a continued run has: right for a step, a loss for an evaluation made up for.
            self._run.log({**entry.scalars, "evaluation/step": entry.step}, step=max(entry.step, self._run.starting_step))

    def safe_step(self) -> int:
        while self._closed and time.monotonic() - self._closed[0][0] > 2 * _WANDB_FLUSH_SECONDS:
            self._safe_step = self._closed.popleft()[1]
        return self._safe_step

    def end(self, status: Status) -> None:
        if status == "interrupted":
            self._run.mark_preempting()
        self._run.finish(exit_code={"finished": 0, "interrupted": 75, "crashed": 1}[status])


class MlflowTracker:
    """A run of MLflow: on a server, or in the run directory's own folder `mlruns`. Steps are training steps, the resolved config is its parameters."""

    name = "MLflow"

    def __init__(self, run: RunDirectory, *, run_name: str, experiment: str, uri: str | None):
        self._directory, self._run_name, self._experiment = run, run_name, experiment
        self._uri = uri or run.mlflow.resolve().as_uri()
        self.target = f"{self._uri} {experiment}"
        self._client: Any = None
        self._run_id, self._safe_step = "", -1

    def start(self, run_id: str | None, keep_id: Callable[[str], None]) -> str:
        """Begin or continue the run, and write its parameters; raises whatever MLflow does where it cannot be reached."""
        # MLflow 3 keeps folders of files readable and writable, and asks for a word that one is meant. A server that is gone is asked again by
        # the next step, not for minutes by this one. Nobody is told that MLflow is used.
        for name, value in (
            ("MLFLOW_ALLOW_FILE_STORE", "true"),
            ("MLFLOW_DISABLE_TELEMETRY", "true"),
            ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
            ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ):
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        if run_id is None:
            found = self._client.get_experiment_by_name(self._experiment)
            experiment_id = found.experiment_id if found is not None else self._client.create_experiment(self._experiment)
            run_id = self._client.create_run(experiment_id, run_name=self._run_name).info.run_id
            keep_id(run_id)
        self._run_id = run_id
        self._client.update_run(run_id, status="RUNNING")
        self._log_params()
        return f"run {run_id} of experiment {self._experiment} at {self._uri}"

    def log(self, entry: Entry) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run_id, metrics=[Metric(name, float(value), now, entry.step) for name, value in entry.scalars.items()])
        self._safe_step = entry.step

    def safe_step(self) -> int:
        return self._safe_step

    def end(self, status: Status) -> None:
        self._client.set_terminated(self._run_id, {"finished": "FINISHED", "interrupted": "KILLED", "crashed": "FAILED"}[status])

    def _log_params(self) -> None:
        """Write the resolved config. A parameter is never rewritten: what a continued run has set anew becomes a tag `now.<key>`."""
        from mlflow.entities import Param, RunTag

        description = self._directory.read_description()
        leaves = {"recipe": description["recipe"], **config_leaves(description["config"])}
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in leaves.items()}
        there = self._client.get_run(self._run_id).data
        new = iter([Param(key, value[:500]) for key, value in values.items() if key not in there.params])
        while batch := list(islice(new, 100)):
            self._client.log_batch(self._run_id, params=batch)
        shown = {key: there.tags.get(f"now.{key}", value) for key, value in there.params.items()}
        changed = [RunTag(f"now.{key}", values[key][:500]) for key in shown.keys() & values.keys() if shown[key] != values[key][:500]]
        if changed:
            self._client.log_batch(self._run_id, tags=changed)


def _read_memory(path: Path, target: str) -> Memory:
    """Return what is known of the run at `target`; nothing of a file that is damaged or tells of another place."""
    try:
        found = json.loads(path.read_text())
        memory = Memory(target=found["target"], run_id=found["run_id"], sent={str(series): int(step) for series, step in found["sent"].items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return Memory(target=target)
    return memory if memory.target == target else Memory(target=target)


def _write_memory(path: Path, memory: Memory) -> None:
    path.parent.mkdir(exist_ok=True)
    replace_text(path, json.dumps({"target": memory.target, "run_id": memory.run_id, "sent": dict(memory.sent)}, indent=2) + "\n")


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
