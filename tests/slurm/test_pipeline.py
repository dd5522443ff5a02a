"""slurm/pipeline.sh: convert, train, export and evaluate as jobs that wait for one another, up to a folder that transformers loads.

Not covered: containers, GPUs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.programs import ROOT
from tests.slurm.cluster import Cluster

TRAIN = "--nodes=2 --ntasks-per-node=2 --gpus-per-node=2"


def pipeline(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return cluster.run("bash", "slurm/pipeline.sh", *arguments, cwd=ROOT, OPD_PYTHON=sys.executable, OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_the_chain_ends_with_a_folder_that_transformers_loads_and_its_accuracy(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    student = next(word for word in small_run if word.startswith("student.hf=")).removeprefix("student.hf=")
    prompts = next(word for word in small_run if word.startswith("data.prompts=")).removeprefix("data.prompts=")
    words = [word for word in small_run if not word.startswith("student.hf=")]
    out = tmp_path / "out"
    submitted = pipeline(
        cluster, "quickstart", "--student", student, "--data", prompts, "--run-dir", str(out), "--train", TRAIN, "--", *words, "training.steps=4"
    )
    assert submitted.returncode == 0, submitted.stderr
    jobs = dict(line.split() for line in submitted.stdout.splitlines()[:4])
    assert list(jobs) == ["convert", "train", "export", "evaluate"]
    for name, job in jobs.items():
        facts = cluster.wait(int(job), "COMPLETED", "FAILED", "CANCELLED")
        assert facts["JobState"] == "COMPLETED", (name, (out / "logs" / f"{name}.log").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "hf"), AutoTokenizer.from_pretrained(out / "hf")
    text = tokenizer("say 1", return_tensors="pt")
    assert model(**text).logits.isfinite().all()
    record = json.loads((out / "logs" / "evaluate.log").read_text().splitlines()[-1])
    assert record["prompts"] == 64


def test_a_chain_stops_at_the_job_that_fails(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    student = next(word for word in small_run if word.startswith("student.hf=")).removeprefix("student.hf=")
    prompts = next(word for word in small_run if word.startswith("data.prompts=")).removeprefix("data.prompts=")
    words = [word for word in small_run if not word.startswith("student.hf=")]
    # No prompt is as short as that, which only the run itself can see.
    arguments = ("--student", student, "--data", prompts, "--run-dir", str(tmp_path / "out"), "--train", TRAIN, "--", *words, "data.max_prompt_tokens=3")
    submitted = pipeline(cluster, "quickstart", *arguments)
    jobs = dict(line.split() for line in submitted.stdout.splitlines()[:4])
    facts = cluster.wait(int(jobs["train"]), "FAILED", "COMPLETED")
    assert facts["ExitCode"] == "2:0"
    for name in ("export", "evaluate"):
        assert cluster.wait(int(jobs[name]), "CANCELLED", "COMPLETED", "FAILED")["JobState"] == "CANCELLED"


MISTAKES = {
    "no recipe": ([], "name a recipe first"),
    "no student": (["quickstart", "--student", "nowhere", "--data", "x", "--run-dir", "{new}"], "--student 'nowhere' is no Hugging Face folder"),
    "no data": (["quickstart", "--student", "{student}", "--run-dir", "{new}"], "--data is missing"),
    "old folder": (["quickstart", "--student", "{student}", "--data", "x", "--run-dir", "{old}"], "a pipeline begins with a new folder"),
    "unknown option": (["quickstart", "--nodes", "4"], "unknown option --nodes; KEY=VALUE words come after --"),
    "unknown partition": (
        ["quickstart", "--student", "{student}", "--data", "x", "--run-dir", "{new}", "--train", "--partition=nowhere -n 4"],
        "sbatch refused the job 'train'; nothing was submitted",
    ),
    "no data file": (["quickstart", "--student", "{student}", "--data", "nowhere.jsonl", "--run-dir", "{new}"], "--data nowhere.jsonl is no file"),
    "no ranks": (
        ["quickstart", "--student", "{student}", "--data", "x", "--run-dir", "{new}", "--train", "--nodes=2"],
        "put --nodes=N --ntasks-per-node=G into it",
    ),
    "two students": (["quickstart", "--student", "{student}", "--data", "x", "--run-dir", "{new}", "--", "student.hf=x"], "--student names the student"),
    "bad override": (
        ["quickstart", "--student", "{student}", "--data", "x", "--run-dir", "{new}", "--train", TRAIN, "--", "training.steps=0"],
        "training.steps=0 must be at least 1",
    ),
    "ranks that do not fit": (
        ["quickstart", "--student", "{student}", "--data", "x", "--run-dir", "{new}", "--train", "-N1 --ntasks-per-node=3"],
        "world_size=3 is not a multiple",
    ),
    "unknown recipe": (["nosuch", "--student", "{student}", "--data", "x", "--run-dir", "{new}", "--train", TRAIN], "unknown recipe 'nosuch'"),
    "unwritable": (["quickstart", "--student", "{student}", "--data", "x", "--run-dir", "/proc/nowhere", "--train", TRAIN], "/proc/nowhere cannot be written"),
    "more nodes than there are": (
        ["quickstart", "--student", "{student}", "--data", "x", "--run-dir", "{new}", "--train", "-N9 --ntasks-per-node 4"],
        "sbatch refused the job 'train'; nothing was submitted",
    ),
    "account that may not": (
        ["quickstart", "--student", "{student}", "--data", "x", "--run-dir", "{new}", "--train", "--partition=closed --ntasks=4"],
        "sbatch refused the job 'train'; nothing was submitted",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_submits_nothing(cluster: Cluster, small_run: list[str], tmp_path: Path, name: str) -> None:
    words, message = MISTAKES[name]
    student = next(word for word in small_run if word.startswith("student.hf=")).removeprefix("student.hf=")
    submitted = pipeline(cluster, *(word.format(student=student, new=tmp_path / "new", old=tmp_path) for word in words))
    assert submitted.returncode == 2
    assert message in submitted.stderr.splitlines()[-1]
    waiting = cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING", "--name=opd-convert,opd-train,opd-export,opd-evaluate").stdout
    assert waiting.strip() == ""
    assert not (tmp_path / "new").exists()
