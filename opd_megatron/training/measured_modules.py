"""`modules.train=measured`: a few steps are tried and taken back, and what hardly moved in them does not train.

Modules, one kind of tensor in one layer, are ranked by their update norm per parameter. The last ones, as long as they have together at most
`modules.freeze_share` of the squared norm of the whole update, are frozen. This is an extension of this project: EffOPD's paper (arXiv 2605.11739, Property 1)
only observes, after training, that updates concentrate in some modules.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from opd_megatron.config import RunConfig
from opd_megatron.data.prompts import PromptSet
from opd_megatron.parallel.world import agreed_by_rank_0
from opd_megatron.training.masters import ModuleUpdate, host_copy, master_shards, module_updates, put_back
from opd_megatron.training.setup import Parts


@dataclass(frozen=True, kw_only=True)
class MeasuredChoice:
    """What a probe found: the choice as `modules.train` takes it, the modules it leaves out, the updates of all in order, and what it cost."""

    train: str
    frozen: tuple[str, ...]
    ranked: tuple[ModuleUpdate, ...]
    num_responses: int
    seconds: float

    def summary(self, config: RunConfig) -> str:
        """Return one line for the log."""
        numbers, total = (sum(getattr(update, name) for update in self.ranked) for name in ("num_parameters", "squared_norm"))
        left = [update for update in self.ranked if update.module in self.frozen]
        cost = f"({self.num_responses} responses, {self.seconds:.1f} s)"
        if not left:
            last = self.ranked[-1]
            return (
                f"measured over {config.modules.probe_steps} steps {cost}: everything trains, since {last.module}, which moved least per parameter, alone has "
                f"{last.squared_norm / total:.1%} of the squared update, more than modules.freeze_share={config.modules.freeze_share}"
            )
        share, moved = sum(update.num_parameters for update in left) / numbers, sum(update.squared_norm for update in left) / total
        return (
            f"measured over {config.modules.probe_steps} steps {cost}: {len(left)} of {len(self.ranked)} modules do not train, {share:.1%} of the parameters "
            f"with {moved:.2%} of the squared update: {', '.join(self.frozen)}"
        )

    def as_json(self) -> str:
        """Return what the run directory keeps of it."""
        rows = [{**asdict(update), "root_mean_square": _norm_per_parameter(update)} for update in self.ranked]
        return json.dumps({"train": self.train, "num_responses": self.num_responses, "seconds": self.seconds, "modules": rows}, indent=2) + "\n"


def measured_choice(config: RunConfig, parts: Parts, prompts: PromptSet, should_stop: Callable[[], bool], note: Callable[[str], None]) -> MeasuredChoice | None:
    """Return what to train; None if the ranks `should_stop` first, and then the run is over.

    Every rank of the student calls it, before the first step; the weights are afterwards what they were. ValueError if the steps moved nothing, or not
    to finite numbers.
    """
    student = parts.student
    with student.optimizer_on_device():
        before = host_copy(master_shards(student, student.allocation.trained))
    started, responses = time.perf_counter(), 0
    for step in range(1, config.modules.probe_steps + 1):
        if should_stop():
            return None
        responses += _train_step(config, parts, prompts, step)
    with student.optimizer_on_device():
        shards = master_shards(student, student.allocation.trained)
        updates = module_updates(student, shards, before, student.allocation.trained)
        put_back(student, shards, before)
    if student.average is not None:
        student.average.restart()
    ranked = sorted(updates, key=_norm_per_parameter, reverse=True)
    frozen = agreed_by_rank_0(frozen_modules(ranked, config.modules.freeze_share))
    measured = MeasuredChoice(
        train=",".join(f"!{module}" for module in frozen) or "all",
        frozen=tuple(frozen),
        ranked=tuple(ranked),
        num_responses=responses,
        seconds=time.perf_counter() - started,
    )
    note(measured.summary(config))
    return measured


def _train_step(config: RunConfig, parts: Parts, prompts: PromptSet, step: int) -> int:
    """Make one step as the run will make it, without a record; return how many responses it took."""
    rollouts = parts.align(parts.write(step, prompts.batch(step - 1, config.data.batch_prompts, config.seed), step - 1))
    micro_batches = parts.student.micro_batches(rollouts, parts.teacher.score(rollouts) if parts.teacher is not None else None)
    micro_batches, _ = parts.importance.weigh(parts.student, micro_batches, parts.objective, step)
    parts.student.train_step(micro_batches, parts.objective)
    return len(rollouts.samples)


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
