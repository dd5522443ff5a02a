"""Checkpoints that are written while training goes on: what is in them, when they appear, and what a stop, a full disk or the end of the run finds of them.

Not covered: copies from a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import CheckpointConfig, RunConfig, TeacherConfig
from opd_megatron.training import background_write
from opd_megatron.training.checkpoint import CheckpointFolder
from opd_megatron.training.trainer import Trainer
from tests.pool import RankPool
from tests.runs import metrics_of, run_job, run_until_step, small_config, weights_of

SECONDS_OF_A_WRITE = 3.0


def config_of(models: Path, *, steps: int, every: int = 1, keep: int = 9, in_background: bool = True, **layout: Any) -> RunConfig:
    config = small_config(models, **layout)
    checkpoint = CheckpointConfig(every_steps=every, keep=keep, in_background=in_background)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps), checkpoint=checkpoint)


def with_slow_disk(function: Any, config: RunConfig, run: Path, *arguments: Any) -> tuple[Any, list[tuple[int, list[str]]]]:
    """Return what a run returned whose disk takes seconds for every file, and the checkpoints that were there at the end of every step."""
    original_write, original_step = background_write._write_file, Trainer.step
    seen = []

    def write(*words: Any, **named: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(SECONDS_OF_A_WRITE)
        original_write(*words, **named)

    def step(self: Trainer, number: int) -> dict[str, float | int]:
        metrics = original_step(self, number)
        seen.append((number, sorted(path.name for path in (run / "checkpoints").glob("step_*"))))
        return metrics

    background_write._write_file, Trainer.step = write, step  # type: ignore[assignment, method-assign]
    try:
        return function(config, run, *arguments), seen
    finally:
        background_write._write_file, Trainer.step = original_write, original_step  # type: ignore[method-assign]


def files_of(run: Path, step: int) -> dict[str, Any]:
    """Return size and hash of what the ranks wrote of a step, and of its progress."""
    files = json.loads((run / "checkpoints" / f"step_{step}" / "checksums.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".distcp") or name == "progress.json"}


@pytest.mark.parametrize("layout", [{"pipeline": 2}, pytest.param({"tensor": 2, "sequence": True}, marks=pytest.mark.slow)], ids=["PP2", "TP2+SP"])
def test_it_holds_the_weights_of_its_step_whatever_was_trained_meanwhile(models: Path, pool: RankPool, tmp_path: Path, layout: dict[str, Any]) -> None:
    """The average of the weights is what a step changes in place, without a buffer between."""
    own = TeacherConfig(weights="ema", ema_decay=0.5, micro_batch=3)
    waited, beside = (dataclasses.replace(config_of(models, steps=4, every=every, in_background=every == 3, **layout), teacher=own) for every in (1, 3))
    pool.run(run_job, waited, tmp_path / "waited", world_size=2)
    results = pool.run(with_slow_disk, run_job, beside, tmp_path / "beside", world_size=2)
    assert [status for status, _ in results] == ["finished", "finished"]
    assert files_of(tmp_path / "beside", 3) == files_of(tmp_path / "waited", 3)
    assert len(files_of(tmp_path / "beside", 3)) > 2
    assert all(torch.equal(weights_of(tmp_path / "waited")[name], weight) for name, weight in weights_of(tmp_path / "beside").items())


@pytest.mark.slow
def test_training_goes_on_while_it_is_written(models: Path, pool: RankPool, tmp_path: Path) -> None:
    ((status, seen), _) = pool.run(with_slow_disk, run_job, config_of(models, steps=12, every=10, pipeline=2), tmp_path / "run", world_size=2)
    assert status == "finished"
    assert (11, ["step_10.partial"]) in seen, "a step was made before the checkpoint was whole"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_10", "step_12"]


@pytest.mark.slow
def test_one_is_written_at_a_time_and_old_ones_go(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = config_of(models, steps=5, every=1, keep=2, pipeline=2)
    ((_, seen), _) = pool.run(with_slow_disk, run_job, config, tmp_path / "run", world_size=2)
    assert all(sum(name.endswith(".partial") for name in names) <= 1 for _, names in seen)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_4", "step_5"]


def test_a_stop_while_it_is_written_leaves_it_whole_and_the_stopped_step_too(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = config_of(models, steps=6, every=2, pipeline=2)
    results = pool.run(with_slow_disk, run_until_step, config, tmp_path / "run", 3, world_size=2)
    assert [status for status, _ in results] == ["interrupted", "interrupted"]
    assert (3, ["step_2.partial"]) in results[0][1], "the signal came while the second step's was written"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_2", "step_3"]
    pool.run(run_job, config, tmp_path / "run", world_size=2)
    pool.run(run_job, config, tmp_path / "whole", world_size=2)
    assert [record["step"] for record in metrics_of(tmp_path / "run")] == list(range(1, 7))
    assert all(torch.equal(weights_of(tmp_path / "whole")[name], weight) for name, weight in weights_of(tmp_path / "run").items())


def _failing_at_step_3(config: RunConfig, run: Path) -> str:
    """Return the error of a run whose disk is full from the third step on."""
    original = CheckpointFolder.save

    def save(self: CheckpointFolder, student: Any, progress: Any, *further: Any, in_background: bool = False) -> None:
        if progress.step == 3:

            def fail(_transforms: Any, number: int, _bucket: Any, results: Any, _tickets: Any, use_fsync: bool) -> None:
                time.sleep(SECONDS_OF_A_WRITE)
                results.put((number, OSError(28, "No space left on device")))

            background_write._write_file = fail
        original(self, student, progress, *further, in_background=in_background)

    CheckpointFolder.save, written = save, background_write._write_file  # type: ignore[method-assign]
    try:
        return run_job(config, run)
    except ValueError as error:
        return str(error)
    finally:
        CheckpointFolder.save, background_write._write_file = original, written  # type: ignore[method-assign]


def test_a_disk_that_fills_up_meanwhile_ends_the_run_and_leaves_the_one_before(models: Path, pool: RankPool, tmp_path: Path) -> None:
    messages = pool.run(_failing_at_step_3, config_of(models, steps=400, every=1, pipeline=2), tmp_path / "run", world_size=2)
    assert all("cannot write checkpoint" in message and "step_3" in message for message in messages), messages
    assert "No space left on device" in messages[0]
    assert "step_2 is untouched" in messages[0]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_1", "step_2"]
