"""A launch before anything starts: its command lines, its nodes, and the mistakes that end it with 2.

Not covered here: what nemo-run makes of it (tests/slurm/test_nemo.py, tests/distributed/test_launch.py).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from opd_megatron.launch import __main__ as launch_program
from opd_megatron.launch.nemo import INSTALL
from opd_megatron.launch.plan import Chain, fit_nodes
from opd_megatron.reporting.run_directory import RunDirectory
from tests.programs import ROOT

SLURM = ("--executor", "slurm", "--account", "none", "--partition", "none")
STUDENT = ROOT / "recipes" / "assets" / "tiny_student"


@pytest.mark.parametrize(
    ("world_size", "gpus_per_node", "nodes", "tasks"),
    [(32, 8, 4, 8), (8, 8, 1, 8), (4, 8, 1, 4), (4, 2, 2, 2), (12, 4, 3, 4), (1, 1, 1, 1)],
)
def test_nodes_follow_from_the_ranks(world_size: int, gpus_per_node: int, nodes: int, tasks: int) -> None:
    assert fit_nodes(world_size, gpus_per_node) == (nodes, tasks)
    assert fit_nodes(world_size, gpus_per_node, nodes) == (nodes, tasks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((32, 8, 2), "--nodes 2 contradicts the recipe: world_size=32 is 4 nodes of 8 ranks; leave --nodes out, or set world_size=16"),
        ((4, 8, 2), "--nodes 2 contradicts the recipe: world_size=4 is 1 node of 4 ranks; leave --nodes out, or set world_size=16"),
        ((12, 8, None), "world_size=12 does not fill nodes of 8 GPUs; use --gpus-per-node 6, or another world_size="),
        ((8, 0, None), "--gpus-per-node 0 must be at least 1"),
    ],
)
def test_nodes_that_contradict_are_refused(arguments: tuple[int, int, int | None], message: str) -> None:
    with pytest.raises(ValueError) as error:
        fit_nodes(*arguments)
    assert str(error.value) == message


def test_a_chain_is_three_commands_of_which_each_reads_what_the_one_before_wrote(tmp_path: Path) -> None:
    chain = Chain(recipe="quickstart", overrides=("training.steps=7", "world_size=8"), run_dir=tmp_path, convert_from=STUDENT, export=tmp_path / "out")
    config = chain.check()
    assert (config["world_size"], config["training"]["steps"]) == (8, 7)
    convert, train, export = chain.steps(config, 2, 4, 4)
    start = str(tmp_path / "start")
    assert convert.arguments == ("tools/convert_hf_to_megatron.py", "--hf", str(STUDENT), "--out", start)
    assert train.arguments[:5] == ("-m", "recipes.run", "quickstart", "--run-dir", str(tmp_path))
    assert train.arguments[5:] == ("training.steps=7", "world_size=8", "student.hf=null", f"student.checkpoint={start}")
    assert export.arguments == ("tools/convert_megatron_to_hf.py", "--checkpoint", str(tmp_path / "checkpoints" / "step_7"), "--out", str(tmp_path / "out"))
    assert [(step.nodes, step.tasks_per_node, step.gpus_per_node) for step in (convert, train, export)] == [(1, 1, 0), (2, 4, 4), (1, 1, 0)]


def test_a_run_alone_is_the_command_that_a_user_types(tmp_path: Path) -> None:
    chain = Chain(recipe="quickstart", overrides=("training.steps=7",), run_dir=tmp_path)
    (train,) = chain.steps(chain.check(), 1, 4, 0, launcher=("--nproc-per-node", "4"))
    assert train.arguments == ("-m", "recipes.run", "quickstart", "--nproc-per-node", "4", "--run-dir", str(tmp_path), "training.steps=7")


MISTAKES = {
    "no account": (("--executor", "slurm", "--partition", "p"), "--account is missing; --account none where the site has no accounts"),
    "no partition": (("--executor", "slurm", "--account", "a"), "--partition is missing; --partition none where"),
    "unknown recipe": ((*SLURM, "RECIPE=quickstarr"), "unknown recipe 'quickstarr'; did you mean quickstart"),
    "unknown key": ((*SLURM, "training.stepz=3"), "unknown key 'training.stepz'; did you mean training.steps?"),
    "bad value": ((*SLURM, "training.steps=0"), "training.steps=0 must be at least 1"),
    "layout": ((*SLURM, "world_size=6"), "world_size=6 is not a multiple of"),
    "nodes": ((*SLURM, "--nodes", "2"), "--nodes 2 contradicts the recipe: world_size=4 is 1 node of 4 ranks"),
    "several nodes here": (("--executor", "local", "--gpus-per-node", "2"), "world_size=4 is 2 nodes of 2 GPUs, and --executor local has one"),
    "unwritable": ((*SLURM, "--run-dir", "/proc/nowhere/run"), "/proc/nowhere/run cannot be written"),
    "two students": ((*SLURM, "--convert-from", str(STUDENT), "student.hf=x"), "--convert-from names the student, and so does student.hf=x"),
    "no student": ((*SLURM, "--convert-from", "/nowhere"), "/nowhere"),
    "export exists": ((*SLURM, "--export", str(STUDENT)), "exists; choose another folder"),
    "export into nothing": ((*SLURM, "--export", "/nowhere/hf"), "there is no folder /nowhere; make it first"),
    "own option": ((*SLURM, "--slurm", "nodes=3"), "--slurm nodes=3: a launch sets it itself"),
    "what nemo-run rewrites": ((*SLURM, "data.answer_key=/data/nemo_runs"), "'data.answer_key=/data/nemo_runs': nemo-run takes /nemo_run for its own folder"),
    "no GPUs": ((*SLURM, "--gpus-per-node", "0"), "--gpus-per-node 0 must be at least 1"),
    "empty time": ((*SLURM, "--time", ""), "--time '' is no value that Slurm has"),
    "empty option": ((*SLURM, "--slurm", ""), "--slurm '' is not OPTION or OPTION=VALUE"),
    "option of two lines": ((*SLURM, "--slurm", "mem=0\ntouch x"), "is not OPTION or OPTION=VALUE"),
    "data missing": ((*SLURM, "data.prompts=/nowhere"), "data.prompts='/nowhere' does not exist"),
    "two dependencies": ((*SLURM, "--convert-from", str(STUDENT), "--slurm", "dependency=afterok:1"), "training waits for the conversion"),
}


def run_launch(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["launch", *words])
    return launch_program.main()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_2_its_reason_last_and_no_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = MISTAKES[name]
    recipe = next((word.removeprefix("RECIPE=") for word in words if word.startswith("RECIPE=")), "quickstart")
    words = tuple(word for word in words if not word.startswith("RECIPE="))
    monkeypatch.delenv("OPD_IMAGE", raising=False)
    monkeypatch.delenv("NEMORUN_HOME", raising=False)
    assert run_launch(monkeypatch, recipe, "--run-dir", str(tmp_path / "run"), *words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not list(tmp_path.iterdir())


def test_a_run_directory_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"recipe": "quickstart_sft", "config": {}}')
    assert run_launch(monkeypatch, "quickstart", "--run-dir", str(tmp_path), *SLURM) == 2
    assert "run directory of another recipe" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("option", ["--run-dir", "--export", "--convert-from"])
def test_an_empty_folder_name_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run_launch(monkeypatch, "quickstart", "--run-dir", "x", *SLURM, option, "")
    assert ended.value.code == 2
    assert f"{option}: the path is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("executor", "image", "message"),
    [
        (SLURM, "/nowhere/opd.sqsh", "OPD_IMAGE=/nowhere/opd.sqsh does not exist"),
        (("--executor", "local"), "nvcr.io#nvidia/pytorch", "OPD_IMAGE=nvcr.io#nvidia/pytorch is for --executor slurm"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused(
    executor: tuple[str, ...], image: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPD_IMAGE", image)
    assert run_launch(monkeypatch, "quickstart", "--run-dir", str(tmp_path / "run"), *executor) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_nemo_run_that_it_would_not_quote_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NEMORUN_HOME", raising=False)
    assert run_launch(monkeypatch, "quickstart", "--run-dir", str(tmp_path / "first run"), *SLURM) == 2
    assert "set NEMORUN_HOME to a shared folder of plain letters" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_nemo_run_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NEMORUN_HOME", "/proc/nowhere")
    assert run_launch(monkeypatch, "quickstart", "--run-dir", str(tmp_path / "run"), *SLURM) == 2
    assert "/proc/nowhere cannot be written: No such file or directory; choose another NEMORUN_HOME" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_in_which_a_job_is_at_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    directory = RunDirectory.open(tmp_path, recipe="quickstart", config={}, may_change=())
    assert run_launch(monkeypatch, "quickstart", "--run-dir", str(tmp_path), *SLURM) == 2
    assert capsys.readouterr().err == f"error: another job is running in {tmp_path}; wait for it, stop it, or use another --run-dir\n"
    directory.unlock()
    assert not RunDirectory(tmp_path).is_in_use()


def test_a_checkpoint_that_is_there_is_not_converted_again(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    with pytest.raises(ValueError, match=f"student.hf=null student.checkpoint={tmp_path}/start in the place of --convert-from"):
        Chain(recipe="quickstart", overrides=(), run_dir=tmp_path, convert_from=STUDENT).check()


@pytest.mark.skipif(importlib.util.find_spec("nemo_run") is not None, reason="nemo-run is installed here")
def test_without_nemo_run_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OPD_IMAGE", raising=False)
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "home"))
    assert run_launch(monkeypatch, "quickstart", "--run-dir", str(tmp_path / "run"), *SLURM) == 2
    assert "pip install 'nemo-run==0.11.1' 'leptonai>=0.26.6,<0.28'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_shell_within_a_job_counts_as_a_login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "3", "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert Chain(recipe="quickstart", overrides=(), run_dir=tmp_path).check()["world_size"] == 4
    assert os.environ["WORLD_SIZE"] == "3"


def test_the_extra_and_the_message_name_the_same_versions() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for package in ("nemo-run==0.11.1", "leptonai>=0.26.6,<0.28"):
        assert f'"{package}"' in text
        assert f"'{package}'" in INSTALL
