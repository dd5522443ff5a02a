"""Selection of tokens and position weights in training: the same tokens in every layout, gradients of kept rows only, steps that keep nothing.

The rules themselves are tested in tests/unit/test_token_importance.py. Not covered: GPUs, bf16, more than 4 ranks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.config import ImportanceConfig, LossConfig, ParallelLayout, PositionWeightsConfig, RunConfig
from tests.pool import RankPool
from tests.reference_losses import naive_clipped, naive_divergence
from tests.runs import metrics_of, run_job, small_config, weights_of, with_teacher

RULES: dict[str, dict[str, Any]] = {
    "entropy_sample": {"ratio": 0.4},
    "entropy_topk": {"ratio": 0.5},
    "soft_or_topk": {"ratio": 0.3},
    "q3_topk": {"ratio": 0.3},
    "div_topk": {"ratio": 0.5, "delta": "forward_kl"},
    "bottom_topk": {"ratio": 0.5},
}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "one rank, small micro-batches": ({}, {}, {"micro_batch": 1}, 1),
    "TP2+SP": ({"tensor": 2, "sequence": True}, {}, {}, 2),
    "PP2xVPP2": ({"pipeline": 2, "virtual": 2}, {}, {}, 2),
    "CP2, packed": ({"context": 2}, {}, {"micro_batch": 1, "micro_batch_tokens": 80}, 2),
    "DP4": ({}, {"tensor": 2}, {}, 4),
}


def _replaying(config: RunConfig, recorded: Path, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, replay=str(recorded)), **changes)


def _steps(pool: RankPool, config: RunConfig, run: Path, world_size: int = 1) -> list[dict[str, float]]:
    pool.run(run_job, config, run, world_size=world_size)
    return metrics_of(run)


def _weighing(rule: str, **options: Any) -> dict[str, Any]:
    return {"importance": ImportanceConfig(rule=rule, **options), "position_weights": PositionWeightsConfig(enabled=rule in ("soft_or_topk", "all"))}


@pytest.mark.parametrize("rule", [rule if rule == "soft_or_topk" else pytest.param(rule, marks=pytest.mark.slow) for rule in RULES])
def test_every_layout_keeps_the_same_tokens(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, rule: str) -> None:
    """Position weights and a clip join one of the rules. Kept shares are of few tokens, so that one token more or less shows."""
    weighing = _weighing(rule, **RULES[rule])
    if rule == "soft_or_topk":
        weighing["loss"] = LossConfig(pointwise_clip=0.005)
    base = dataclasses.replace(small_config(models).training, steps=2)
    reference = _steps(pool, _replaying(small_config(models), recorded, training=base, **weighing), tmp_path / "one")
    assert all(0.2 < step["kept_fraction"] < 0.6 for step in reference)
    if "loss" in weighing:
        clipped_N = pool.run(_clipped_of_kept_tokens, _replaying(small_config(models), recorded, **weighing), recorded, world_size=1)[0]
        assert 0 < reference[0]["clip_fraction"] == float((clipped_N > 0).double().mean()) < 1
        assert reference[0]["clipped_entries_mean"] == float(clipped_N.double().mean()) > reference[0]["clip_fraction"]
    for name, (student, teacher, training, world_size) in LAYOUTS.items():
        config = with_teacher(small_config(models, **student), **teacher)
        config = _replaying(dataclasses.replace(config, training=dataclasses.replace(base, **training)), recorded, **weighing)
        for ours, theirs in zip(_steps(pool, config, tmp_path / name, world_size), reference, strict=True):
            for key in ("kept_fraction", "clip_fraction", "clipped_entries_mean"):
                assert ours.get(key) == theirs.get(key), (name, key, ours["step"])
            for key in ("loss", "grad_norm", "divergence", "reverse_kl_kept", "entropy_median", "quadrant_1_kept_share"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (name, key, ours["step"])


@contextmanager
def _one_step(config: RunConfig, recorded: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Yield a loaded student on this one rank, its objective, and the micro-batches of the recorded step 1."""
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.groups import student_groups, teacher_groups
    from opd_megatron.parallel.world import worlds
    from opd_megatron.rollout.rollouts import replay_rollouts
    from opd_megatron.teacher.teacher import Teacher
    from opd_megatron.training.objective import Distillation
    from opd_megatron.training.setup import make_router, make_scorer
    from opd_megatron.training.student import Student

    device = torch.device("cpu")
    assert config.teacher is not None
    with worlds(0) as bridge:
        student = Student(config, open_weights(hf=config.student.hf), student_groups(ParallelLayout(), 1), device)
        source = open_weights(hf=config.teacher.hf)
        scorer, router = make_scorer(source, config, teacher_groups(ParallelLayout()), device), make_router(source, config, bridge)
        teacher = Teacher(source, router, scorer, student.groups, student_padded_vocab=student.padded_vocab, device=device)
        objective = Distillation(loss=config.loss, vocab_size=263, tp_group=student.groups.collection.tp, teacher_head_WG=teacher.head_WG)
        rollouts = replay_rollouts(recorded / "rollouts" / "step_1.jsonl")
        yield student, objective, student.micro_batches(rollouts, teacher.score(rollouts))


def _unfused_logits(student: Any, objective: Any, micro_batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both models' logits [T, V] of every response token."""
    from opd_megatron.models.gpt import head_weight, hidden_states_only

    tokens_BS = micro_batch.batch.tokens_BS
    with hidden_states_only(student.model):
        hidden_BSH = student.model.last(tokens_BS, torch.arange(tokens_BS.size(1)).expand_as(tokens_BS), None)
    logits_TV = (hidden_BSH.flatten(0, 1)[micro_batch.batch.scored_T] @ head_weight(student.model).t())[:, :263]
    return logits_TV.double(), (micro_batch.teacher_hidden_TG @ objective.teacher_head_WG.t())[:, :263].double()


def _clipped_of_kept_tokens(config: RunConfig, recorded: Path) -> torch.Tensor:
    """Return how many vocabulary entries are clipped of each kept token of step 1."""
    from opd_megatron.training.importance import Importance

    with _one_step(config, recorded) as (student, objective, whole):
        weighed, _ = Importance(config=config, vocab_size=263).weigh(student, whole, objective, step=1)
        counts = []
        for micro_batch in whole:
            logits = _unfused_logits(student, objective, micro_batch)
            clipped_T = naive_clipped(*logits, kind=config.loss.kind, pointwise_clip=config.loss.pointwise_clip)
            counts.append(clipped_T[weighed.weight_N[micro_batch.token_T] != 0])
    return torch.cat(counts)


def _gradients(config: RunConfig, recorded: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Return the gradients of one weighed step, those of an unfused loss in which dropped rows are masked, and the number of kept tokens."""
    from opd_megatron.training.importance import Importance

    with _one_step(config, recorded) as (student, objective, whole):
        weighed, _ = Importance(config=config, vocab_size=263).weigh(student, whole, objective, step=1)
        student.ddp[0].zero_grad_buffer()
        student._run_schedule(weighed, partial(student._loss, objective), forward_only=False)
        named = dict(student.model.named_parameters())
        fused = {name: parameter.main_grad.clone() for name, parameter in named.items()}
        student.ddp[0].zero_grad_buffer()
        loss, num_kept = torch.zeros((), dtype=torch.float64), int((weighed.weight_N != 0).sum())
        for micro_batch in whole:
            divergence_T = naive_divergence(*_unfused_logits(student, objective, micro_batch), kind=config.loss.kind)
            loss = loss + (divergence_T * weighed.weight_N[micro_batch.token_T]).sum() / num_kept
        for parameter in named.values():
            parameter.grad = None
        loss.backward()
        naive = {name: parameter.main_grad.clone() + (parameter.grad if parameter.grad is not None else 0) for name, parameter in named.items()}
    return fused, naive, num_kept


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_gradients_are_those_of_an_unfused_loss_with_dropped_rows_masked(models: Path, recorded: Path, pool: RankPool, kind: str) -> None:
    config = _replaying(small_config(models), recorded, **_weighing("soft_or_topk", ratio=0.3))
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, kind=kind))
    fused, naive, num_kept = pool.run(_gradients, config, recorded, world_size=1)[0]
    assert 0 < num_kept < 80
    for name, gradient in naive.items():
        assert gradient.norm() > 0, name
        assert (fused[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_ratio_of_one_changes_no_bit(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    for run, importance in (("all", ImportanceConfig()), ("one", ImportanceConfig(rule="soft_or_topk", ratio=1.0))):
        pool.run(run_job, _replaying(small_config(models, tensor=2), recorded, importance=importance), tmp_path / run, world_size=2)
    whole, one = weights_of(tmp_path / "all"), weights_of(tmp_path / "one")
    assert all(torch.equal(whole[name], one[name]) for name in whole)
    assert [step["loss"] for step in metrics_of(tmp_path / "all")] == [step["loss"] for step in metrics_of(tmp_path / "one")]


def test_a_run_whose_steps_keep_nothing_changes_nothing_and_is_saved(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    """A thousandth of ten tokens is none; Adam never gets a state of its own."""
    config = _replaying(small_config(models, pipeline=2), recorded, **_weighing("entropy_topk", ratio=0.001))
    steps = _steps(pool, config, tmp_path / "run", 4)
    assert [(step["kept_fraction"], step["loss"], step["skipped_steps"]) for step in steps] == [(0, None, 1), (0, None, 2), (0, None, 3)]
    weights = weights_of(tmp_path / "run")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(Path(config.student.hf or "") / "model.safetensors").items())


def test_steps_that_keep_nothing_end_the_run_with_the_way_out(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    config = _replaying(small_config(models), recorded, **_weighing("entropy_topk", ratio=0.001))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, max_skipped_steps=2))
    with pytest.raises(AssertionError, match=r"ValueError: 2 steps in a row were skipped because no token was left .* importance\.ratio=0\.001; raise it"):
        pool.run(run_job, config, tmp_path / "run", world_size=1)


def test_statistics_that_are_not_finite_skip_the_step(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    """Logits over such a temperature are infinite; the loss, at its own temperature, would be finite."""
    config = _replaying(small_config(models, tensor=2), recorded, **_weighing("soft_or_topk", temperature=1e-40))
    steps = _steps(pool, dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1)), tmp_path / "run", 2)
    assert steps[0]["skipped_steps"] == 1
    weights = weights_of(tmp_path / "run")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(Path(config.student.hf or "") / "model.safetensors").items())


def test_a_rank_without_a_kept_token_joins_in_everything(models: Path, recorded: Path, pool: RankPool, tmp_path: Path) -> None:
    """One token of the whole step is kept: three of four replicas have none."""
    options = {"ratio": 1 / 75, "select_scope": "step"}
    one, four = (
        _steps(pool, _replaying(small_config(models), recorded, **_weighing("div_topk", **options)), tmp_path / f"{world_size}", world_size)
        for world_size in (1, 4)
    )
    for ours, reference in zip(four, one, strict=True):
        assert ours["kept_fraction"] * ours["response_tokens"] == pytest.approx(1)
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(reference[key], rel=1e-5), key


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_position_weights_in_training_are_those_of_the_formula(models: Path, recorded: Path, pool: RankPool, tmp_path: Path, reduction: str) -> None:
    """The loss of step 1 by hand, from the divergence of each recorded token."""
    config = _replaying(small_config(models), recorded, position_weights=PositionWeightsConfig(enabled=True))
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, reduction=reduction))
    lengths = [len(json.loads(line)["response_ids"]) for line in (recorded / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    step = _steps(pool, config, tmp_path / "run")[0]
    per_token_N = pool.run(_divergences, config, recorded, world_size=1)[0]
    losses, weights = [], []
    for part in per_token_N.split(lengths):
        fraction = (torch.arange(len(part)) + 0.5) / len(part)
        weights.append(0.25 + 0.75 * torch.sigmoid((fraction - 0.30) / 0.10))
        losses.append(weights[-1] * part)
    by_hand = torch.cat(losses).mean() if reduction == "token" else torch.stack([loss.mean() for loss in losses if len(loss)]).mean()
    assert step["loss"] == pytest.approx(float(by_hand), rel=1e-5)
    assert step["position_weight_mean"] == pytest.approx(float(torch.cat(weights).mean()), rel=1e-5)
    assert step["kept_fraction"] == 1
    assert not any(key.startswith("clip") for key in step), "no clip was asked for"


def _divergences(config: RunConfig, recorded: Path) -> torch.Tensor:
    """Return the reverse KL of every token of step 1."""
    with _one_step(config, recorded) as (student, objective, micro_batches):
        return student.statistics(micro_batches, objective, 1.0).reverse_kl_T
