"""`tools/bench_rollout.py` as a user calls it. Not covered here: the dynamic engine, which needs a GPU, and how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.programs import ROOT


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/bench_rollout.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_static_engine_writes_greedily_what_transformers_writes() -> None:
    sizes = [
        "--sequences",
        "5",
        "--batch-sequences",
        "3",
        "--prompt-tokens",
        "9",
        "--response-tokens",
        "12",
        "--hidden",
        "128",
        "--layers",
        "1",
        "--vocab",
        "512",
    ]
    run = bench(*sizes, "--rounds", "1", "--ends", "0.1", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert set(report["rows"]) == {"static", "transformers"}
    for row in report["rows"].values():
        assert 5 <= row["tokens"] <= 60
        # fp32, and logits of random weights that are no ties: the same texts.
        assert row["equal_positions"] == 1
        assert row["tokens_per_second"] > 0
    assert report["rows"]["transformers"]["ratio_to_transformers"] == 1
    assert "flash-attention computes in half precision only" in report["missing"]["dynamic"]


def test_sizes_that_no_model_has_are_the_users_mistake() -> None:
    run = bench("--hidden", "100")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: --hidden 100 must be a multiple of 128: heads have 64 dimensions, and two share their keys and values\n"
