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


@pytest.mark.slow
def test_a_row_has_its_ratio_to_the_four_products_of_the_same_problem():
    run = bench("--quick", "--json", "--functions", "products", "fused", "--hidden", "64")
    assert run.returncode == 0, run.stderr
    rows = {(row["function"], row["vocab"], row["tensor"]): row for row in json.loads(run.stdout.splitlines()[-1])["rows"]}
    # Two ranks have no yardstick: each would compute half of the products, and they would wait for one another.
    assert set(rows) == {("products", 512, 1), ("fused", 512, 1), ("fused", 512, 2)}
    assert "ratio_to_products" not in rows["fused", 512, 2]
    fused, products = rows["fused", 512, 1], rows["products", 512, 1]
    assert "gradient_error" not in products
    assert fused["ratio_to_products"] == pytest.approx(fused["ms"] / products["ms"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens=0 must be at least 1\n"),
        (["--vocab", "33"], "--vocab=33 must be a positive multiple of --tensor=2\n"),
        (["--device", "cuda"], "--tensor=1 2 with --device=cuda: ranks on one GPU measure nothing; use --tensor 1\n"),
        (["--quick", "--vocab", "0"], "--vocab=0 must be a positive multiple of --tensor=1\n"),
    ],
)
def test_a_size_that_cannot_be_is_the_users_mistake(arguments, message):
    run = bench(*arguments)
    assert (run.returncode, run.stderr) == (2, message)
