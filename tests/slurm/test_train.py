"""slurm/train.sbatch on a real Slurm of two nodes: runs that finish, are preempted and go on, crash and do not, and mistakes that start nothing.

Not covered: containers, GPUs, accounting, several machines.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.programs import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import SITE, assert_same_weights, log_of, pid_of_rank, status_of, submit, wait_for_steps, weights_of_an_undisturbed_run


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_ends_with_the_weights_of_an_uninterrupted_run(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    steps = ("training.steps=60", "checkpoint.every_steps=50")
    run = tmp_path / "preempted"
    job = submit(cluster, run, *small_run, *steps)
    wait_for_steps(run, 3)
    assert cluster.run("scancel", "--signal=TERM", str(job)).returncode == 0
    facts = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("COMPLETED", "1", "0:0"), log_of(run)
    assert status_of(run) == "finished"
    assert "attempt 0 ended: interrupted" in log_of(run)
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["attempt_0", "attempt_1", "latest"]
    assert os.readlink(run / "logs" / "latest") == "attempt_1"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(range(1, 61))

    assert_same_weights(run, weights_of_an_undisturbed_run(tmp_path / "whole", *small_run, *steps))


@pytest.mark.slow
def test_a_crash_is_not_queued_again(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run, *small_run, "training.steps=500", "checkpoint.every_steps=2")
    wait_for_steps(run, 5)
    started = time.monotonic()
    os.kill(pid_of_rank(run, 3), signal.SIGKILL)
    facts = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=90)
    assert facts["JobState"] == "FAILED", log_of(run)
    assert facts["Restarts"] == "0"
    assert time.monotonic() - started < 60
    assert status_of(run) == "crashed"
    assert list((run / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_restarts_are_bounded(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run, *small_run, "training.steps=500", OPD_MAX_RESTARTS="0")
    wait_for_steps(run, 2)
    cluster.run("scancel", "--signal=TERM", str(job))
    facts = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout=90)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "75:0"), log_of(run)
    assert status_of(run) == "interrupted"
    assert "OPD_MAX_RESTARTS=0 is reached" in log_of(run)


MISTAKES = {
    "bad override": (["training.steps=0"], {}, "training.steps=0 must be at least 1"),
    "node count": (["student.layout.tensor=1", "student.layout.pipeline=3"], {}, "world_size=4 is not a multiple"),
    "unwritable": ([], {"run": "/proc/nowhere"}, "/proc/nowhere cannot be written"),
    "no image": ([], {"OPD_IMAGE": "/nowhere/opd.sqsh"}, "OPD_IMAGE=/nowhere/opd.sqsh does not exist"),
    "no pyxis": ([], {"OPD_IMAGE": "nvcr.io#nvidia/pytorch"}, "OPD_IMAGE needs Pyxis"),
    "restarts": ([], {"OPD_MAX_RESTARTS": "many"}, "OPD_MAX_RESTARTS=many is not a number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_the_job_with_2_and_its_reason_last(cluster: Cluster, small_run: list[str], tmp_path: Path, name: str) -> None:
    words, variables, message = MISTAKES[name]
    run = Path(variables.get("run", tmp_path / "run"))
    log = tmp_path / "job.log"
    site = (*SITE, f"--output={log}")
    environment = {"OPD_PYTHON": sys.executable, **{key: value for key, value in variables.items() if key != "run"}}
    job = cluster.submit(*site, "slurm/train.sbatch", "quickstart", "--run-dir", str(run), *small_run, *words, cwd=ROOT, **environment)
    facts = cluster.wait(job, "COMPLETED", "FAILED", timeout=180)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), log.read_text()
    told = [line for line in log.read_text().splitlines() if not line.startswith("srun:")]
    assert message in told[-1]
    assert not (tmp_path / "run" / "status").exists()
    assert not (tmp_path / "run" / "logs").exists()
