"""How a step is cut into micro-batches, and what is computed anew, changes no loss and no gradient.

Not covered: GPUs, bf16, more than 4 ranks.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config import ParallelLayout
from tests.pool import RankPool
from tests.runs import metrics_of, run_job, small_config, with_teacher

PACKED = {
    "one rank": ({}, {}, 1),
    "DP4": ({}, {}, 4),
    "TP2+SP": ({"tensor": 2, "sequence": True}, {}, 2),
    "PP2": ({"pipeline": 2}, {"tensor": 2}, 2),
    "PP2xVPP2": ({"pipeline": 2, "virtual": 2}, {}, 2),
    "CP2": ({"context": 2}, {}, 2),
    "CP2xTP2+SP, teacher CP2": ({"context": 2, "tensor": 2, "sequence": True}, {"context": 2}, 4),
    "DP2, TP2 of the teacher's own": ({}, {"tensor": 2, "own": 2}, 4),
}


QUICK_PACKED = ("one rank", "DP4", "PP2xVPP2", "CP2xTP2+SP, teacher CP2")


@pytest.mark.parametrize("name", [name if name in QUICK_PACKED else pytest.param(name, marks=pytest.mark.slow) for name in PACKED])
def test_packed_sequences_train_as_padded_ones_do(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    """No sequence sees another in its pack: losses and gradients are those of one sequence a row. 8 samples of 8 to 31 tokens."""
    student, teacher, world_size = PACKED[name]
    config = with_teacher(small_config(models, **student), **teacher)
    training = dataclasses.replace(config.training, micro_batch=1, micro_batch_tokens=80)
    config = dataclasses.replace(config, training=training, rollout=dataclasses.replace(config.rollout, replay=str(recorded)))
    pool.run(run_job, config, tmp_path / "run", world_size=world_size)
    for ours, reference in zip(metrics_of(tmp_path / "run"), metrics_of(recorded), strict=True):
        for key in ("loss", "divergence", "grad_norm", "student_entropy"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])
        if name == "one rank":
            assert 0 <= ours["padding_share"] < reference["padding_share"]


@pytest.mark.parametrize("training", [{"micro_batch": 2}, {"micro_batch_tokens": 80}], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("student", "count"),
    [({}, 3), ({"pipeline": 2, "virtual": 2}, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in (({}, 7), ({"pipeline": 2}, 5)))],
    ids=str,
)
def test_a_batch_that_does_not_divide_leaves_some_replicas_less_to_do(
    models: Path, pool: RankPool, tmp_path: Path, student: dict[str, Any], count: int, training: dict[str, Any]
) -> None:
    """Four replicas share 3 samples: one has none, and joins in everything."""
    config = small_config(models)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_prompts=count))
    pool.run(run_job, dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, record=True)), tmp_path / "one", world_size=1)
    config = dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, layout=ParallelLayout(**student)),
        rollout=dataclasses.replace(config.rollout, replay=str(tmp_path / "one")),
        training=dataclasses.replace(config.training, **{"micro_batch": 1, **training}),
    )
    pool.run(run_job, config, tmp_path / "four", world_size=4)
    for ours, reference in zip(metrics_of(tmp_path / "four"), metrics_of(tmp_path / "one"), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), (key, ours["step"])


def test_recomputed_layers_give_the_same_gradients(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    config = small_config(models, tensor=2, pipeline=2, sequence=True)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, replay=str(recorded)))
    for recompute in ("none", "full"):
        training = dataclasses.replace(config.training, recompute=recompute)
        pool.run(run_job, dataclasses.replace(config, training=training), tmp_path / recompute, world_size=4)
    assert [step["grad_norm"] for step in metrics_of(tmp_path / "full")] == [step["grad_norm"] for step in metrics_of(tmp_path / "none")]
