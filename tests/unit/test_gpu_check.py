"""`tools/gpu_check.py` without a GPU: what it refuses, how a step fails, and what the report says; and that the README and the results agree.

Not covered: the steps on a GPU. Their tests run on the CPU by OPD_GPU_TESTS_DEVICE=cpu (tests/gpu/conftest.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd_megatron import driver
from tests.programs import ROOT
from tools import gpu_check
from tools.gpu_check import Figure, Outcome, Step, has_passed, read_tests, run_step, write_report

FACTS = {
    "gpus": [{"name": "NVIDIA H100 80GB HBM3", "gib": 79.1, "capability": "9.0"}],
    "gpu_memory_gib": 79.1,
    "driver": "580.65.06",
    "torch": "torch 2.13.0",
    "cuda": "13.0",
    "nccl": "2.28.9",
    "host_gib": 100.0,
    "python": "3.12.3",
    "cpu": "a CPU",
    "cores": 8,
    "threads": None,
    "versions": {"torch": "2.13.0", "apex": None},
}


def check(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("OPD_DEVICE", "CUDA_VISIBLE_DEVICES")} | variables
    return subprocess.run([sys.executable, "tools/gpu_check.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def python(code: str, **changes: object) -> Step:
    return Step(name="made up", what="a program", command=(sys.executable, "-c", code), **changes)  # type: ignore[arg-type]


def test_without_a_gpu_it_ends_with_the_build_and_the_driver() -> None:
    machine = driver.find_machine()
    if machine.num_gpus:
        pytest.skip("needs a machine without a GPU")
    done = check()
    assert done.returncode == 2
    assert done.stderr.startswith("error: no GPU here to check: "), done.stderr
    assert ("no NVIDIA driver is loaded" if machine.driver is None else f"NVIDIA driver {machine.driver} is loaded") in done.stderr
    assert str(driver.find_torch()) in done.stderr
    assert not gpu_check.RESULTS.exists()


def test_hidden_gpus_are_not_checked_on_the_cpu_in_silence() -> None:
    for variables in ({"OPD_DEVICE": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}):
        done = check(**variables)
        assert (done.returncode, done.stderr) == (2, "error: OPD_DEVICE or CUDA_VISIBLE_DEVICES hides the GPUs that are to be checked; unset them\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--device", "cpu"), "--device cpu needs another --out DIR: recipes/results is for what GPUs did"),
        (("--device", "cpu", "--out", "recipes/results"), "--device cpu needs another --out DIR: recipes/results is for what GPUs did"),
        (("--budget-seconds", "0"), "--budget-seconds 0.0 must be positive and finite"),
        (("--budget-seconds", "nan"), "--budget-seconds nan must be positive and finite"),
        (("--budget-seconds", "inf"), "--budget-seconds inf must be positive and finite"),
        (("--device", "cpu", "--out", "OUT", "--only", "los"), "--only los: there are tests, quickstart, loss, step-local, step-te, step-large, rollout"),
    ],
)
def test_what_cannot_be_checked_is_the_users_mistake(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = check(*(str(tmp_path / "out") if word == "OUT" else word for word in words))
    assert (done.returncode, done.stderr) == (2, f"error: {says}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("below", "reason"), [("", "File exists"), ("deeper", "Not a directory")])
def test_a_folder_that_cannot_be_had_is_told_before_a_step_runs(tmp_path: Path, below: str, reason: str) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / below
    done = check("--device", "cpu", "--out", str(out), "--only", "loss")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no report can be written into {out}: {reason}; name another folder by --out DIR\n"


def test_a_check_on_the_cpu_leaves_a_report_that_says_so(tmp_path: Path) -> None:
    done = check("--device", "cpu", "--out", str(tmp_path), "--only", "loss")
    assert done.returncode == 0, done.stdout + done.stderr
    text, record = (tmp_path / "gpu_check_cpu_partial.md").read_text(), json.loads((tmp_path / "gpu_check_cpu_partial.json").read_text())
    assert "**CPU in the GPU's place**" in text
    assert (record["is_gpu"], record["passed"]) == (False, True)
    assert [step["status"] for step in record["steps"]] == ["skipped"] * 2 + ["passed"] + ["skipped"] * 4
    (loss,) = (step for step in record["steps"] if step["name"] == "loss")
    assert [figure["bar"] for figure in loss["figures"] if "gradients" in figure["name"]] == [1e-5, 1e-5]
    assert "left out by --only" in text
    assert text.splitlines()[0].endswith("(partial: without tests, quickstart, step-local, step-te, step-large, rollout)")
    assert not (tmp_path / "gpu_check_cpu.md").exists(), "a partial report replaces no whole one"


def test_a_step_that_fails_says_how_and_what_it_printed() -> None:
    failed = run_step(python("print('the cause'); raise SystemExit(3)"), "cpu", 100)
    assert (failed.status, failed.reason) == ("failed", "exit code 3")
    assert "the cause" in failed.tail
    assert run_step(python("print(1)"), "cpu", 100).status == "passed"
    assert run_step(python("print(1)", skip="a reason"), "cpu", 100) == Outcome(
        name="made up", what="a program", command="python -c 'print(1)'", status="skipped", reason="a reason"
    )


def test_a_step_is_ended_at_its_limit_with_what_it_started(tmp_path: Path) -> None:
    code = (
        f"import subprocess, sys, time; child = subprocess.Popen(['sleep', '600']); open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    started = time.monotonic()
    late = run_step(python(code, limit_seconds=3), "cpu", 100)
    assert (late.status, late.reason) == ("failed", "took longer than 3 s")
    assert time.monotonic() - started < 60
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/cmdline")
    # A killed process lives until it is next given a core; then there is none, or one without words, which waits to be noticed by whoever took it over.
    while (child.read_bytes() if child.exists() else b"") != b"":
        assert time.monotonic() - started < 60
        time.sleep(0.1)
    assert run_step(python("print(1)"), "cpu", 0.5).reason == "no time was left for it"


@pytest.mark.parametrize(("value", "bar", "status"), [(2e-5, 1e-5, "failed"), (float("nan"), 1e-5, "failed"), (1e-5, 1e-5, "passed"), (7.0, None, "passed")])
def test_a_figure_above_its_bar_fails_its_step(value: float, bar: float | None, status: str) -> None:
    outcome = run_step(python("print(1)", read=lambda _stdout: ([Figure(name="error", value=value, bar=bar)], None)), "cpu", 100)
    assert outcome.status == status
    assert ("above the bar: error" in outcome.reason) == (status == "failed")


def test_a_step_that_leaves_nothing_to_read_fails() -> None:
    outcome = run_step(python("print('no JSON')", read=lambda stdout: ([], json.loads(stdout))), "cpu", 100)
    assert (outcome.status, outcome.reason[:21]) == ("failed", "left nothing to read:")


def test_figures_and_reasons_are_read_from_the_tests(tmp_path: Path) -> None:
    file = tmp_path / "tests.xml"
    figure = json.dumps({"name": "error", "value": 2e-6, "bar": 1e-5}).replace('"', "&quot;")
    file.write_text(
        f"""<testsuites><testsuite>
        <testcase classname="tests.gpu.test_a" name="test_x"><properties><property name="figure" value="{figure}"/></properties></testcase>
        <testcase classname="tests.gpu.test_a" name="test_y"><skipped message="needs two GPUs"/></testcase>
        <testcase classname="tests.gpu.test_a" name="test_z"><failure message="wrong">where</failure></testcase>
        </testsuite></testsuites>"""
    )
    figures, counts = read_tests(file)
    assert figures == [Figure(name="error", value=2e-6, bar=1e-5)]
    assert counts == {"passed": 1, "failed": ["test_a::test_z"], "skipped": ["test_a::test_y: needs two GPUs"]}
    file.write_text('<testsuites><testsuite><testcase name="test_y"><skipped message="no GPU"/></testcase></testsuite></testsuites>')
    with pytest.raises(ValueError, match="no test ran"):
        read_tests(file)


def test_the_report_holds_every_figure_and_every_reason(tmp_path: Path) -> None:
    shared = {"what": "something", "command": "python x"}
    outcomes = [
        Outcome(name="tests", status="failed", reason="exit code 1", figures=[Figure(name="error", value=2e-5, bar=1e-5)], tail="last words", **shared),
        Outcome(name="loss", status="passed", figures=[Figure(name="ratio", value=1.5, target=1.25)], record={"skipped": ["test_b: needs TE"]}, **shared),
        Outcome(name="rollout", status="skipped", reason="not there", **shared),
    ]
    markdown, as_json = write_report(tmp_path, FACTS, outcomes, seconds=12.0, device="cuda")
    assert (markdown.name, as_json.name) == ("gpu_check_nvidia_h100_80gb_hbm3.md", "gpu_check_nvidia_h100_80gb_hbm3.json")
    text = markdown.read_text()
    for line in (
        "| GPUs | NVIDIA H100 80GB HBM3 (79 GiB, 9.0) |",
        "| driver, CUDA, NCCL | 580.65.06, 13.0, 2.28.9 |",
        "| error | 2.00e-05 | 1e-05 | **above** |",
        "| ratio | 1.5 | at most 1.25 |",
        "- rollout: not there",
        "- test_b: needs TE",
        "**Failed** in 12 s",
        "last words",
    ):
        assert line in text, line
    assert "CPU in the GPU's place" not in text
    assert json.loads(as_json.read_text())["passed"] is False


def test_a_check_in_which_nothing_ran_has_not_passed(tmp_path: Path) -> None:
    outcomes = [Outcome(name=name, status="skipped", reason="not there", what="something", command="python x") for name in ("tests", "loss")]
    assert not has_passed(outcomes)
    markdown, as_json = write_report(tmp_path, FACTS, outcomes, seconds=1.0, device="cuda")
    assert "**Nothing ran** in 1 s" in markdown.read_text()
    assert "Passed" not in markdown.read_text()
    assert json.loads(as_json.read_text())["passed"] is False


@pytest.mark.parametrize(
    ("precision", "equal", "status"), [("fp32", 0.99, "passed"), ("fp32", 0.989, "failed"), ("fp32", float("nan"), "failed"), ("bf16", 0.5, "passed")]
)
def test_rates_of_rollouts_and_engines_that_are_missing_stand_in_the_report(tmp_path: Path, precision: str, equal: float, status: str) -> None:
    rows = {
        "transformers": {"tokens": 9, "tokens_per_second": 50.0, "ratio_to_transformers": 1.0, "equal_positions": 1.0},
        "static": {"tokens": 9, "tokens_per_second": 150.0, "ratio_to_transformers": 3.0, "equal_positions": equal},
    }
    printed = json.dumps({"rows": rows, "precision": precision, "missing": {"dynamic": "needs a GPU"}})
    outcome = run_step(python(f"print({printed!r})", read=gpu_check.read_rollouts), "cpu", 100)
    assert outcome.status == status, outcome.reason
    text = write_report(tmp_path, FACTS, [outcome], seconds=1.0, device="cuda")[0].read_text()
    for line in (
        "| rollout transformers, tokens per second | 50 |  |",
        "| rollout static, tokens per second | 150 |  |",
        "| rollout static, ratio to transformers | 3 |  |",
        "- rollout dynamic: needs a GPU",
    ):
        assert line in text, line


def test_the_readme_says_that_no_gpu_has_run_this_exactly_as_long_as_there_is_no_result() -> None:
    files = sorted(gpu_check.RESULTS.glob("gpu_check_*.json"))
    reports = [json.loads(file.read_text()) for file in files if not file.stem.endswith("_partial")]
    assert all(report["is_gpu"] for report in reports), "results are of GPUs"
    for readme in (ROOT / "README.md", ROOT / "tools" / "README.md"):
        assert ("not yet run on a GPU" in readme.read_text()) == (not reports), readme
