"""Runs that resume bit for bit, in their own layout or another, with what waits on the host.

Runs that are killed, and damaged checkpoints, are in test_faults.py. Not covered: GPUs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from opd_megatron.config import CheckpointConfig, ParallelLayout, RunConfig
from opd_megatron.models.origin import read_origin
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.training.optimizer import optimizer_state
from opd_megatron.training.trainer import Trainer
from tests.pool import RankPool
from tests.runs import LAYOUTS, metrics_of, run_job, run_until_step, small_config, weights_of

ASSETS = Path(__file__).parents[2] / "recipes" / "assets"


@pytest.mark.parametrize("name", ["TP2xPP2", pytest.param("TP2", marks=pytest.mark.slow), pytest.param("DP2", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(models: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    student, _, world_size = LAYOUTS[name]
    config = dataclasses.replace(small_config(models, **student), checkpoint=CheckpointConfig(every_steps=2))
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=5))
    pool.run(run_job, longer, tmp_path / "whole", world_size=world_size)
    pool.run(run_until_step, longer, tmp_path / "parts", 3, world_size=world_size)
    assert (tmp_path / "parts" / "status").read_text().strip() == "interrupted"
    pool.run(run_job, longer, tmp_path / "parts", world_size=world_size)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert [step["loss"] for step in metrics_of(tmp_path / "whole")] == [step["loss"] for step in metrics_of(tmp_path / "parts")]


def test_a_run_resumes_in_another_layout(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = small_config(models, tensor=2, pipeline=2)
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=4))
    pool.run(run_job, longer, tmp_path / "whole", world_size=4)
    pool.run(run_until_step, longer, tmp_path / "parts", 2, world_size=4)
    for steps, layout in ((3, {"pipeline": 2, "virtual": 2}), (4, {})):
        other = dataclasses.replace(longer, student=dataclasses.replace(longer.student, layout=ParallelLayout(**layout)))
        pool.run(run_until_step, other, tmp_path / "parts", steps, world_size=2)
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    assert [step["step"] for step in parts] == [1, 2, 3, 4]
    for one, two in zip(whole, parts, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    # Each checkpoint says in which layout it was saved.
    origins = [read_origin(tmp_path / run / "checkpoints" / step) for run, step in (("whole", "step_4"), ("parts", "step_3"), ("parts", "step_4"))]
    layouts = [(origin["made_by"], origin["layout"], origin["world_size"]) for origin in origins if origin is not None]
    assert layouts == [("training", "TP2xPP2", 4), ("training", "TP1xPP2xVPP2", 2), ("training", "TP1xPP1", 2)]


def test_a_tied_student_in_stages_resumes_bit_for_bit_whatever_its_sizes(models: Path, pool: RankPool, tmp_path: Path) -> None:
    """The committed student's embedding does not fill its gradient bucket: 262 * 96 is no multiple of 128."""
    config = small_config(models, tensor=2, pipeline=2)
    config = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, hf=str(ASSETS / "tiny_student"), vocab_multiple=1),
        teacher=dataclasses.replace(config.teacher, hf=str(ASSETS / "tiny_teacher")),
    )
    pool.run(run_job, config, tmp_path / "whole", world_size=4)
    pool.run(run_until_step, config, tmp_path / "parts", 2, world_size=4)
    pool.run(run_job, config, tmp_path / "parts", world_size=4)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def _offloaded_bytes(config: RunConfig, run: Path) -> list[tuple[int, int]]:
    """Train; return the bytes that teacher and optimizer hold whenever the student begins to write."""
    held = []
    write = Trainer._write

    def watched(self: Trainer, step: int) -> Rollouts:
        assert self.teacher is not None
        assert self.teacher.scorer is not None
        assert self.teacher.scorer.offloaded is not None
        tensors = [*optimizer_state(self.student.optimizer), *(buffer.grad_data for chunk in self.student.ddp for buffer in chunk.buffers)]
        held.append((self.teacher.scorer.offloaded.device_bytes, sum(tensor.untyped_storage().nbytes() for tensor in tensors)))
        return write(self, step)

    Trainer._write = watched  # type: ignore[method-assign]
    try:
        run_job(config, run)
    finally:
        Trainer._write = write  # type: ignore[method-assign]
    return held


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_what_is_offloaded_is_away_while_the_student_writes_and_changes_nothing(models: Path, pool: RankPool, tmp_path: Path, precision: str) -> None:
    """Bit for bit, across a stop and a resume: values only travel."""
    config = small_config(models, tensor=2)
    training = dataclasses.replace(config.training, precision=precision, steps=3)
    config = dataclasses.replace(config, training=training, checkpoint=CheckpointConfig(every_steps=2))
    pool.run(run_job, config, tmp_path / "resident", world_size=2)
    assert config.teacher is not None
    config = dataclasses.replace(
        config, teacher=dataclasses.replace(config.teacher, placement="offloaded"), training=dataclasses.replace(training, offload_optimizer=True)
    )
    pool.run(run_until_step, config, tmp_path / "offloaded", 2, world_size=2)
    for held in pool.run(_offloaded_bytes, config, tmp_path / "offloaded", world_size=2):
        assert held == [(0, 0)]
    for ours, reference in zip(metrics_of(tmp_path / "offloaded"), metrics_of(tmp_path / "resident"), strict=True):
        assert {key: ours[key] for key in ("loss", "grad_norm")} == {key: reference[key] for key in ("loss", "grad_norm")}
        assert all(ours[f"{phase}_peak_bytes"] > 0 for phase in ("rollout", "teacher", "train"))
    whole, parts = weights_of(tmp_path / "resident"), weights_of(tmp_path / "offloaded")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_old_checkpoints_are_dropped(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = dataclasses.replace(small_config(models), checkpoint=CheckpointConfig(every_steps=1, keep=2))
    pool.run(run_job, config, tmp_path / "run", world_size=1)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_2", "step_3"]


def test_a_replaced_data_file_is_noticed_on_resume(models: Path, pool: RankPool, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text((models / "prompts.jsonl").read_text())
    config = small_config(models)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prompts=str(data)))
    pool.run(run_job, config, tmp_path / "run", world_size=1)
    data.write_text(data.read_text().replace("count a", "count z"))
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=4))
    with pytest.raises(AssertionError, match="is not the data this run began with"):
        pool.run(run_job, longer, tmp_path / "run", world_size=1)
