"""The life of a rank that holds a part of the teacher and none of the student."""

from __future__ import annotations

from typing import Any, Literal

import torch

from opd_megatron.config import RunConfig
from opd_megatron.models.weights import WeightSource
from opd_megatron.parallel.groups import ModelGroups, teacher_groups
from opd_megatron.parallel.world import Bridge
from opd_megatron.teacher.routing import Courier
from opd_megatron.teacher.scorer import Scorer
from opd_megatron.teacher.teacher import Evaluate, Leave, Refresh, Score
from opd_megatron.training.evaluator import evaluate_held_out
from opd_megatron.training.self_teacher import take_refresh
from opd_megatron.training.setup import Sources, make_router, make_sampler, make_scorer


def serve(config: RunConfig, sources: Sources, bridge: Bridge, device: torch.device) -> Literal["finished", "interrupted"]:
    """Score what the student's ranks send until they say how the run ended; first, for the self-test, with the student's own weights."""
    assert config.teacher is not None
    assert sources.teacher is not None
    groups = teacher_groups(config.teacher.layout)
    tests_others = config.teacher.self_test and not config.teacher.is_student
    for source in [sources.student] * tests_others + [sources.teacher]:
        status = _serve_weights(source, config, sources, groups, bridge, device)
    assert status is not None
    return status


def _serve_weights(
    source: WeightSource, config: RunConfig, sources: Sources, groups: ModelGroups, bridge: Bridge, device: torch.device
) -> Literal["finished", "interrupted"] | None:
    scorer = make_scorer(source, config, groups, device)
    router = make_router(source, config, bridge)
    while True:
        match bridge.told_by_student():
            case Score(rollouts=rollouts):
                courier = Courier(router, router.routes(rollouts), device)
                scorer.score(rollouts, courier.send, num_rounds=router.num_rounds)
                courier.finish()
            case Refresh() as message:
                take_refresh(message, scorer, config, source, bridge, device)
            case Evaluate():
                bridge.tell_student(_evaluate(scorer, config, sources))
            case Leave(status=status):
                if status == "refused":
                    # The student's ranks say why; this is their exit code.
                    raise SystemExit(2)
                return status


def _evaluate(scorer: Scorer, config: RunConfig, sources: Sources) -> dict[str, Any] | None:
    """Return the teacher's accuracy on the held-out prompts, on the teacher's first rank."""
    with scorer.on_device():
        return evaluate_held_out(make_sampler(scorer.model, scorer.groups, config, sources.teacher_text), config, sources, as_teacher=True)
