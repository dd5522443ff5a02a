"""What is computed again in the backward, and when gradients travel, changes no bit of losses, gradients and weights.

Not covered: GPUs, what needs Transformer Engine's layers (layernorm, moe_act), buckets of gradients as large as those of a real model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import RunConfig, apply_overrides
from tests.pool import RankPool
from tests.runs import metrics_of, run_job, small_config, weights_of, with_teacher

Case = tuple[dict[str, Any], dict[str, Any], int, tuple[str, ...]]

# Layouts of student and teacher, ranks, and what else is set.
CASES: dict[str, Case] = {
    "TP2xPP2+SP": ({"tensor": 2, "pipeline": 2, "sequence": True}, {"pipeline": 2}, 4, ()),
    "TP2xCP2": ({"tensor": 2, "context": 2}, {}, 4, ()),
    "PP2xVPP2": ({"pipeline": 2, "virtual": 2}, {}, 2, ()),
    "packed, DP2": ({}, {}, 2, ("training.micro_batch=1", "training.micro_batch_tokens=80")),
    "packed, CP2": ({"context": 2}, {}, 2, ("training.micro_batch=1", "training.micro_batch_tokens=80")),
    "bf16": ({}, {}, 1, ("training.precision=bf16",)),
    # Where the embedding does not train, a function of a module's input alone would leave its weights without gradients.
    "the first feed-forward alone": ({}, {}, 1, ("modules.train=layers.0.mlp",)),
}
SLOW = ("TP2xCP2", "PP2xVPP2", "packed, DP2")


def slow(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def config_of(models: Path, case: Case, recorded: Path, *overrides: str) -> RunConfig:
    student, teacher, _, settings = case
    config = with_teacher(small_config(models, **student), **teacher)
    return apply_overrides(config, [f"rollout.replay={recorded}", *settings, *overrides])


def assert_same_run(one: Path, other: Path) -> None:
    for ours, reference in zip(metrics_of(one), metrics_of(other), strict=True):
        assert [ours[key] for key in ("loss", "grad_norm")] == [reference[key] for key in ("loss", "grad_norm")]
    ours, reference = weights_of(one), weights_of(other)
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


@pytest.mark.parametrize("name", slow(CASES))
def test_recomputed_modules_give_the_same_bits(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    for recompute in ("none", "selective"):
        modules = "training.recompute_modules=core_attn,mlp"
        pool.run(run_job, config_of(models, case, recorded, f"training.recompute={recompute}", modules), tmp_path / recompute, world_size=case[2])
    assert any(step["grad_norm"] > 0 for step in metrics_of(tmp_path / "none"))
    assert_same_run(tmp_path / "selective", tmp_path / "none")


@pytest.mark.parametrize("name", slow(["TP2xPP2+SP", "PP2xVPP2", "packed, DP2", "packed, CP2", "the first feed-forward alone"]))
def test_gradients_that_travel_early_are_the_same(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    for overlap in ("false", "true"):
        pool.run(run_job, config_of(models, case, recorded, f"training.overlap_grad_reduce={overlap}"), tmp_path / overlap, world_size=case[2])
    assert_same_run(tmp_path / "true", tmp_path / "false")
