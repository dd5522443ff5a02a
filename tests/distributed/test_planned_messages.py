"""Planned messages against those that ranks send. Plans of worlds that no test can start are in test_plans.py.

Not covered: GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import RunConfig, TrainingConfig, apply_overrides
from opd_megatron.parallel.layout import replica_share
from tests.planned import LAYOUTS, MIXTURES, PACKED, PUBLISHED, RECOMPUTED, SELECTED, buffers, build, config_of, longest_rollouts
from tests.pool import RankPool

OPERATIONS = {
    "c10d::allreduce_": "all-reduce",
    "c10d::allgather_": "all-gather",
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_into_tensor_coalesced_": "all-gather",
    "c10d::reduce_scatter_": "reduce-scatter",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "c10d::alltoall_base_": "all-to-all",
    "c10d::send": "send",
    "c10d::broadcast_": "broadcast",
}


# Sums and maximum of the loss, the gradient norm and the token count; the token count goes from the last stage to the others.
SCALARS = {"all-reduce": 4, "broadcast": 1}


def sent_messages(config: RunConfig) -> dict[str, dict[str, int]]:
    """Return how many messages of each kind this rank sends while it writes, scores and trains."""
    from opd_megatron.rollout.engine import Sampler
    from opd_megatron.rollout.sampling import SamplingSettings
    from opd_megatron.training.objective import Distillation

    student, teacher = build(config)
    rollouts = longest_rollouts(config)
    # Without an end-of-sequence token every response reaches its limit.
    sampler = Sampler(student.model, student.groups, vocab_size=263, eos_ids=(), batch_sequences=config.rollout.batch_sequences)
    objective = Distillation(loss=config.loss, vocab_size=263, tp_group=student.groups.collection.tp, teacher_head_WG=teacher.head_WG)
    share = [rollouts.samples[index] for index in replica_share(len(rollouts.samples), student.groups.data_rank, student.groups.data_size)]
    settings = SamplingSettings(max_response_tokens=config.rollout.max_response_tokens)
    scores: list[Any] = []
    counts = {
        "rollout": counted(lambda: sampler.generate([sample.prompt_ids.tolist() for sample in share], [(i,) for i in range(len(share))], settings)),
        "teacher": counted(lambda: scores.append(teacher.score(rollouts))),
        "weigh": {},
        "train": counted(lambda: student.train_step(student.micro_batches(rollouts, scores[0]), objective)),
    }
    if config.importance.rule != "all":
        counts["weigh"] = counted(lambda: student.statistics(student.micro_batches(rollouts, scores[0]), objective, 1.0))
    # Megatron also calls the data-parallel collectives of a group of one, and gathers all weights once for each optimizer, the dense and the experts'.
    in_vain = sum(len(buffer.buckets) for buffer in buffers(student) if buffer.data_parallel_group.size() == 1)
    for operation, times in {"reduce-scatter": 1, "all-gather": len(student.optimizer.chained_optimizers)}.items() if in_vain else ():
        counts["train"][operation] -= times * in_vain
    return {phase: {operation: count for operation, count in of_phase.items() if count} for phase, of_phase in counts.items()}


def counted(action: Callable[[], Any]) -> dict[str, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    counts: dict[str, int] = {}
    for event in profile.key_averages():
        if event.key in OPERATIONS:
            counts[OPERATIONS[event.key]] = counts.get(OPERATIONS[event.key], 0) + event.count
    return counts


def planned_messages(config: RunConfig) -> list[dict[str, dict[str, int]]]:
    from opd_megatron.planning.architectures import know_model
    from opd_megatron.planning.messages import rank_messages
    from opd_megatron.planning.payload import step_payload
    from opd_megatron.planning.ranks import plan_rank

    student, teacher = know_model("student", config.student, PUBLISHED), know_model("teacher", config.teacher, PUBLISHED)
    by_rank, payload = [], step_payload(config)
    for rank in range(config.world_size):
        counts: dict[str, dict[str, int]] = {"rollout": {}, "teacher": {}, "weigh": {}, "train": dict(SCALARS)}
        for message in rank_messages(plan_rank(config, student, teacher, payload, rank)):
            of_phase = counts["train" if message.phase == "optimizer" else message.phase]
            # The default loss is a KL divergence, whose exchange is all-reduces.
            operation = "all-reduce" if message.operation.startswith("all-reduce") else message.operation
            of_phase[operation] = of_phase.get(operation, 0) + message.count
        by_rank.append(counts)
    return by_rank


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *MIXTURES])
def test_ranks_send_as_many_messages_as_planned(planned_models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    check_messages(config_of(planned_models, name), pool, planner)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2+SPxDP2, teacher TP2xPP2", "CP2xTP2, teacher CP2xPP2", "EP2xPP2, teacher EP4", "EP2xETP2, teacher TP2xETP2"])
def test_packs_and_recomputed_layers_send_as_many_messages_as_planned(planned_models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    config = replace(config_of(planned_models, name), training=TrainingConfig(precision="fp32"))
    check_messages(apply_overrides(config, [RECOMPUTED, PACKED]), pool, planner)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2+SPxDP2, teacher TP2xPP2", "CP2xTP2, teacher CP2xPP2", "EP2xPP2, teacher EP4", "EP2xETP2, teacher TP2xETP2"])
def test_recomputed_modules_send_as_many_messages_as_planned(planned_models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    check_messages(apply_overrides(config_of(planned_models, name), SELECTED), pool, planner)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2+SPxDP2, teacher TP2xPP2", "CP2xTP2, teacher CP2xPP2", "EP2xPP2, teacher EP4"])
def test_the_pass_of_a_selection_rule_sends_as_many_messages_as_planned(planned_models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    check_messages(apply_overrides(config_of(planned_models, name), ["importance.rule=soft_or_topk"]), pool, planner)


# An embedding that trains has the backward pass through all layers.
FROZEN = [
    ("PP2xVPP2xDP2, teacher DP4", "embedding,layers.3.attention"),
    pytest.param("TP2xPP2, teacher DP4", "embedding,layers.1.mlp", marks=pytest.mark.slow),
    pytest.param("EP2xPP2, teacher EP4", "embedding,mlp", marks=pytest.mark.slow),
    pytest.param("EP2xPP2, teacher EP4", "embedding,attention", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "train"), FROZEN)
def test_the_gradients_of_what_does_not_train_are_not_sent(planned_models: Path, pool: RankPool, planner: Callable[..., Any], name: str, train: str) -> None:
    check_messages(apply_overrides(config_of(planned_models, name), [f"modules.train={train}"]), pool, planner)


def check_messages(config: RunConfig, pool: RankPool, planner: Callable[..., Any]) -> None:
    planned = planner(planned_messages, config)
    for rank, sent in enumerate(pool.run(sent_messages, config)):
        assert sent == planned[rank], rank
