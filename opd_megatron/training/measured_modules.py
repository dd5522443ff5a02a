"""`modules.train=measured`: a few steps are tried and taken back, and what hardly moved in them does not train.

Modules, one kind of tensor in one layer, are ranked by their update norm per parameter. The last ones, as long as they have together at most
`modules.freeze_share` of the squared norm of the whole update, are frozen. This is an extension of this project: EffOPD's paper (arXiv 2605.11739, Property 1)
only observes, after training, that updates concentrate in some modules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

from opd_megatron.config import RunConfig
from opd_megatron.data.prompts import PromptSet
from opd_megatron.parallel.world import agreed_by_rank_0
from opd_megatron.training.masters import ModuleUpdate, host_copy, master_shards, module_updates, put_back
from opd_megatron.training.setup import Parts


def measured_choice(
    config: RunConfig, parts: Parts, prompts: PromptSet, should_stop: Callable[[], bool], note: Callable[[str], None]
) -> tuple[str, list[ModuleUpdate]] | None:
    """Return what to train, as `modules.train` takes it, and the update of each module, in order; None if the ranks `should_stop` first.

    Every rank of the student calls it, before the first step; the weights are afterwards what they were. ValueError if the steps moved nothing, or not
    to finite numbers.
    """
    student = parts.student
    with student.optimizer_on_device():
        before = host_copy(master_shards(student, student.allocation.trained))
    try:
        for step in range(1, config.modules.probe_steps + 1):
            if should_stop():
                return None
            _train_step(config, parts, prompts, step)
        with student.optimizer_on_device():
            updates = module_updates(student, master_shards(student, student.allocation.trained), before, student.allocation.trained)
    finally:
        with student.optimizer_on_device():
            put_back(student, master_shards(student, student.allocation.trained), before)
        if student.average is not None:
            student.average.restart()
    ranked = sorted(updates, key=_norm_per_parameter, reverse=True)
    frozen = agreed_by_rank_0(frozen_modules(ranked, config.modules.freeze_share))
    note(_describe(config, ranked, frozen))
    return ",".join(f"!{module}" for module in frozen) or "all", ranked


def _train_step(config: RunConfig, parts: Parts, prompts: PromptSet, step: int) -> None:
    """One step as the run will make it, without a record."""
    rollouts = parts.align(parts.write(step, prompts.batch(step - 1, config.data.batch_prompts, config.seed), step - 1))
    micro_batches = parts.student.micro_batches(rollouts, parts.teacher.score(rollouts) if parts.teacher is not None else None)
    micro_batches, _ = parts.importance.weigh(parts.student, micro_batches, parts.objective, step)
    parts.student.train_step(micro_batches, parts.objective)


def frozen_modules(ranked: Sequence[ModuleUpdate], freeze_share: float) -> list[str]:
    """Return the names of the last of these modules that have together at most this share of the squared norm; ValueError without an update."""
    total = sum(update.squared_norm for update in ranked)
    if not math.isfinite(total) or total == 0:
        moved = "moved no weight" if total == 0 else "led to weights that are not finite"
        raise ValueError(f"modules.train=measured: its modules.probe_steps {moved}, so nothing can be ranked; lower training.learning_rate, or name modules")
    frozen: list[str] = []
    left = freeze_share * total
    for update in reversed(ranked):
        left -= update.squared_norm
        if left < 0:
            break
        frozen.append(update.module)
    return frozen


def _norm_per_parameter(update: ModuleUpdate) -> float:
    """The root mean square of a module's update."""
    return math.sqrt(update.squared_norm / update.num_parameters)


def _describe(config: RunConfig, ranked: Sequence[ModuleUpdate], frozen: Sequence[str]) -> str:
    numbers = sum(update.num_parameters for update in ranked)
    share = sum(update.num_parameters for update in ranked if update.module in frozen) / numbers
    total = sum(update.squared_norm for update in ranked)
    moved = sum(update.squared_norm for update in ranked if update.module in frozen) / total
    return (
        f"measured over {config.modules.probe_steps} steps: {len(frozen)} of {len(ranked)} modules do not train, {share:.1%} of the parameters "
        f"with {moved:.2%} of the squared update: {', '.join(frozen) or 'none'}"
    )


def as_json(choice: str, updates: Sequence[ModuleUpdate]) -> str:
    """Return what the run directory keeps of it."""
    rows = [{**asdict(update), "root_mean_square": _norm_per_parameter(update)} for update in updates]
    return json.dumps({"train": choice, "modules": rows}, indent=2) + "\n"
