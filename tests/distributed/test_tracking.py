"""A real job, stopped and continued, is one run of Weights & Biases and one of MLflow with the numbers of its metrics.jsonl.

How each tracker is served, and what its failures do, is in tests/unit/test_trackers.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from opd_megatron.config import EvaluationConfig, TrackingConfig
from opd_megatron.reporting import RunDirectory
from tests.pool import RankPool
from tests.runs import metrics_of, run_job, run_until_step, small_config
from tests.unit.test_trackers import mlflow_client, mlflow_points, wandb_files, wandb_points
from tests.wandb_file import records


def test_a_stopped_and_continued_job_is_one_run_of_each_tracker(models: Path, pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = dataclasses.replace(
        small_config(models, tensor=2),
        evaluation=EvaluationConfig(prompts=4, every_steps=1),
        data=dataclasses.replace(small_config(models).data, holdout_fraction=0.3),
        tracking=TrackingConfig(wandb_project="opd", wandb_mode="offline", mlflow_experiment="opd"),
    )
    run = RunDirectory(tmp_path / "named")
    pool.run(run_until_step, config, run.path, 2, world_size=2)
    client, run_id = mlflow_client(run)
    assert client.get_run(run_id).info.status == "KILLED"
    pool.run(run_job, config, run.path, world_size=2)
    found = client.get_run(run_id)
    assert (found.info.status, found.info.run_name, found.data.params["seed"]) == ("FINISHED", "named", "1234")
    steps = metrics_of(run.path)
    assert [step["step"] for step in steps] == [1, 2, 3]
    # A phase that took no time has no slowest rank: some steps have numbers that others have not.
    for key in set().union(*steps) - {"step"}:
        recorded = [(step["step"], step[key]) for step in steps if step.get(key) is not None]
        assert mlflow_points(run, f"train/{key}") == recorded, key
        assert wandb_points(run, f"train/{key}") == recorded, key
    assert [step for step, _ in mlflow_points(run, "evaluation/student_accuracy")] == [0, 1, 2, 3]
    assert [step for step, _ in wandb_points(run, "evaluation/student_accuracy")] == [0, 1, 2, 3]
    stopped, finished = wandb_files(run)
    assert stopped.stem == finished.stem
    assert [record.exit.exit_code for file in (stopped, finished) for record in records(file) if record.HasField("exit")] == [75, 0]
