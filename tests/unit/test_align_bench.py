"""`tools/bench_align.py` as a user calls it. Not covered here: whether it reaches its bar, which depends on what else the machine does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/bench_align.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_it_measures_both_forms_on_both_texts() -> None:
    run = bench("--repeats", "1", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    short, long = report["results"]
    assert long["characters"] == 10 * short["characters"]
    for result in (short, long):
        assert min(result["units_tokens_per_second"], result["arrays_tokens_per_second"]) > 0
        # Neither vocabulary cuts within the other's tokens only: some units are wider than a token on both sides.
        assert 0 < result["units"] < min(result["student_tokens"], result["teacher_tokens"])
    assert report["environment"]["versions"]["numpy"]


def test_no_repeats_is_the_users_mistake() -> None:
    run = bench("--repeats", "0")
    assert (run.returncode, run.stderr) == (2, "error: --repeats 0 must be at least 1\n")
