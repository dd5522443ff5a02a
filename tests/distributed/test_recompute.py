"""What is computed again in the backward changes no bit of losses, gradients and weights, nor does when gradients travel.

In several buckets their norm is added up in another order, and rounds otherwise.

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
from tests.runs import metrics_of, run_job, run_until_step, small_config, weights_of, with_teacher, write_prompts
from tests.tiny import write_tiny_model

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
SLOW = ("TP2xCP2", "PP2xVPP2", "packed, DP2", "searches")


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


def assert_same_to_rounding(one: Path, other: Path) -> None:
    for ours, reference in zip(metrics_of(one), metrics_of(other), strict=True):
        assert [ours[key] for key in ("loss", "grad_norm")] == pytest.approx([reference[key] for key in ("loss", "grad_norm")], rel=1e-5)
    ours, reference = weights_of(one), weights_of(other)
    for name in reference:
        # Adam divides by the root of tiny squares in its first steps: differences of sums are enlarged.
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", slow(CASES))
def test_recomputed_modules_give_the_same_bits(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    for recompute in ("none", "selective"):
        modules = "training.recompute_modules=core_attn,mlp"
        pool.run(run_job, config_of(models, case, recorded, f"training.recompute={recompute}", modules), tmp_path / recompute, world_size=case[2])
    assert any(step["grad_norm"] > 0 for step in metrics_of(tmp_path / "none"))
    assert_same_run(tmp_path / "selective", tmp_path / "none")


# Of 165,056 numbers: several buckets.
SMALL_BUCKET = 20_000


def run_in_small_buckets(config: RunConfig, run: Path, steps: int | None = None) -> str:
    from opd_megatron.training import student

    student.BUCKET_NUMBERS = SMALL_BUCKET
    try:
        return run_job(config, run) if steps is None else run_until_step(config, run, steps)
    finally:
        student.BUCKET_NUMBERS = None


@pytest.mark.parametrize("name", slow(["TP2xPP2+SP", "PP2xVPP2", "packed, DP2", "packed, CP2"]))
def test_gradients_that_travel_early_in_one_bucket_have_the_same_bits(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    for overlap in ("false", "true"):
        pool.run(run_job, config_of(models, case, recorded, f"training.overlap_grad_reduce={overlap}"), tmp_path / overlap, world_size=case[2])
    assert_same_run(tmp_path / "true", tmp_path / "false")


EARLY: dict[str, Case] = {
    **{name: CASES[name] for name in ("PP2xVPP2", "packed, DP2", "the first feed-forward alone")},
    # A replica has no sample, or keeps none of its tokens: its head has no row to learn from.
    "three samples of four replicas": ({}, {}, 4, ("rollout.replay=null", "data.batch_prompts=3", "training.micro_batch=1")),
    "few tokens kept": ({}, {}, 4, ("importance.rule=entropy_topk", "importance.ratio=0.1")),
    "searches": ({}, {}, 2, ("rollout.replay=null", "effopd.enabled=true", "effopd.prompts=6", "effopd.score=divergence")),
}


@pytest.mark.parametrize("name", slow(EARLY))
def test_gradients_that_travel_early_in_several_buckets_train_alike(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    case = EARLY[name]
    pool.run(run_job, config_of(models, case, recorded), tmp_path / "late", world_size=case[2])
    pool.run(run_in_small_buckets, config_of(models, case, recorded, "training.overlap_grad_reduce=true"), tmp_path / "early", world_size=case[2])
    assert_same_to_rounding(tmp_path / "early", tmp_path / "late")


def test_a_run_whose_gradients_travel_early_resumes_bit_for_bit(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    """Optimizer state is cut by buckets, and a checkpoint of several is read as it was written."""
    config = config_of(models, CASES["packed, DP2"], recorded, "training.overlap_grad_reduce=true")
    pool.run(run_in_small_buckets, config, tmp_path / "whole", world_size=2)
    pool.run(run_in_small_buckets, config, tmp_path / "parts", 2, world_size=2)
    pool.run(run_in_small_buckets, config, tmp_path / "parts", world_size=2)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher with experts, and prompts."""
    folder = tmp_path_factory.mktemp("experts")
    write_tiny_model(folder / "student", "qwen3_moe", tied=True, vocab_size=263, seed=1, scale=0.3, num_hidden_layers=2)
    write_tiny_model(folder / "teacher", "qwen3_moe", vocab_size=263, seed=2, scale=0.5, num_hidden_layers=2)
    write_prompts(folder / "prompts.jsonl")
    return folder


@pytest.mark.parametrize("layout", [{"expert": 2}, pytest.param({"tensor": 2, "sequence": True, "expert_tensor": 2}, marks=pytest.mark.slow)], ids=str)
def test_experts_are_computed_again_and_their_gradients_travel_early(experts: Path, pool: RankPool, tmp_path: Path, layout: dict[str, Any]) -> None:
    config = small_config(experts, **layout)
    pool.run(run_job, config, tmp_path / "plain", world_size=2)
    again = apply_overrides(config, ["training.recompute=selective", "training.recompute_modules=moe,core_attn", "training.overlap_grad_reduce=true"])
    pool.run(run_job, again, tmp_path / "again", world_size=2)
    assert_same_run(tmp_path / "again", tmp_path / "plain")
