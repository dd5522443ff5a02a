"""slurm/train.sbatch on a real Slurm of two nodes: runs that finish, are preempted and go on, crash and do not, and mistakes that start nothing.

Not covered: containers, GPUs, accounting, several machines.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.programs import ROOT
from tests.slurm.cluster import Cluster

# As on a cluster of eight GPUs a node, of which the jobs here take two.
SITE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=1:00:00")


def submit(cluster: Cluster, run: Path, *words: str, site: tuple[str, ...] = SITE, **variables: str) -> int:
    log = run.parent / f"{run.name}.log"
    variables = {"OPD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    return cluster.submit(*site, f"--output={log}", "slurm/train.sbatch", "quickstart", "--run-dir", str(run), *words, cwd=ROOT, **variables)


def wait_for_steps(run: Path, steps: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= steps:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {steps} was not reached: {log_of(run)}")


def log_of(run: Path) -> str:
    return (run.parent / f"{run.name}.log").read_text()


def status_of(run: Path) -> str:
    return (run / "status").read_text().strip()


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

    command = [sys.executable, "-m", "recipes.run", "quickstart", "--nproc-per-node", "4", "--run-dir", str(tmp_path / "whole"), *small_run, *steps]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    preempted, whole = (load_file(folder / "hf" / "model.safetensors") for folder in (run, tmp_path / "whole"))
    assert all(torch.equal(whole[name], preempted[name]) for name in whole)


def pid_of_rank(run: Path, rank: int) -> int:
    """Return the process of one rank of a job that runs in this folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(run).encode() in words and b"python" in words[0] and f"SLURM_PROCID={rank}".encode() in variables:
            return int(process.name)
    raise AssertionError(f"rank {rank} of {run} is not running")


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
    facts = cluster.wait(job, "COMPLETED", "FAILED", timeout=60)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), log.read_text()
    told = [line for line in log.read_text().splitlines() if not line.startswith("srun:")]
    assert message in told[-1]
    assert not (tmp_path / "run" / "status").exists()
    assert not (tmp_path / "run" / "logs").exists()
