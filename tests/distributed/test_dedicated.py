"""A teacher on ranks of its own: one batch ahead of the student, stopped with a batch under way, evaluated, killed.

That its layouts give the losses of one process is in test_training.py. Not covered: NCCL, and how much time the overlap saves, which two cores cannot show.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import CheckpointConfig, EvaluationConfig, RunConfig
from tests.distributed.test_faults import ROOT, _command, _pid_of_rank, _start, _wait_for_step
from tests.distributed.test_faults import models as faults_models
from tests.pool import RankPool
from tests.runs import metrics_of, run_job, run_until_step, small_config, weights_of, with_teacher

__all__ = ["faults_models"]


def _ahead(config: RunConfig, **rollout: Any) -> RunConfig:
    config = with_teacher(config, own=1)
    assert config.teacher is not None
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, staleness=1), rollout=dataclasses.replace(config.rollout, **rollout))


def _versions(run: Path, step: int) -> set[int]:
    lines = (run / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()
    return {json.loads(line)["policy_version"] for line in lines}


def test_one_batch_ahead_on_given_rollouts_changes_nothing(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    pool.run(run_job, _ahead(small_config(models), replay=str(recorded)), tmp_path / "run", world_size=2)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(recorded), strict=True):
        for key in ("loss", "divergence", "grad_norm"):
            # fp32 sums in another order, as for any other layout.
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])


def test_a_stop_with_a_batch_under_way_ends_both_worlds_and_resumes(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = _ahead(small_config(models), record=True)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=5), checkpoint=CheckpointConfig(every_steps=1))
    assert pool.run(run_until_step, config, tmp_path / "run", 2, world_size=2) == ["interrupted"] * 2
    # The first batch is on-policy; the second was written before the first update.
    assert [_versions(tmp_path / "run", step) for step in (1, 2)] == [{0}, {0}]
    assert pool.run(run_job, config, tmp_path / "run", world_size=2) == ["finished"] * 2
    # The batch that was waiting is in the checkpoint, and goes on waiting.
    assert [step["rollout_staleness"] for step in metrics_of(tmp_path / "run")] == [0, 1, 1, 1, 1]
    pool.run(run_job, config, tmp_path / "whole", world_size=2)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "run")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_batch_written_ahead_is_dropped_where_the_resumed_run_must_be_on_policy(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = _ahead(small_config(models), record=True)
    pool.run(run_until_step, config, tmp_path / "run", 1, world_size=2)
    assert config.teacher is not None
    pool.run(run_job, dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, staleness=0)), tmp_path / "run", world_size=2)
    assert [step["rollout_staleness"] for step in metrics_of(tmp_path / "run")] == [0, 0, 0]
    assert [_versions(tmp_path / "run", step) for step in (1, 2, 3)] == [{0}, {1}, {2}]


def test_a_damaged_batch_that_was_waiting_is_refused(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = _ahead(small_config(models))
    pool.run(run_until_step, config, tmp_path / "run", 1, world_size=2)
    file = tmp_path / "run" / "checkpoints" / "step_1" / "written_ahead.jsonl"
    file.write_text(file.read_text()[:100])
    with pytest.raises(AssertionError, match=r"are damaged \(step_1: written_ahead.jsonl has 100 bytes instead of"):
        pool.run(run_job, config, tmp_path / "run", world_size=2)
    # As an older version wrote it, without checksums.
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step_1.damaged").rename(checkpoints / "step_1")
    (checkpoints / "step_1" / "checksums.json").unlink()
    with pytest.raises(AssertionError, match=r"step_1 is damaged: .*written_ahead.jsonl:1 is not a recorded rollout.*move .*step_1 away"):
        pool.run(run_job, config, tmp_path / "run", world_size=2)


@pytest.mark.parametrize(
    ("response", "message"),
    [([1] * 200, r"a sample of \d+ tokens does not fit into a pack of training.micro_batch_tokens=80"), ([10**6], r"recorded token 1000000 in step 1")],
    ids=["too long", "unknown token"],
)
def test_a_record_that_does_not_fit_is_named_by_the_students_ranks(
    models: Path, recorded: Path, pool: RankPool, tmp_path: Path, response: list[int], message: str
) -> None:
    """The teacher alone would have noticed, and nobody hears what its ranks say."""
    record = shutil.copytree(recorded, tmp_path / "record") / "rollouts" / "step_1.jsonl"
    first, *rest = record.read_text().splitlines()
    changed = {**json.loads(first), "response_ids": response, "sampled_logp": [-1.0] * len(response)}
    record.write_text("\n".join([json.dumps(changed), *rest]) + "\n")
    config = with_teacher(small_config(models), own=1)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch=1, micro_batch_tokens=80))
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, replay=str(tmp_path / "record")))
    with pytest.raises(AssertionError, match=message):
        pool.run(run_job, config, tmp_path / "run", world_size=2)


def test_the_teacher_is_evaluated_on_its_own_ranks_as_elsewhere(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = dataclasses.replace(small_config(models), evaluation=EvaluationConfig(prompts=6))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, holdout_fraction=0.2), training=dataclasses.replace(config.training, steps=1))
    pool.run(run_job, config, tmp_path / "shared", world_size=1)
    pool.run(run_job, with_teacher(config, own=2, tensor=2), tmp_path / "own", world_size=3)
    shared, own = ([json.loads(line) for line in (tmp_path / run / "evals.jsonl").read_text().splitlines()] for run in ("shared", "own"))
    assert [record["who"] for record in own] == ["teacher", "student", "student"]
    for ours, reference in zip(own, shared, strict=True):
        assert ours["examples"] == reference["examples"]


def _dedicated_command(models: Path, run: Path, *overrides: str) -> list[str]:
    layout = ("world_size=3", "student.layout.pipeline=2", "teacher.placement=dedicated", "teacher.num_ranks=1")
    return _command(models, run, *layout, *overrides, ranks=3)


@pytest.mark.parametrize("rank", [pytest.param(1, id="a student's rank", marks=pytest.mark.slow), pytest.param(2, id="the teacher's rank")])
def test_a_killed_rank_ends_both_worlds(faults_models: Path, tmp_path: Path, rank: int) -> None:
    job = _start(_dedicated_command(faults_models, tmp_path / "run", "training.steps=500", "teacher.staleness=1"))
    _wait_for_step(tmp_path / "run", 2)
    os.kill(_pid_of_rank(job, rank), signal.SIGKILL)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGKILL
    assert output.splitlines()[-1] == f"error: rank {rank} was killed by SIGKILL"
    assert (tmp_path / "run" / "status").read_text().strip() == "crashed"


def test_a_mistake_that_only_the_student_sees_is_the_users(faults_models: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"recipe": "another", "config": {}}))
    job = subprocess.run(_dedicated_command(faults_models, tmp_path / "run"), cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert job.returncode == 2, job.stderr[-800:]
    assert "run directory of another recipe" in job.stderr.splitlines()[-1]
