"""Planned memory against what ranks really hold. Plans of worlds that no test can start are in test_plans.py.

What a forward keeps and needs is in test_planned_activations.py, what is sent in test_planned_messages.py. Not covered: GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import ParallelLayout, RunConfig, apply_overrides
from tests.planned import LAYOUTS, MIXTURES, PUBLISHED, buffers, build, config_of, longest_rollouts, storages, tiny_config
from tests.pool import RankPool


def held_bytes(config: RunConfig, bridge: Any = None) -> dict[str, int]:
    """Return what this rank of the student really holds of each kind, every storage once."""
    from opd_megatron.training.optimizer import optimizer_state, prime_adam

    student, teacher = build(config, bridge)
    received = teacher.score(longest_rollouts(config))
    prime_adam(student.optimizer)
    weights = storages(student.model.parameters())
    gradients = storages(buffer.grad_data for buffer in buffers(student))
    optimizer = storages(optimizer_state(student.optimizer))
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
        "teacher weights": sum(storages(teacher.scorer.model.parameters() if teacher.scorer is not None else []).values()),
        "scores received": sum(rows.nbytes for rows in (received.rows if received is not None else {}).values()),
        "teacher head slice": sum(storages([teacher.head_WG] if teacher.head_WG is not None else []).values()),
        "payload bytes": teacher.payload_bytes,
        "gathered bytes": teacher.gathered_bytes,
    }


def held_apart(config: RunConfig) -> dict[str, int]:
    """Return the same of a rank of either world, the teacher's having ranks of its own."""
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.groups import teacher_groups
    from opd_megatron.parallel.world import worlds
    from opd_megatron.teacher.routing import Courier
    from opd_megatron.training.setup import make_router, make_scorer

    with worlds(config.num_teacher_ranks) as bridge:
        if bridge.rank in bridge.student_ranks:
            return held_bytes(config, bridge)
        device, source = torch.device("cpu"), open_weights(hf=config.teacher.hf)
        scorer, router = make_scorer(source, config, teacher_groups(config.teacher.layout), device), make_router(source, config, bridge)
        rollouts = bridge.told_by_student().rollouts
        routes = router.routes(rollouts)
        courier, made = Courier(router, routes, device), []

        def send(rows: dict[int, torch.Tensor]) -> None:
            made.extend(part.nbytes for part in rows.values())
            courier.send(rows)

        scorer.score(rollouts, send, num_rounds=router.num_rounds)
        courier.finish()
        return {
            "teacher weights": sum(storages(scorer.model.parameters()).values()),
            "scores made": sum(made),
            "payload bytes": sum(route.plan.sent_rows() for route in routes) * router.row_bytes,
            "gathered bytes": sum(route.plan.gathered_rows() for route in routes) * router.row_bytes,
        }


def planned_bytes(config: RunConfig) -> list[dict[str, int]]:
    """Return the plan of every rank of the world, not only of those that a plan shows."""
    from opd_megatron.models.gpt import DTYPES
    from opd_megatron.planning import make_plan
    from opd_megatron.planning.architectures import know_model
    from opd_megatron.planning.memory import rank_memory
    from opd_megatron.planning.payload import step_payload
    from opd_megatron.planning.ranks import plan_rank

    student, teacher = know_model("student", config.student, PUBLISHED), know_model("teacher", config.teacher, PUBLISHED)
    payload, row_bytes = step_payload(config), teacher.architecture.hidden_size * DTYPES[config.training.precision].itemsize
    ranks = [rank_memory(plan_rank(config, student, teacher, payload, rank)) for rank in range(config.world_size)]
    plan = make_plan(config, PUBLISHED)
    everyone = {"payload bytes": plan.payload_bytes, "gathered bytes": plan.payload_gathered_bytes}
    scores = [{"scores received": payload.needed_rows(rank) * row_bytes, "scores made": payload.held_rows(rank) * row_bytes} for rank in range(len(ranks))]
    return [{**{term.name: term.num_bytes for term in memory.terms}, **everyone, **own} for memory, own in zip(ranks, scores, strict=True)]


# The same tensors with fewer bytes in each: one layout of dense models and one of mixtures.
QUICK_BF16 = ("TP2xPP2, teacher DP4", "EP2xPP2, teacher EP4")


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "fp32") for name in (*LAYOUTS, *MIXTURES)),
        *(pytest.param(name, "bf16", marks=[] if name in QUICK_BF16 else [pytest.mark.slow]) for name in (*LAYOUTS, *MIXTURES)),
    ],
)
def test_ranks_hold_what_was_planned(planned_models: Path, pool: RankPool, planner: Callable[..., Any], name: str, precision: str) -> None:
    config = config_of(planned_models, name, precision)
    planned = planner(planned_bytes, config)
    for rank, held in enumerate(pool.run(held_bytes, config)):
        for kind, num_bytes in held.items():
            # Megatron aligns every parameter in its buffers, which is much of a tiny norm and nothing of a real matrix.
            rel = 0.1 if kind in ("weights", "gradients", "optimizer") else 0
            assert planned[rank].get(kind, 0) == pytest.approx(num_bytes, rel=rel), (rank, kind)


def counted(config: RunConfig) -> tuple[Any, Any]:
    """Return what the student that this rank builds holds, by a walk over its parameters, and by the rows of its weight map."""
    from opd_megatron.models.allocation import Allocation
    from opd_megatron.models.gpt import build_gpt
    from opd_megatron.models.weight_map import EMBEDDING, HEAD
    from opd_megatron.models.weights import named_global_parameters, open_weights
    from opd_megatron.parallel.groups import student_groups
    from opd_megatron.planning.counts import Counts, count_rank

    architecture, groups = open_weights(hf=config.student.hf).architecture, student_groups(config.student.layout, 1)
    model, trained = build_gpt(architecture, groups, precision="fp32", vocab_multiple=4), Allocation.of(config.modules, architecture).trained
    head, tensor = EMBEDDING if architecture.tied else HEAD, groups.layout.tensor
    chunks = [list(named_global_parameters([chunk], architecture)) for chunk in model]
    everything = [pair for chunk in chunks for pair in chunk]
    experts = {id(parameter) for _, parameter in everything if not getattr(parameter, "allreduce", True)}
    # What Megatron-Core sums over the tensor group once the backward is done: `finalize_model_grads`.
    partial = {id(p) for name, p in everything if getattr(p, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name}

    def numbers(parameters: list[torch.nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    training = [(name, parameter) for name, parameter in everything if name in trained]
    built = Counts(
        num_layers=sum(len(chunk.decoder.layers) for chunk in model),
        num_parameters=numbers([p for _, p in everything]),
        num_trained=numbers([p for _, p in training]),
        num_trained_expert=numbers([p for _, p in training if id(p) in experts]),
        num_trained_partial=numbers([p for _, p in training if id(p) in partial and tensor > 1]),
        num_trained_head=numbers([p for name, p in training if name == head]),
        num_trained_chunks=sum(any(name in trained and name != head and id(p) not in experts for name, p in chunk) for chunk in chunks),
        num_trained_expert_chunks=sum(any(name in trained and id(p) in experts for name, p in chunk) for chunk in chunks),
        num_expert_parameters=numbers([p for _, p in everything if id(p) in experts]),
    )
    planned = count_rank(architecture, groups.grid, groups.grid.first_rank + torch.distributed.get_rank(), vocab_multiple=4, trained=trained)
    return built, planned


@pytest.mark.parametrize("name", [*LAYOUTS, *MIXTURES])
def test_parameters_are_counted_as_they_are_built(planned_models: Path, pool: RankPool, name: str) -> None:
    config = config_of(planned_models, name)
    for train in ("all", "attention" if name in LAYOUTS else "mlp", "layers.3.mlp,embedding"):
        for rank, (built, planned) in enumerate(pool.run(counted, apply_overrides(config, [f"modules.train={train}"]))):
            assert planned == built, (rank, train)


FROZEN = [
    ("TP2xPP2, teacher DP4", "paper"),
    ("PP2xDP2, teacher TP2xDP2", "layers.3.mlp"),
    ("EP2xPP2, teacher EP4", "mlp"),
    ("TP2+SPxEP2, teacher EP2xPP2", "!mlp"),
]


@pytest.mark.parametrize(("name", "train"), FROZEN[:2] + [pytest.param(*case, marks=pytest.mark.slow) for case in FROZEN[2:]])
def test_what_does_not_train_is_planned_without_gradient_and_optimizer(
    planned_models: Path, pool: RankPool, planner: Callable[..., Any], name: str, train: str
) -> None:
    config = apply_overrides(config_of(planned_models, name), [f"modules.train={train}"])
    planned = planner(planned_bytes, config)
    for rank, held in enumerate(pool.run(held_bytes, config)):
        for kind in ("weights", "gradients", "optimizer"):
            # As above: alignment of tiny parameters.
            assert planned[rank].get(kind, 0) == pytest.approx(held[kind], rel=0.1), (rank, kind)


APART = {
    "TP2, teacher TP2 on ranks of its own": ({"tensor": 2}, {"tensor": 2}),
    "PP2, teacher CP2 on ranks of its own": ({"pipeline": 2}, {"context": 2}),
    "EP2, teacher EP2 on ranks of its own": ({"expert": 2}, {"expert": 2}),
}


@pytest.mark.parametrize("name", APART)
def test_ranks_of_two_worlds_hold_what_was_planned(planned_models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    student, teacher = APART[name]
    config = tiny_config(planned_models, ParallelLayout(**student), ParallelLayout(**teacher), world_size=4, mixture="expert" in student)
    config = apply_overrides(config, ["teacher.placement=dedicated", "teacher.num_ranks=2", "teacher.staleness=1"])
    planned, measured = planner(planned_bytes, config), pool.run(held_apart, config)
    for rank, held in enumerate(measured):
        for kind, num_bytes in held.items():
            # As above: alignment of tiny parameters.
            rel = 0.1 if kind in ("weights", "gradients", "optimizer") else 0
            assert planned[rank].get(kind, 0) == pytest.approx(num_bytes, rel=rel), (rank, kind)
        assert {kind for kind in planned[rank] if kind in ("weights", "teacher weights")} == {"weights" if rank < 2 else "teacher weights"}
    assert sum(held.get("scores received", 0) for held in measured) > 0


def bytes_inside_and_outside(config: RunConfig) -> dict[str, tuple[int, int]]:
    """Return, of what is offloaded, the bytes on the device in the phase that needs it and in the others."""
    from opd_megatron.training.optimizer import optimizer_state, prime_adam

    student, teacher = build(config)
    with student.optimizer_on_device():
        prime_adam(student.optimizer)

    def now() -> dict[str, int]:
        kinds = {
            "gradients": [buffer.grad_data for buffer in buffers(student)],
            "optimizer": optimizer_state(student.optimizer),
            "teacher weights": list(teacher.scorer.model.parameters()),
        }
        return {kind: sum(storages(tensors).values()) for kind, tensors in kinds.items()}

    outside = now()
    with student.optimizer_on_device(), teacher.scorer.on_device():
        inside = now()
    return {kind: (inside[kind], outside[kind]) for kind in inside}


def planned_phases(config: RunConfig) -> dict[str, dict[str, int]]:
    from opd_megatron.planning import make_plan

    phases: dict[str, dict[str, int]] = {}
    for term in make_plan(config, PUBLISHED).ranks[0].terms:
        phases.setdefault(term.name, {})[term.phase] = term.num_bytes
    return phases


def test_what_waits_on_the_host_is_planned_for_its_phase_only(planned_models: Path, pool: RankPool, planner: Callable[..., Any]) -> None:
    config = apply_overrides(config_of(planned_models, "TP2xPP2, teacher DP4"), ["teacher.placement=offloaded", "training.offload_optimizer=true"])
    planned = planner(planned_phases, config)
    for kind, (inside, outside) in pool.run(bytes_inside_and_outside, config)[0].items():
        assert list(planned[kind]) == ["teacher" if kind == "teacher weights" else "train"]
        # As above: alignment of tiny parameters.
        assert sum(planned[kind].values()) == pytest.approx(inside, rel=0.1)
        assert outside == 0
