"""`tools/bench_selection.py` as a user calls it: both forms keep the same tokens, with the gradients of fp64. Not covered: its figures, made at full size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments):
    return subprocess.run([sys.executable, "tools/bench_selection.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_quick_compares_both_forms_at_both_levels():
    run = bench("--quick", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    cases = [(row["level"], row["form"], row["ratio"]) for row in report["rows"]]
    assert cases == [(level, form, ratio) for level in ("head", "step") for form in ("fused", "unfused") for ratio in (1, 0.5, 0.1)]
    for row in report["rows"]:
        assert row["tokens_differ"] == 0
        assert row["gradient_error"] < 1e-5  # fp32 against fp64
        assert row["train_cpu_seconds"] > 0
        # Only the fused form weighs before it trains, and only where a rule chooses.
        assert (row["weigh_cpu_seconds"] > 0) == (row["form"] == "fused" and row["ratio"] < 1)
        assert row["peak_mib"] > 0
    assert report["environment"]["versions"]["torch"]
    assert "the paper: up to 47%" in run.stdout
    assert "the paper: up to 58%" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0"], "--layers=0 must be at least 1\n"),
        (["--tokens", "100", "--response", "30"], "--tokens=100 must be a multiple of --response=30\n"),
        (["--vocab", "1"], "--vocab=1 must be at least 2\n"),
        (["--ratios", "0.001"], "--ratios=0.001 must be in (0, 1] and keep at least one token of --response=512\n"),
        (["--ratios", "nan"], "--ratios=nan must be in (0, 1] and keep at least one token of --response=512\n"),
    ],
)
def test_a_size_that_cannot_be_is_the_users_mistake(arguments, message):
    run = bench(*arguments)
    assert (run.returncode, run.stderr) == (2, message)
