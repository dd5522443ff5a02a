"""Nodes that a job loses: silent, dead, or without their slurmd. Slurm gives them up, and runs the job again on others, from its last save.

Not covered: several machines (the nodes here share one kernel and one disk).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import Cluster, missing_programs, start_cluster
from tests.slurm.jobs import ENDLESS, STEPS, assert_same_weights, end_of, log_of, measured, pid_of_rank, status_of, submit, wait_for_steps, wait_until


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm that has one node more than the jobs want, and gives a silent one up after 15 seconds instead of the usual 300."""
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    cluster = start_cluster(tmp_path_factory.mktemp("slurm") / "cluster", num_nodes=3, slurmd_timeout=15)
    yield cluster
    cluster.stop()


def processes_of_node(cluster: Cluster, node: str) -> list[int]:
    """Return a node's slurmd, its tasks and batch scripts, and the step daemons that have started them."""
    conf, found = f"SLURM_CONF={cluster.folder / 'slurm.conf'}".encode(), {slurmd_of(cluster, node)}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (process / "environ").read_bytes().split(b"\0")
            if f"SLURMD_NODENAME={node}".encode() in variables and conf in variables:
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                is_step_daemon = (Path("/proc") / str(parent) / "cmdline").read_bytes().startswith(b"slurmstepd")
                found |= {int(process.name), parent} if is_step_daemon else {int(process.name)}
    return sorted(found)


def slurmd_of(cluster: Cluster, node: str) -> int:
    return int((cluster.folder / f"slurmd.{node}.pid").read_text())


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def state_of_node(cluster: Cluster, node: str) -> str:
    """Return `IDLE`, `DOWN+COMPLETING+NOT_RESPONDING` and the like."""
    return re.findall(r"State=(\S+)", cluster.run("scontrol", "show", "node", node).stdout)[0]


@contextlib.contextmanager
def node_to_lose(cluster: Cluster, node: str) -> Iterator[None]:
    """Bring the node back afterwards, for the next test."""
    try:
        yield
    finally:
        send(processes_of_node(cluster, node), signal.SIGKILL)
        subprocess.run(["slurmd", "-N", node, "-f", str(cluster.folder / "slurm.conf")], check=True, timeout=30, env=cluster.environment)
        wait_until(lambda: state_of_node(cluster, node) == "IDLE", f"{node} is back")


LOSSES = {"silent": signal.SIGSTOP, "dead": signal.SIGKILL}


@pytest.mark.slow
@pytest.mark.parametrize("node", ["n1", "n2"], ids=["the first, with the script", "another"])
@pytest.mark.parametrize("kind", LOSSES)
def test_slurm_runs_the_job_of_a_lost_node_again_on_others(
    three_nodes: Cluster, small_run: list[str], whole: dict[str, torch.Tensor], tmp_path: Path, kind: str, node: str
) -> None:
    """Silent, as without power or network: no connection is closed, the other ranks wait; its processes are gone when Slurm gives the node up. Dead: its
    kernel closes the connections, the other ranks end at once, and srun still waits for the node's step daemon."""
    run = tmp_path / "run"
    job = submit(three_nodes, run, *small_run, *STEPS)
    wait_for_steps(run, 7)
    with node_to_lose(three_nodes, node):
        lost = processes_of_node(three_nodes, node)
        with measured(f"a {kind} node {node}, until Slurm gives it up", 90):
            send(lost, LOSSES[kind])
            wait_until(lambda: "DOWN" in state_of_node(three_nodes, node), "the node is given up")
        send(lost, signal.SIGKILL)
        facts = three_nodes.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log_of(run)
    assert node not in facts["NodeList"]
    assert "resumed from" in (run / "logs" / "latest" / "rank_0.log").read_text()
    assert status_of(run) == "finished"
    assert_same_weights(run, whole)


@pytest.mark.slow
def test_a_node_without_its_slurmd_has_the_job_run_again(three_nodes: Cluster, small_run: list[str], tmp_path: Path) -> None:
    """The node's tasks live on; they end with those of the other nodes, to which they are connected."""
    run = tmp_path / "run"
    job = submit(three_nodes, run, *small_run, *ENDLESS)
    wait_for_steps(run, 7)
    orphans = [pid_of_rank(run, rank) for rank in (2, 3)]
    with node_to_lose(three_nodes, "n2"):
        with measured("a slurmd that dies alone, until Slurm gives its node up", 90):
            send([slurmd_of(three_nodes, "n2")], signal.SIGKILL)
            wait_until(lambda: three_nodes.show(job).get("Restarts") == "1", "the job is queued again")
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), "no rank of the first attempt is left")
        told = run / "logs" / "attempt_1" / "rank_0.log"
        wait_until(lambda: told.exists() and "resumed from" in told.read_text(), "it goes on")
        three_nodes.run("scancel", str(job))
        end_of(three_nodes, job)
