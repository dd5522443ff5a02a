"""`tools/bench_loss.py` as a user calls it. Not covered here: its numbers, and the libraries it compares with, which the tests do not install."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments):
    return subprocess.run([sys.executable, "tools/bench_loss.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_quick_ends_with_one_json_object_that_holds_every_row():
    run = bench("--quick", "--json")
    assert run.returncode == 0, run.stderr
    *table, last = run.stdout.splitlines()
    report = json.loads(last)
    assert [(row["function"], row["tensor"]) for row in report["rows"]] == [("fused", 1), ("torch", 1), ("fused", 2), ("torch", 2)]
    assert len(table) == 1 + len(report["rows"])
    for row in report["rows"]:
        assert row["ms"] > 0
        assert row["gradient_error"] < 1e-5  # fp32 against fp64
    assert report["environment"]["versions"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens=0 must be at least 1\n"),
        (["--vocab", "33"], "--vocab=33 must be a positive multiple of --tensor=2\n"),
        (["--quick", "--vocab", "0"], "--vocab=0 must be a positive multiple of --tensor=1\n"),
    ],
)
def test_a_size_that_cannot_be_is_the_users_mistake(arguments, message):
    run = bench(*arguments)
    assert (run.returncode, run.stderr) == (2, message)
