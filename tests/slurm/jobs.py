"""Jobs of slurm/train.sbatch that tests submit, watch and disturb."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.programs import ROOT
from tests.slurm.cluster import Cluster

# As on a cluster of eight GPUs a node, of which the jobs here take two.
SITE = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=1:00:00")
# What `whole` and every run that must end with its bits share.
STEPS = ("training.steps=30", "checkpoint.every_steps=5")
ENDLESS = ("training.steps=5000", "checkpoint.every_steps=5")


def submit(cluster: Cluster, run: Path, *words: str, site: tuple[str, ...] = SITE, **variables: str) -> int:
    log = run.parent / f"{run.name}.log"
    variables = {"OPD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    return cluster.submit(*site, f"--output={log}", "slurm/train.sbatch", "quickstart", "--run-dir", str(run), *words, cwd=ROOT, **variables)


def wait_for_steps(run: Path, steps: int, log: Callable[[Path], str] | None = None) -> None:
    """Wait until a run has done so many steps; AssertionError with its job's log after ten minutes."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= steps:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {steps} was not reached: {(log or log_of)(run)}")


def log_of(run: Path) -> str:
    return (run.parent / f"{run.name}.log").read_text()


def status_of(run: Path) -> str:
    return (run / "status").read_text().strip()


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


def wait_until(holds: Callable[[], object], what: str, timeout: float = 600) -> None:
    """Return as soon as it holds; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout:g} seconds: {what}"
        time.sleep(0.02)


def end_of(cluster: Cluster, job: int, timeout: float = 300) -> dict[str, str]:
    """Return what Slurm knows of a job that has ended by itself."""
    return cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", timeout=timeout)


def weights_of_an_undisturbed_run(run: Path, *words: str) -> dict[str, torch.Tensor]:
    """Return the student that the same run exports on this machine, where nobody stops it."""
    command = [sys.executable, "-m", "recipes.run", "quickstart", "--nproc-per-node", "4", "--run-dir", str(run), *words]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    return load_file(run / "hf" / "model.safetensors")


def assert_same_weights(run: Path, whole: dict[str, torch.Tensor]) -> None:
    """Fail unless a run has exported these weights, bit for bit."""
    found = load_file(run / "hf" / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)


@contextlib.contextmanager
def measured(what: str, limit: float) -> Iterator[None]:
    """Say how many seconds it took, and fail above a limit."""
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    print(f"{what}: {seconds:.0f} s")
    assert seconds < limit
