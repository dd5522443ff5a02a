"""A run that is killed and started again fifty times, at random moments: start, steps, saves, the end of a save. Not covered: GPUs, several machines."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.programs import Program, run_program
from tests.runs import metrics_of, weights_of

CYCLES, STEPS, EVERY = 50, 500, 3
# Who gets which signal: a node that is gone, a rank that the system killed, a preemption.
KINDS = {
    "all killed": (signal.SIGKILL, (0, 1)),
    "rank 0 killed": (signal.SIGKILL, (0,)),
    "rank 1 killed": (signal.SIGKILL, (1,)),
    "stopped": (signal.SIGTERM, (1,)),
}


def _wait_for_a_step(program: Program) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (program.stdout.exists() and re.search(r"^step +\d+/", program.stdout.read_text(), re.MULTILINE)):
        time.sleep(0.02)


@pytest.mark.slow
def test_fifty_kills_and_resumes_end_with_the_weights_of_an_uninterrupted_run(models: Path, tmp_path: Path) -> None:
    words = [
        *(f"student.hf={models / 'student'}", f"teacher.hf={models / 'teacher'}", f"data.prompts={models / 'prompts.jsonl'}"),
        *("data.task_options={}", "data.batch_prompts=4", "data.grader=exact", "data.max_prompt_tokens=64", "rollout.max_response_tokens=4"),
        *("training.micro_batch=4", "evaluation.prompts=0", "student.layout.tensor=1", "student.layout.pipeline=2", "teacher.self_test=false"),
        *(f"training.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "checkpoint.keep=2"),
    ]
    run, dice = tmp_path / "killed", random.Random(20251128)
    lost, before, waiting, ends = [], 0, 0, dict.fromkeys(KINDS, 0)
    for cycle in range(CYCLES):
        kind = dice.choice(list(KINDS))
        number, ranks = KINDS[kind]
        program = Program("recipes.run", "quickstart", "--run-dir", run, *words, ranks=2)
        if dice.random() < 0.3:
            time.sleep(dice.uniform(0.0, 3.0))
        else:
            _wait_for_a_step(program)
            time.sleep(dice.uniform(0.0, 1.5))
        for rank in ranks:
            program.send(number, rank)
        waiting += program.end_survivors(after=20)
        done = program.wait(timeout=60)
        ends[kind] += 1
        told = done.stdout + done.stderr
        assert done.returncode != 0, f"cycle {cycle}: the run was over before: {told[-500:]}"
        assert "damaged" not in told, f"cycle {cycle}, {kind}: {told[-2000:]}"
        if found := re.search(r"resumed from \S*step_(\d+)", done.stdout):
            lost.append(before - int(found[1]))
        before = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
    assert before < STEPS
    finished = run_program("recipes.run", "quickstart", "--run-dir", run, *words, ranks=2, timeout=600)
    assert finished.returncode == 0, finished.stderr
    whole = run_program("recipes.run", "quickstart", "--run-dir", tmp_path / "whole", *words, ranks=2, timeout=900)
    assert whole.returncode == 0, whole.stderr
    print(json.dumps({"cycles": CYCLES, "kinds": ends, "step_at_the_last_kill": before, "resumes": len(lost), "most_steps_lost": max(lost), "ended": waiting}))
    # Those since the last save, and those made while the next one was written, after which it appears.
    assert max(lost) <= 2 * EVERY
    assert [record["step"] for record in metrics_of(run)] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in metrics_of(run)] == [record["loss"] for record in metrics_of(tmp_path / "whole")]
    killed, uninterrupted = weights_of(run), weights_of(tmp_path / "whole")
    assert all(torch.equal(uninterrupted[name], killed[name]) for name in uninterrupted)
