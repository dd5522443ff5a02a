"""nemo-run's local executor: runs and chains on this machine, and exit codes that nemo-run itself does not give.

Not covered: GPUs, other systems than Linux.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launching import LAUNCH_PYTHON, files_under, launch, launch_environment, needs_nemo
from tests.programs import ROOT

pytestmark = needs_nemo


def words_of(models: Path, run: Path, *more: str) -> list[str]:
    return [
        *("quickstart", "--executor", "local", "--submit", "--run-dir", str(run), "world_size=2", "student.layout.tensor=1", "student.layout.pipeline=2"),
        *(f"teacher.hf={models / 'teacher'}", f"data.prompts={models / 'prompts.jsonl'}", "data.task_options={}", "data.batch_prompts=8"),
        *("data.grader=exact", "training.micro_batch=4", "evaluation.prompts=0", "training.steps=1", *more),
    ]


def metrics_of(run: Path) -> str:
    file = run / "metrics.jsonl"
    return file.read_text() if file.is_file() else ""


def test_a_run_on_this_machine_ends_with_0(models: Path, tmp_path: Path) -> None:
    one_rank = ("world_size=1", "student.layout.pipeline=1")
    launched = launch(*words_of(models, tmp_path, f"student.hf={models / 'student'}", *one_rank), HF_TOKEN="hf_notforanyfile")
    assert launched.returncode == 0, launched.stderr
    assert "step 1/1" in launched.stdout
    assert (tmp_path / "status").read_text() == "finished\n"
    assert not [file for file in files_under(tmp_path) if b"hf_notforanyfile" in file.read_bytes()]


def test_a_dry_run_here_prints_the_command_lines_and_leaves_nothing(models: Path, tmp_path: Path) -> None:
    words = [word for word in words_of(models, tmp_path / "run", "data.answer_key=it's $1") if word != "--submit"]
    shown = launch(*words, "--convert-from", models / "student", "--export", tmp_path / "out")
    assert shown.returncode == 0, shown.stderr
    train = shlex.split(shown.stdout.split("# train\n")[1].splitlines()[0])
    assert train[:6] == ["cd", str(ROOT), "&&", sys.executable, "-m", "recipes.run"]
    assert "data.answer_key=it's $1" in train
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_chain_on_this_machine_ends_with_the_exported_student(models: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    launched = launch(*words_of(models, run), "--convert-from", models / "student", "--export", out)
    assert launched.returncode == 0, launched.stderr
    trained, exported = (load_file(folder / "model.safetensors") for folder in (run / "hf", out))
    assert all((trained[name] == exported[name]).all() for name in trained)


@pytest.mark.slow
def test_a_step_that_fails_ends_with_its_exit_code_and_its_reason_last(models: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("no config")
    launched = launch(*words_of(models, tmp_path, f"student.hf={models / 'student'}"))
    assert launched.returncode == 2
    assert launched.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/config.json is not JSON")
    # nemo-run's own command reads what is left.
    (experiment,) = (tmp_path / "nemo" / "experiments" / "quickstart").iterdir()
    command = [LAUNCH_PYTHON.with_name("nemo"), "experiment", "status", experiment.name]
    status = subprocess.run(command, env=launch_environment(NEMORUN_HOME=str(tmp_path / "nemo")), capture_output=True, text=True, timeout=60)
    assert "Status: FAILED" in status.stdout


def test_the_first_step_that_fails_of_a_chain_gives_the_exit_code(models: Path, tmp_path: Path) -> None:
    """nemo-run starts the next one as well; what it reads is not there."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase $1 in tools/convert_hf*) echo "error: no room" >&2; exit 3 ;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    launched = launch(*words_of(models, tmp_path / "run"), "--convert-from", models / "student", OPD_PYTHON=str(python))
    assert launched.returncode == 3
    assert launched.stderr.splitlines()[-2:] == ["step 'convert' ended with exit code 3", "error: no room"]
    assert f"student.checkpoint='{tmp_path / 'run' / 'start'}' is not a Megatron checkpoint" in launched.stdout
    assert not (tmp_path / "run" / "status").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_saves_and_ends_with_75(models: Path, tmp_path: Path, number: signal.Signals) -> None:
    words = words_of(models, tmp_path, f"student.hf={models / 'student'}", "training.steps=2000")
    with subprocess.Popen(
        [LAUNCH_PYTHON, "-m", "opd_megatron.launch", *words], cwd=ROOT, env=launch_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 120
        while not metrics_of(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.2)
        os.kill(running.pid, number)
        _, told = running.communicate(timeout=60)
    assert running.returncode == 75, told
    assert (tmp_path / "status").read_text() == "interrupted\n"
    assert list((tmp_path / "checkpoints").glob("step_*"))
