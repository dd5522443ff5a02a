"""Runs with EffOPD as tests see them: what every rank held before and after each search, and scores that are numbers of a script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.config import RunConfig, apply_overrides
from opd_megatron.models.modules import chosen_rows
from opd_megatron.models.weight_map import weight_map
from opd_megatron.models.weights import named_global_parameters
from opd_megatron.training.effopd import EffOPD, Search
from opd_megatron.training.search_scores import AnswerScore, Scored
from tests.runs import LAYOUTS, run_job, small_config, with_teacher

Tensors = dict[str, torch.Tensor]
# Scores for real, by the loss to the teacher, of candidates near enough that some are accepted and some are not.
REAL = ("effopd.score=divergence", "training.learning_rate=3e-4", "training.steps=7", "effopd.spacing=0.5")


def config_of(models: Path, layout: str | None, *overrides: str) -> tuple[RunConfig, int]:
    student, teacher, world_size = LAYOUTS[layout] if layout is not None else ({}, {}, 1)
    own = dict(teacher)
    config = with_teacher(small_config(models, **student), own.pop("own", None), **own)
    return apply_overrides(config, ["effopd.enabled=true", "effopd.prompts=6", *overrides]), world_size


@dataclass
class Seen:
    """What a rank held before and after each search, and what it decided."""

    before: list[Tensors] = field(default_factory=list)
    after: list[Tensors] = field(default_factory=list)
    masters: list[Tensors] = field(default_factory=list)
    moments: list[tuple[Tensors, Tensors]] = field(default_factory=list)
    searches: list[Search | None] = field(default_factory=list)


def whole_masters(search: EffOPD, key: str) -> Tensors:
    """Return fp32 numbers of the optimizer in whole slices: read straight from Megatron-Core, and added up over the replicas."""
    found = {}
    of = {}
    for part in search.student.optimizer.chained_optimizers:
        for parameter in part.model_param_group_index_map:
            of[parameter] = part._get_main_param_and_optimizer_states(parameter).get(key), part._get_model_param_range_map(parameter)["param"]
    for name, parameter in named_global_parameters(search.student.model, search.student.architecture):
        if not parameter.requires_grad:
            found[name] = parameter.detach().float().clone()
            continue
        flat = torch.zeros(parameter.numel())
        if parameter in of and of[parameter][0] is not None:
            numbers, owned = of[parameter]
            flat[owned.start : owned.end] = numbers.detach()
        expert = not getattr(parameter, "allreduce", True)
        dist.all_reduce(flat, group=search.student.groups.collection.expt_dp if expert else search.student.groups.collection.dp_cp)
        found[name] = flat.reshape(parameter.shape)
    return found


@contextmanager
def watched(seen: Seen, script: Callable[[int], Iterator[float]] | None = None) -> Iterator[None]:
    """Keep what each search does; with a script, the scores after a step are its numbers."""
    probe, begin = EffOPD.maybe_probe, AnswerScore.begin

    def parameters(search: EffOPD) -> Tensors:
        named = named_global_parameters(search.student.model, search.student.architecture)
        return {name: parameter.detach().clone() for name, parameter in named}

    def watch(self: EffOPD, step: int, should_stop: Callable[[], bool]) -> Search | None:
        if not self.is_pending(step):
            return probe(self, step, should_stop)
        with self.student.optimizer_on_device():
            before, moments = whole_masters(self, "param"), whole_masters(self, "exp_avg")
        seen.before.append(before)
        try:
            seen.searches.append(probe(self, step, should_stop))
        finally:
            with self.student.optimizer_on_device():
                seen.after.append(parameters(self))
                seen.masters.append(whole_masters(self, "param"))
                seen.moments.append((moments, whole_masters(self, "exp_avg")))
        return seen.searches[-1]

    def scripted(self: AnswerScore, step: int) -> Callable[[], Scored]:
        assert script is not None
        numbers = script(step)
        return lambda: Scored(next(numbers))

    EffOPD.maybe_probe = watch  # type: ignore[method-assign]
    if script is not None:
        AnswerScore.begin = scripted  # type: ignore[method-assign]
    try:
        yield
    finally:
        EffOPD.maybe_probe, AnswerScore.begin = probe, begin  # type: ignore[method-assign]


# Scores after steps 1, 2, 4 and 8, the first of each that of the weights before the search; and what is accepted.
SCRIPT = {1: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 2: [0.1, 0.2, 0.3, 0.3], 4: [0.5, 0.4], 8: [0.2, 0.3, 0.3]}
# An accepted one after an accepted one, and after a refused one: the anchor of either is used.
ACCEPTED = [5, 2, 0, 1]


def scripted_run(config: RunConfig, run: Path, script: dict[int, list[float]]) -> Seen:
    seen = Seen()
    with watched(seen, lambda step: iter(script[step])):
        run_job(config, run)
    return seen


def check_searches(seen: Seen, start: Tensors, accepted: list[int], moved: set[str], *, precision: torch.dtype = torch.float32) -> None:
    """Compare with the paper's rule on whole slices, bit for bit."""
    anchor = start
    assert [search.accepted_k for search in seen.searches if search is not None] == accepted
    for before, after, masters, k in zip(seen.before, seen.after, seen.masters, accepted, strict=True):
        for name, weight in before.items():
            expected = weight + 2 * k * (weight - anchor[name]) if k and name in moved else weight
            assert torch.equal(masters[name], expected), name
            assert torch.equal(after[name], expected.to(precision)), name
        anchor = masters


def start_of(config: RunConfig) -> Tensors:
    """Return this rank's weights of step 0, as its masters begin."""
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.groups import student_groups
    from opd_megatron.training.student import Student

    student = Student(config, open_weights(hf=config.student.hf), student_groups(config.student.layout, 1), torch.device("cpu"))
    return {name: parameter.detach().float().clone() for name, parameter in named_global_parameters(student.model, student.architecture)}


def moved_names(config: RunConfig, choice: str) -> set[str]:
    from opd_megatron.models.weights import open_weights

    return {row.name for row in chosen_rows(choice, weight_map(open_weights(hf=config.student.hf).architecture))}


def without_seconds(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "effopd.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
