"""Planned memory and messages of rollouts, by the dynamic engine and by a copy of the student in a layout of its own, against what ranks hold and send.

Those of the static engine in the student's layout are in test_planned_memory.py and test_planned_messages.py. Not covered: GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import ParallelLayout, RunConfig, apply_overrides
from opd_megatron.parallel.layout import replica_share
from tests.distributed.test_planned_messages import counted
from tests.paged_attention import needs_paged_caches, paged_attention_on_cpu
from tests.planned import PUBLISHED, longest_rollouts, tiny_config
from tests.pool import RankPool


def _student(config: RunConfig) -> tuple[Any, Any]:
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.groups import student_groups
    from opd_megatron.training.student import Student

    source = open_weights(hf=config.student.hf)
    return Student(config, source, student_groups(config.student.layout, 1), torch.device("cpu")), source


def _share(config: RunConfig, groups: Any) -> tuple[list[list[int]], list[tuple[int, ...]], Any]:
    """Return what this rank's writer is given: every prompt at its limit."""
    from opd_megatron.rollout.sampling import SamplingSettings

    samples = longest_rollouts(config).samples
    chosen = replica_share(len(samples), groups.writer, groups.num_writers)
    return (
        [samples[index].prompt_ids.tolist() for index in chosen],
        [(index,) for index in chosen],
        SamplingSettings(max_response_tokens=config.rollout.max_response_tokens),
    )


def written_by_copy(config: RunConfig) -> tuple[int, dict[str, int]]:
    """Return the bytes of the copy's weights while it writes, and what this rank sends for a rollout."""
    from opd_megatron.training.rollout_engine import student_engine

    student, source = _student(config)
    # Without an end-of-sequence token every response reaches its limit.
    engine: Any = student_engine(config, source, student, vocab_size=263, eos_ids=(), note=lambda _: None)
    with engine._with_weights():
        held = sum({storage.data_ptr(): storage.nbytes() for storage in engine._storages}.values())
    given = _share(config, engine.groups)
    return held, counted(lambda: engine.generate(*given))


def written_in_pages(config: RunConfig) -> tuple[int, dict[str, int]]:
    """Return the bytes of the pages, and what this rank sends for a rollout by the dynamic engine."""
    from opd_megatron.rollout.dynamic import DynamicSampler

    student, _ = _student(config)
    rollout = config.rollout
    sampler = DynamicSampler(
        student.model, student.groups, vocab_size=263, eos_ids=(), batch_sequences=rollout.batch_sequences, kv_cache_gib=rollout.kv_cache_gib
    )
    pages: list[int] = []
    make = sampler._make_cache

    def seen(*arguments: Any) -> Any:
        cache = make(*arguments)
        pages.append(cache.context.memory_buffer.nbytes)
        return cache

    sampler._make_cache = seen  # type: ignore[method-assign]
    given = _share(config, student.groups)
    with paged_attention_on_cpu():
        sent = counted(lambda: sampler.generate(*given))
    return pages[0], sent


def planned(config: RunConfig) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Return, of every rank, the terms of the rollout and the messages of it."""
    from opd_megatron.planning.architectures import know_model
    from opd_megatron.planning.memory import rank_memory
    from opd_megatron.planning.messages import rank_messages
    from opd_megatron.planning.payload import step_payload
    from opd_megatron.planning.ranks import plan_rank

    student, teacher = know_model("student", config.student, PUBLISHED), know_model("teacher", config.teacher, PUBLISHED)
    found = []
    for rank in range(config.world_size):
        one = plan_rank(config, student, teacher, step_payload(config), rank)
        counts: dict[str, int] = {}
        for message in rank_messages(one):
            if message.phase == "rollout":
                counts[message.operation] = counts.get(message.operation, 0) + message.count
        found.append(({term.name: term.num_bytes for term in rank_memory(one).terms if term.phase == "rollout"}, counts))
    return found


COPIES = {
    "TP2xPP2 writes as DP4": ({"tensor": 2, "pipeline": 2}, {}),
    "DP4 writes as TP2xPP2": ({}, {"tensor": 2, "pipeline": 2}),
    "PP2xVPP2xDP2 writes as TP2xDP2": ({"pipeline": 2, "virtual": 2}, {"tensor": 2}),
    "a mixture, EP2xPP2 writes as EP4": ({"expert": 2, "pipeline": 2}, {"expert": 4}),
    "a mixture, EP2xETP2 writes as TP2": ({"expert": 2, "expert_tensor": 2}, {"tensor": 2}),
}
SLOW = {"DP4 writes as TP2xPP2", "PP2xVPP2xDP2 writes as TP2xDP2", "a mixture, EP2xETP2 writes as TP2", "PP2", "DP2", "PP2xDP2, few slots", "TP2, few pages"}


def with_marks(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.mark.parametrize("name", with_marks(COPIES))
def test_a_copy_holds_and_sends_what_was_planned(planned_models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    student, writing = COPIES[name]
    config = tiny_config(planned_models, ParallelLayout(**student), ParallelLayout(), world_size=4, mixture="mixture" in name)
    # Two batches of three, and four writers or two or one.
    config = replace(config, rollout=replace(config.rollout, layout=ParallelLayout(**writing), batch_sequences=3))
    plans = planner(planned, config)
    for rank, (held, sent) in enumerate(pool.run(written_by_copy, config)):
        terms, messages = plans[rank]
        assert terms["rollout weights, rollout"] == held > 0, rank
        assert messages == sent, rank


PAGED = {
    "TP2": ({"tensor": 2}, [], 2),
    "PP2": ({"pipeline": 2}, [], 2),
    "DP2": ({}, [], 2),
    "PP2xDP2, few slots": ({"pipeline": 2}, ["rollout.batch_sequences=3"], 4),
    # Of 16 sequences the pages hold eight at a time, and a spare block.
    "TP2, few pages": ({"tensor": 2}, ["rollout.kv_cache_gib=0.0009"], 2),
}


@needs_paged_caches
@pytest.mark.parametrize("name", with_marks(PAGED))
def test_pages_hold_and_send_what_was_planned(planned_models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    layout, words, world_size = PAGED[name]
    config = tiny_config(planned_models, ParallelLayout(**layout), ParallelLayout(), world_size=world_size, precision="bf16")
    config = apply_overrides(config, ["rollout.engine=dynamic", *words])
    plans = planner(planned, config)
    for rank, (held, sent) in enumerate(pool.run(written_in_pages, config, world_size=world_size)):
        terms, messages = plans[rank]
        assert terms["KV cache, rollout"] == held, rank
        assert messages == sent, rank
