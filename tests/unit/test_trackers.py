"""Weights & Biases and MLflow get the numbers of metrics.jsonl, each once, from the real packages; and no failure of theirs reaches a run.

Not covered: a server of either. What W&B does with a file that is uploaded, and how either shows a run, is theirs.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.reporting import MetricsWriter, RunDirectory
from opd_megatron.reporting.trackers import Background, MlflowTracker, Remote, WandbTracker
from recipes.run import resolve
from tests.wandb_file import history, records

ROOT = Path(__file__).parents[2]
CONFIG = {"seed": 1, "student": {"hf": "tiny", "layout": {"tensor": 2}}, "training": {"steps": 12}, "modules": {"train": None}}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Without keys and addresses of whoever runs the tests; what trackers set for themselves is undone."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(("WANDB_", "MLFLOW_"))]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


def open_run(path: Path, config: dict[str, Any] = CONFIG) -> RunDirectory:
    return RunDirectory.open(path, recipe="quickstart", config=config, may_change=("training.steps",))


class Job:
    """One job of a run, as the trainer would have it: `with` ends it as finished, an exception in it as crashed."""

    def __init__(self, run: RunDirectory, *remotes: Remote, first_step: int = 1):
        self.notes: list[str] = []
        self.status = "finished"
        trackers = [Background(remote, run.trackers / f"{type(remote).__name__}.json", self.notes.append) for remote in remotes]
        self.writer = MetricsWriter(run, first_step=first_step, trackers=trackers)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.writer.log_step({"step": step, "loss": 1 / step, "divergence": math.nan if step == 2 else 0.5, "response_tokens": 100 + step})

    def evaluation(self, step: int, accuracy: float, who: str = "student") -> None:
        self.writer.log_evaluation({"step": step, "who": who, "accuracy": accuracy, "pass_at_k": {"4": accuracy}, "examples": [{"prompt": "secret"}]})


def wandb_of(run: RunDirectory, **changes: Any) -> WandbTracker:
    return WandbTracker(run, **({"run_name": "a run", "project": "opd", "entity": None, "mode": "offline"} | changes))


def mlflow_of(run: RunDirectory, uri: str | None = None) -> MlflowTracker:
    return MlflowTracker(run, run_name="a run", experiment="opd", uri=uri)


def wandb_files(run: RunDirectory) -> list[Path]:
    return sorted(run.path.glob("wandb/offline-run-*/*.wandb"))


def wandb_points(run: RunDirectory, key: str) -> list[tuple[int, float]]:
    """All points of a curve, file by file, as they lie there."""
    axis = "evaluation/step" if key.startswith("evaluation/") else "_step"
    return [(row[axis], row[key]) for file in wandb_files(run) for row in history(file) if key in row]


def mlflow_client(run: RunDirectory) -> tuple[Any, str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=run.mlflow.resolve().as_uri())
    [experiment] = [one for one in client.search_experiments() if one.name == "opd"]
    [found] = client.search_runs([experiment.experiment_id])
    return client, found.info.run_id


def mlflow_points(run: RunDirectory, key: str) -> list[tuple[int, float]]:
    client, run_id = mlflow_client(run)
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def recorded_points(run: RunDirectory, key: str) -> list[tuple[int, float]]:
    lines = map(json.loads, run.metrics_path.read_text().splitlines())
    return [(record["step"], record[key]) for record in lines if record[key] is not None]


READERS = {"wandb": (wandb_of, wandb_points), "mlflow": (mlflow_of, mlflow_points)}


@contextmanager
def silent_server() -> Iterator[str]:
    """An address where connections are accepted and nothing is ever answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def job_process(path: Path, code: str, **environment: str) -> subprocess.Popen[str]:
    """Start a job of its own of the run at `path`."""
    begin = f"from tests.unit.test_trackers import *\nrun = open_run(Path({str(path)!r}))\n"
    return subprocess.Popen(
        [sys.executable, "-c", begin + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


def children_of(pid: int) -> list[int]:
    """Return the processes below this one, as Linux tells of them."""
    children = [int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()]
    return [*children, *(one for child in children for one in children_of(child))]


# --- what they hold


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_holds_what_metrics_jsonl_holds(tmp_path: Path, tracker: str) -> None:
    make, points = READERS[tracker]
    run = open_run(tmp_path)
    job = Job(run, make(run))
    job.evaluation(0, 0.8, who="teacher")
    job.evaluation(0, 0.2)
    job.steps(1, 12)
    job.evaluation(12, 0.6)
    job.writer.close("finished")
    for key in ("loss", "divergence", "response_tokens"):
        assert points(run, f"train/{key}") == recorded_points(run, key)
    assert len(points(run, "train/divergence")) == 11, "what is not finite is no point"
    assert points(run, "evaluation/student_accuracy") == [(0, 0.2), (12, 0.6)]
    assert points(run, "evaluation/student_pass_at_4") == [(0, 0.2), (12, 0.6)]
    assert points(run, "evaluation/teacher_accuracy") == [(0, 0.8)]
    assert len(job.notes) == 1, "where the run is, and nothing else"


def test_the_resolved_config_is_there(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    Job(run, wandb_of(run), mlflow_of(run)).writer.close("finished")
    client, run_id = mlflow_client(run)
    found = client.get_run(run_id)
    assert found.info.run_name == "a run"
    assert found.data.params == {
        "recipe": "quickstart",
        "seed": "1",
        "student.hf": "tiny",
        "student.layout.tensor": "2",
        "training.steps": "12",
        "modules.train": "null",
    }
    [file] = wandb_files(run)
    updates = [item for record in records(file) if record.HasField("config") for item in record.config.update]
    config = {item.key: json.loads(item.value_json) for item in updates}
    assert config["recipe"] == "quickstart"
    assert {key: config[key] for key in CONFIG} == CONFIG
    [begun] = [record.run for record in records(file) if record.HasField("run")][:1]
    assert (begun.display_name, begun.project) == ("a run", "opd")


@pytest.mark.parametrize(
    ("status", "mlflow_word", "exit_code", "is_preempted"),
    [("finished", "FINISHED", 0, False), ("interrupted", "KILLED", 75, True), ("crashed", "FAILED", 1, False)],
)
def test_a_run_ends_in_the_words_of_its_tracker(tmp_path: Path, status: Any, mlflow_word: str, exit_code: int, is_preempted: bool) -> None:
    run = open_run(tmp_path)
    job = Job(run, wandb_of(run), mlflow_of(run))
    job.steps(1, 2)
    job.writer.close(status)
    client, run_id = mlflow_client(run)
    assert client.get_run(run_id).info.status == mlflow_word
    found = records(wandb_files(run)[0])
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [exit_code]
    assert any(record.HasField("preempting") for record in found) == is_preempted


# --- a run that is continued


@pytest.mark.parametrize("tracker", READERS)
def test_steps_that_run_again_are_there_once_and_in_order(tmp_path: Path, tracker: str) -> None:
    make, points = READERS[tracker]
    run = open_run(tmp_path)
    job = Job(run, make(run))
    job.steps(1, 9)
    job.evaluation(9, 0.5)
    job.writer.close("crashed")
    again = Job(run, make(run), first_step=6)
    again.steps(6, 9)
    again.evaluation(9, 0.5)
    again.steps(10, 12)
    again.evaluation(12, 0.6)
    again.writer.close("finished")
    assert points(run, "train/loss") == recorded_points(run, "loss") == [(step, 1 / step) for step in range(1, 13)]
    assert points(run, "evaluation/student_accuracy") == [(9, 0.5), (12, 0.6)]
    ids = {file.stem for file in wandb_files(run)} if tracker == "wandb" else {mlflow_client(run)[1]}
    assert len(ids) == 1, "the second job continues the run of the first"
    if tracker == "mlflow":
        client, run_id = mlflow_client(run)
        assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_that_is_asked_for_late_gets_all_that_was_recorded(tmp_path: Path, tracker: str) -> None:
    make, points = READERS[tracker]
    run = open_run(tmp_path)
    job = Job(run)
    job.evaluation(0, 0.2)
    job.steps(1, 5)
    job.writer.close("interrupted")
    again = Job(run, make(run), first_step=6)
    again.steps(6, 8)
    again.writer.close("finished")
    assert points(run, "train/loss") == recorded_points(run, "loss")
    assert points(run, "evaluation/student_accuracy") == [(0, 0.2)]


@pytest.mark.parametrize(("tracker", "safe"), [("wandb", None), ("wandb", 8), ("mlflow", 9)])
def test_a_job_that_was_killed_leaves_no_gap(tmp_path: Path, tracker: str, safe: int | None) -> None:
    """Killed with the process that W&B starts, as by a scheduler: at once, and when the tracker has what is closed."""
    code = f"""
job = Job(run, {READERS[tracker][0].__name__}(run))
job.steps(1, 9)
deadline = time.monotonic() + 60
while {safe is not None} and time.monotonic() < deadline and '"train": {safe}' not in "".join(file.read_text() for file in run.trackers.glob("*.json")):
    time.sleep(0.1)
print("logged", flush=True)
time.sleep(60)
"""
    with job_process(tmp_path, code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        for pid in [process.pid, *children_of(process.pid)]:
            os.kill(pid, signal.SIGKILL)
    make, points = READERS[tracker]
    run = open_run(tmp_path)
    again = Job(run, make(run), first_step=6)
    again.steps(6, 12)
    again.writer.close("finished")
    assert [step for step, _ in points(run, "train/loss")] == list(range(1, 13))


def test_what_a_continued_run_has_set_anew_is_shown(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    Job(run, wandb_of(run), mlflow_of(run)).writer.close("finished")
    run.unlock()
    for steps in (20, 30):
        run = open_run(tmp_path, {**CONFIG, "training": {"steps": steps}})
        Job(run, wandb_of(run), mlflow_of(run)).writer.close("finished")
        run.unlock()
    client, run_id = mlflow_client(run)
    found = client.get_run(run_id).data
    assert (found.params["training.steps"], found.tags["now.training.steps"]) == ("12", "30")
    updates = [item for record in records(wandb_files(run)[-1]) if record.HasField("config") for item in record.config.update]
    assert json.loads(next(item.value_json for item in updates if item.key == "training")) == {"steps": 30}


def test_another_project_is_another_run(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    job = Job(run, wandb_of(run))
    job.steps(1, 3)
    job.writer.close("interrupted")
    again = Job(run, wandb_of(run, project="other"), first_step=4)
    again.steps(4, 5)
    again.writer.close("finished")
    by_project = {next(record.run.project for record in records(file) if record.HasField("run")): file for file in wandb_files(run)}
    assert by_project["opd"].stem != by_project["other"].stem
    assert [row["_step"] for row in history(by_project["other"])] == [1, 2, 3, 4, 5]


# --- a tracker that fails


@pytest.mark.parametrize("tracker", READERS)
@pytest.mark.parametrize("server", ["gone", "silent"])
def test_a_tracker_without_a_server_neither_ends_nor_slows_a_run(tmp_path: Path, tracker: str, server: str) -> None:
    key = "a" * 40
    code = f"""
from opd_megatron.reporting import trackers
trackers._END_SECONDS, trackers._WANDB_INIT_SECONDS = {{"finished": 4.0}}, 2.0
job = Job(run, {"wandb_of(run, mode='online')" if tracker == "wandb" else "mlflow_of(run, os.environ['WANDB_BASE_URL'])"})
started = time.monotonic()
job.steps(1, 50)
logged = time.monotonic()
job.writer.close("finished")
print(json.dumps([logged - started, time.monotonic() - logged, job.notes]))
"""
    with silent_server() as silent:
        address = silent if server == "silent" else closed_port()
        with job_process(tmp_path, code, WANDB_API_KEY=key, WANDB_BASE_URL=address) as process:
            assert process.stdout is not None
            said = process.stdout.readline()
            ending = time.monotonic()
            out, err = process.communicate(timeout=60)
            exit_seconds = time.monotonic() - ending
    assert process.returncode == 0, err
    log_seconds, end_seconds, notes = json.loads(said)
    # The slack is for a busy machine: each of these servers would be waited for 20 s and more.
    assert log_seconds < 3, "50 steps wait for nothing"
    assert end_seconds < 7, "the end waits for 4 s"
    assert exit_seconds < 10, "and the process ends"
    assert len(RunDirectory(tmp_path).metrics_path.read_text().splitlines()) == 50
    assert any("has not taken all of this run" in note for note in notes)
    assert sum("failed" in note for note in notes) <= 1, "said once"
    assert key not in said + out + err + "".join(file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())


def test_what_could_not_be_sent_is_sent_when_the_tracker_is_back(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.mlflow.write_text("in the way")
    job = Job(run, mlflow_of(run))
    job.steps(1, 3)
    deadline = time.monotonic() + 30
    while not job.notes and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "MLflow failed" in job.notes[0]
    run.mlflow.unlink()
    job.steps(4, 5)
    job.writer.close("finished")
    assert mlflow_points(run, "train/loss") == recorded_points(run, "loss")


@pytest.mark.parametrize("content", ["", "{cut", "[]", '{"target": "/opd", "run_id": null, "sent": {"train": "x"}}'])
def test_a_damaged_memory_begins_a_new_run(tmp_path: Path, content: str) -> None:
    run = open_run(tmp_path)
    run.trackers.mkdir()
    (run.trackers / "MlflowTracker.json").write_text(content)
    job = Job(run, mlflow_of(run))
    job.steps(1, 2)
    job.writer.close("finished")
    assert mlflow_points(run, "train/loss") == recorded_points(run, "loss")


def test_an_offline_run_asks_the_network_for_nothing_and_keeps_its_files_together(tmp_path: Path) -> None:
    """Both packages go through a proxy where the environment names one: nobody called."""
    code = """
job = Job(run, wandb_of(run), mlflow_of(run))
job.steps(1, 3)
job.writer.close("finished")
print(json.dumps(job.notes))
"""
    home = tmp_path / "home"
    home.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        with job_process(tmp_path / "run", code, HOME=str(home), HTTPS_PROXY=address, HTTP_PROXY=address, https_proxy=address, http_proxy=address) as process:
            out, err = process.communicate(timeout=60)
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert process.returncode == 0, err
    assert not [note for note in json.loads(out) if "failed" in note]
    assert not [path for path in home.rglob("*") if "wandb" in path.name or "mlflow" in path.name]


# --- what is refused before anything starts


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
@pytest.mark.parametrize("found", [None, ModuleSpec("a folder of that name", None)])
def test_a_package_that_is_not_installed_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch, package: str, found: ModuleSpec | None) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == package else find(name))
    words = ["tracking.wandb_project=p", "tracking.wandb_mode=offline", "tracking.mlflow_experiment=e"]
    with pytest.raises(ValueError, match=rf"needs {package}, which is not installed: pip install {package}"):
        resolve("quickstart", words, None)


@pytest.mark.parametrize(
    "uri",
    ["https://me:hunter2@host/path", "https://hunter2@host", "postgresql://me:hunter2@db/mlflow", "https://host/?api_key=hunter2", "http://me:a/hunter2@host"],
)
@pytest.mark.parametrize("source", ["tracking.mlflow_uri", "MLFLOW_TRACKING_URI"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(uri: str, source: str) -> None:
    words = ["tracking.mlflow_experiment=e"]
    if source == "MLFLOW_TRACKING_URI":
        os.environ[source] = uri
    else:
        words.append(f"{source}={uri}")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        resolve("quickstart", words, None)
    assert source in str(refusal.value)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("uri", ["http://host:5000", "https://host/a/b", "file:///data/at@home/mlruns", "mlruns", "databricks://profile"])
def test_an_address_without_a_secret_is_taken(uri: str) -> None:
    assert resolve("quickstart", ["tracking.mlflow_experiment=e", f"tracking.mlflow_uri={uri}"], None).tracking.mlflow_uri == uri


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tracking.wandb_project=p"], "export WANDB_API_KEY"),
        (["tracking.wandb_project=a/b", "tracking.wandb_mode=offline"], "is no name of a project"),
        (["tracking.wandb_entity=me"], "set that as well"),
        (["tracking.mlflow_uri=http://host"], "set that as well"),
        (["tracking.mlflow_experiment=e", "tracking.mlflow_uri=sqlite:///mlflow.db"], "pip install mlflow"),
    ],
)
def test_what_no_tracker_could_do_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], said: str) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=said):
        resolve("quickstart", words, None)


def test_a_key_is_found_where_wandb_login_leaves_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "a" * 40 + "\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert resolve("quickstart", ["tracking.wandb_project=p"], None).tracking.wandb_project == "p"


def test_the_check_of_the_command_line_imports_no_tracker() -> None:
    code = "import sys; from recipes.run import main; code = main(); sys.exit(code or 3 * bool({'wandb', 'mlflow', 'torch'} & set(sys.modules)))"
    words = ["quickstart", "--check", "tracking.wandb_project=p", "tracking.wandb_mode=offline", "tracking.mlflow_experiment=e"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tracking"]["wandb_project"] == "p"
