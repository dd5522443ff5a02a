"""A configuration -> every rank that differs from the others, and the largest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.config import RunConfig
from opd_megatron.models.gpt import DTYPES
from opd_megatron.models.limits import planned_teacher_prompt
from opd_megatron.parallel.layout import RankGrid
from opd_megatron.planning.architectures import KnownModel, know_model
from opd_megatron.planning.memory import RankMemory, rank_memory
from opd_megatron.planning.messages import Message, rank_messages
from opd_megatron.planning.payload import model_grids, step_payload
from opd_megatron.planning.ranks import plan_rank, ranks_to_plan
from opd_megatron.planning.step_shape import StepShape


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One model on the world."""

    role: str
    known: KnownModel
    grid: RankGrid

    @property
    def layout(self) -> str:
        return self.grid.layout.describe()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Planned, not measured. `ranks` holds one rank of every pair of pipeline stages, `messages` what each of them sends."""

    config: RunConfig
    models: tuple[ModelPlan, ...]
    num_micro_batches: int
    payload_messages: int
    # What reaches tensor groups from outside, and what their ranks then get from one another.
    payload_bytes: int
    payload_gathered_bytes: int
    ranks: tuple[RankMemory, ...]
    messages: tuple[tuple[Message, ...], ...]

    @property
    def largest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.total_bytes)

    @property
    def largest_of_each_kind(self) -> list[RankMemory]:
        """The largest of the ranks that hold a part of the student, and of those of the teacher's own where it has some."""
        kinds = ([rank for rank in self.ranks if (rank.student_stage is None) == own] for own in (False, True))
        return [max(ranks, key=lambda rank: rank.total_bytes) for ranks in kinds if ranks]

    @property
    def shown(self) -> list[int]:
        """Return the places in `ranks` of the first, the middle and the last rank of the world, and of the largest of each kind."""
        wanted = {0, self.config.world_size // 2, self.config.world_size - 1, *(rank.rank for rank in self.largest_of_each_kind)}
        return [place for place, rank in enumerate(self.ranks) if rank.rank in wanted]


def make_plan(config: RunConfig, published: Sequence[Path]) -> Plan:
    """Return the plan of a run on `config.world_size` ranks; `published` are for models that are not here yet: `know_model`.

    Raises ValueError where the layouts do not fit the world or the models.
    """
    config.check_world(config.world_size)
    student = know_model("student", config.student, published)
    teacher = know_model("teacher", config.teacher_source, published) if config.teacher_source is not None else None
    payload = step_payload(config, planned_teacher_prompt(config, teacher.architecture) if teacher is not None else None)
    row_bytes = teacher.architecture.hidden_size * DTYPES[config.training.precision].itemsize if teacher else 0
    ranks = [plan_rank(config, student, teacher, payload, rank) for rank in ranks_to_plan(config)]
    known = {"student": student, "rollout": student, "teacher": teacher}
    return Plan(
        config=config,
        models=tuple(ModelPlan(role=role, known=model, grid=grid) for role, grid in model_grids(config).items() if (model := known[role]) is not None),
        num_micro_batches=StepShape(ranks[0]).num_micro_batches,
        payload_messages=payload.num_messages,
        payload_bytes=payload.all_sent_rows() * row_bytes,
        payload_gathered_bytes=payload.all_gathered_rows() * row_bytes,
        ranks=tuple(rank_memory(rank) for rank in ranks),
        messages=tuple(tuple(rank_messages(rank)) for rank in ranks),
    )
