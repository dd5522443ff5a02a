"""The quickstart recipe: a short run leaves everything a user expects; the full run (slow) reaches what the README says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.programs import ROOT, run_program


def _run(recipe: str, run: Path, *overrides: str, ranks: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recipes.run", recipe, "--nproc-per-node", str(ranks), "--run-dir", str(run), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _accuracy(run: Path, who: str = "student") -> list[float]:
    return [record["accuracy"] for record in _lines(run / "evals.jsonl") if record["who"] == who]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("quickstart") / "run"
    _run("quickstart", run, "training.steps=3", "evaluation.prompts=32", "data.task_size=2000", "rollout.record=true", ranks=4)
    return run


def test_the_run_directory_holds_what_the_readme_promises(short_run: Path) -> None:
    assert (short_run / "status").read_text().strip() == "finished"
    config = json.loads((short_run / "config.json").read_text())
    assert config["recipe"] == "quickstart"
    assert config["config"]["training"]["steps"] == 3
    steps = _lines(short_run / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3]
    promised = "step loss divergence student_entropy kept_fraction response_tokens grad_norm lr rollout_seconds teacher_seconds train_seconds step_seconds"
    assert set(promised.split()) <= set(steps[0])
    assert [(record["step"], record["who"]) for record in _lines(short_run / "evals.jsonl")] == [(0, "teacher"), (0, "student"), (3, "student")]
    assert (short_run / "checkpoints" / "step_3" / "metadata.json").is_file()
    assert len(_lines(short_run / "rollouts" / "step_1.jsonl")) == 128
    assert list((short_run / "tensorboard").iterdir())
    report = (short_run / "report.html").read_text()
    assert report.count("data:image/svg+xml") >= 5
    assert not re.search(r"(src|href)=.https?://", report), "one file, nothing outside it"


def test_phases_of_a_step_add_up_to_it(short_run: Path) -> None:
    for step in _lines(short_run / "metrics.jsonl"):
        parts = sum(step[f"{part}_seconds"] for part in ("rollout", "align", "teacher", "weigh", "train", "probe", "idle"))
        assert 0.95 * step["step_seconds"] < parts <= step["step_seconds"]
        assert 0.9 * step["train_seconds"] < step["forward_backward_seconds"] + step["optimizer_seconds"] <= step["train_seconds"]
        assert step["tokens_per_second_per_gpu"] * 4 == pytest.approx(step["tokens_per_second"])


def test_transformers_loads_the_exported_student_and_answers_alike(short_run: Path) -> None:
    done = subprocess.run([sys.executable, "tools/show_answers.py", str(short_run)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    equal, total, answers = map(int, re.findall(r"(\d+) of (\d+) tokens in (\d+) answers", done.stdout)[0])
    assert answers >= 16
    assert total > 3 * answers
    assert equal >= 0.99 * total


def test_show_answers_fails_for_another_model(short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copy(ROOT / "recipes" / "assets" / "tiny_student" / "model.safetensors", tmp_path / "run" / "hf" / "model.safetensors")
    weights = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    save_file({name: weight * 0.5 for name, weight in weights.items()}, tmp_path / "run" / "hf" / "model.safetensors", metadata={"format": "pt"})
    done = run_program("tools.show_answers", tmp_path / "run")
    assert done.returncode == 1, done.stdout


@pytest.mark.slow
def test_a_finished_run_started_again_stays_finished(short_run: Path) -> None:
    before = _lines(short_run / "metrics.jsonl")
    _run("quickstart", short_run, "training.steps=3", "evaluation.prompts=32", "data.task_size=2000", "rollout.record=true", ranks=4)
    assert _lines(short_run / "metrics.jsonl") == before
    # The weights that were loaded again are those that were saved: what they answer is the same.
    first, *_, again = [record for record in _lines(short_run / "evals.jsonl") if record["who"] == "student" and record["step"] == 3]
    assert again["examples"] == first["examples"]
    assert (short_run / "status").read_text().strip() == "finished"


@pytest.mark.slow
def test_the_quickstart_reaches_the_accuracy_of_the_readme(tmp_path: Path) -> None:
    _run("quickstart", tmp_path / "run", ranks=4)
    (teacher,) = _accuracy(tmp_path / "run", "teacher")
    warm, *_, final = _accuracy(tmp_path / "run")
    assert teacher >= 0.9
    assert final >= 0.9 * teacher
    assert final >= warm + 0.2


@pytest.mark.slow
def test_the_committed_models_can_be_remade(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "tools/make_tiny_models.py", "--out", str(tmp_path / "tiny")], cwd=ROOT, check=True, timeout=120)
    _run("tiny_teacher", tmp_path / "teacher", f"student.hf={tmp_path / 'tiny' / 'teacher'}", ranks=2)
    _run("tiny_student", tmp_path / "student", f"student.hf={tmp_path / 'tiny' / 'student'}", ranks=2)
    _run("tiny_deep_student", tmp_path / "deep_student", f"student.hf={tmp_path / 'tiny' / 'deep_student'}", ranks=2)
    # Other processors round differently, so the weights differ; what they can do must not. All are measured on their own task.
    assert _accuracy(tmp_path / "teacher")[-1] >= 0.95
    assert _accuracy(tmp_path / "deep_student")[-1] >= 0.9
    assert _accuracy(tmp_path / "student")[-1] >= 0.85
