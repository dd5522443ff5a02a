"""nemo-run's Slurm executor on a real Slurm of two nodes: runs and chains that end, are preempted and go on, crash and do not, and leave no secret anywhere.

Not covered: containers, GPUs, accounting, several machines, submission from another machine (SSH).
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.launching import files_under, launch, needs_nemo
from tests.programs import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import assert_same_weights, pid_of_rank, status_of, wait_for_steps, weights_of_an_undisturbed_run

pytestmark = needs_nemo

SITE = ("--executor", "slurm", "--account", "none", "--partition", "main", "--gpus-per-node", "2", "--time", "1:00:00")
SECRETS = {"HF_TOKEN": "hf_notforanyfile", "WANDB_API_KEY": "wandb_notforanyfile"}


def launch_on(cluster: Cluster, run: Path, *words: object, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
    return launch("quickstart", *SITE, "--run-dir", run, *words, environment=cluster.environment, timeout=timeout, **variables)


def jobs_of(launched: subprocess.CompletedProcess[str]) -> dict[str, int]:
    assert launched.returncode == 0, launched.stderr
    return {name: int(job) for name, job in re.findall(r"^(\w+) (\d+)$", launched.stdout, re.MULTILINE)}


def job_log(run: Path, step: str = "train") -> str:
    (log,) = (run / "nemo").rglob(f"sbatch_opd-{step}_*.out")
    return log.read_text()


def waiting_jobs(cluster: Cluster) -> str:
    return cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING", "--name=opd-convert,opd-train,opd-export").stdout.strip()


def readable(file: Path) -> str:
    """Return a file's text and what is packed in it: nemo-run stores its configuration as base64 of zlib."""
    text = file.read_bytes().decode(errors="replace")
    for packed in re.findall(r"[A-Za-z0-9_-]{40,}={0,2}", text):
        try:
            text += zlib.decompress(base64.urlsafe_b64decode(packed)).decode(errors="replace")
        except (ValueError, zlib.error):
            continue
    return text


def test_a_run_on_two_nodes_ends_and_no_file_of_it_holds_a_secret(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    # A name that bash, nemo-run's templates and sbatch would each read in their own way.
    prompts = tmp_path / 'it\'s $$ a "file" of $HOME.jsonl'
    shutil.copy(next(word for word in small_run if word.startswith("data.prompts=")).removeprefix("data.prompts="), prompts)
    run, home = tmp_path / "a user's run", tmp_path / "nemo"
    words = ("--submit", "--wait", "--gpus-per-node", "1", *small_run, "world_size=2", "training.steps=1", f"data.prompts={prompts}")
    launched = launch_on(cluster, run, *words, NEMORUN_HOME=str(home), **SECRETS)
    assert launched.returncode == 0, launched.stderr + job_log(tmp_path)
    assert launched.stdout.splitlines()[-1].endswith("COMPLETED")
    assert status_of(run) == "finished"
    assert sorted(path.name for path in (run / "logs" / "attempt_0").glob("rank_*")) == [f"rank_{rank}.log" for rank in range(2)]
    assert os.readlink(run / "logs" / "latest") == "attempt_0"
    written = {file: readable(file) for file in files_under(tmp_path)}
    assert any("SlurmExecutor" in text for file, text in written.items() if file.name == "_TASKS"), "what nemo-run packs is read"
    for secret in (*SECRETS, *SECRETS.values()):
        assert not [file for file, text in written.items() if secret in text]
        assert secret not in launched.stdout + launched.stderr


def test_a_dry_run_prints_the_scripts_and_leaves_nothing(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    shown = launch_on(cluster, tmp_path / "run", *small_run, "--slurm", "exclusive", "--slurm", "mem=0", **SECRETS)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == "dry run: nothing is submitted; add --submit"
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --signal=TERM@600",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
    ):
        assert line in shown.stdout.splitlines()
    assert "--wait=60 --kill-on-bad-exit=1" in shown.stdout
    script = shown.stdout.split("# train\n")[1].rpartition("dry run:")[0]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0
    assert not list(tmp_path.iterdir())
    assert waiting_jobs(cluster) == ""


def test_a_chain_of_which_slurm_refuses_a_job_leaves_none(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    student = next(word for word in small_run if word.startswith("student.hf=")).removeprefix("student.hf=")
    words = [word for word in small_run if not word.startswith("student.hf=")]
    # The conversion could run; training asks for more than there is.
    launched = launch_on(cluster, tmp_path / "run", "--submit", "--convert-from", student, *words, "--slurm", "constraint=none_such")
    assert launched.returncode == 2
    assert re.fullmatch(r"error: sbatch refused the job 'train': .*; nothing is submitted", launched.stderr.splitlines()[-1])
    assert waiting_jobs(cluster) == ""
    assert not (tmp_path / "run" / "nemo").exists()


@pytest.mark.slow
def test_a_chain_with_a_preemption_ends_with_a_folder_that_transformers_loads(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    student = next(word for word in small_run if word.startswith("student.hf=")).removeprefix("student.hf=")
    words = [word for word in small_run if not word.startswith("student.hf=")]
    run, out = tmp_path / "run", tmp_path / "hf"
    jobs = jobs_of(launch_on(cluster, run, "--submit", "--convert-from", student, "--export", out, *words, "training.steps=20", **SECRETS))
    assert list(jobs) == ["convert", "train", "export"]
    wait_for_steps(run, 2, job_log)
    assert cluster.run("scancel", "--signal=TERM", str(jobs["train"])).returncode == 0
    facts = {name: cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED") for name, job in jobs.items()}
    assert [one["JobState"] for one in facts.values()] == ["COMPLETED"] * 3, job_log(run)
    assert facts["train"]["Restarts"] == "1"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model(**tokenizer("say 1", return_tensors="pt")).logits.isfinite().all()
    trained, exported = (load_file(folder / "model.safetensors") for folder in (run / "hf", out))
    assert all(torch.equal(trained[name], exported[name]) for name in trained)
    assert not [file for file in files_under(run) for secret in SECRETS.values() if secret in readable(file)]


@pytest.mark.slow
def test_a_chain_stops_at_the_step_that_fails(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    student = next(word for word in small_run if word.startswith("student.hf=")).removeprefix("student.hf=")
    words = ("--submit", "--convert-from", student, "--export", tmp_path / "hf", *(word for word in small_run if not word.startswith("student.hf=")))
    launched = launch_on(cluster, tmp_path / "run", *words, OPD_PYTHON="/bin/false")
    jobs = jobs_of(launched)
    assert cluster.wait(jobs["convert"], "FAILED", "COMPLETED")["ExitCode"] == "1:0"
    for name in ("train", "export"):
        assert cluster.wait(jobs[name], "CANCELLED", "COMPLETED", "FAILED")["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_a_preempted_run_is_queued_again_and_ends_with_the_weights_of_an_uninterrupted_one(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    steps = ("training.steps=60", "checkpoint.every_steps=50")
    run = tmp_path / "preempted"
    job = jobs_of(launch_on(cluster, run, "--submit", *small_run, *steps))["train"]
    wait_for_steps(run, 3, job_log)
    refused = launch_on(cluster, run, "--submit", *small_run, *steps)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(f"error: another job is running in {run}")
    assert cluster.run("scancel", "--signal=TERM", str(job)).returncode == 0
    facts = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("COMPLETED", "1", "0:0"), job_log(run)
    assert status_of(run) == "finished"
    assert "attempt 0 ended: interrupted" in job_log(run)
    assert "attempt 1 ended: finished" in job_log(run)
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["attempt_0", "attempt_1", "latest"]

    assert_same_weights(run, weights_of_an_undisturbed_run(tmp_path / "whole", *small_run, *steps))


@pytest.mark.slow
def test_a_crash_is_not_queued_again(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = jobs_of(launch_on(cluster, run, "--submit", *small_run, "training.steps=500", "checkpoint.every_steps=2"))["train"]
    wait_for_steps(run, 5, job_log)
    started = time.monotonic()
    os.kill(pid_of_rank(run, 3), signal.SIGKILL)
    facts = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=90)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), job_log(run)
    assert time.monotonic() - started < 60
    assert status_of(run) == "crashed"


@pytest.mark.slow
def test_waiting_for_an_interrupted_run_that_may_not_restart_ends_with_75(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--submit", "--wait", *small_run, "training.steps=500")
    with subprocess.Popen(
        [str(ROOT / ".venv-launch/bin/python"), "-m", "opd_megatron.launch", "quickstart", *SITE, "--run-dir", str(run), *words],
        cwd=ROOT,
        env={**cluster.environment, "OPD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OPD_MAX_RESTARTS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        wait_for_steps(run, 2, job_log)
        cluster.run("scancel", "--signal=TERM", "--name=opd-train")
        _, told = waiting.communicate(timeout=600)
    assert waiting.returncode == 75, told
    assert status_of(run) == "interrupted"
