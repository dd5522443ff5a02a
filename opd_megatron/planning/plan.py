"""A configuration -> every rank that differs from the others, and the largest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.config import RunConfig
from opd_megatron.planning.architectures import KnownModel, know_model
from opd_megatron.planning.memory import RankMemory, rank_memory
from opd_megatron.planning.messages import Message, rank_messages
from opd_megatron.planning.payload import step_payload
from opd_megatron.planning.ranks import plan_rank, ranks_to_plan
from opd_megatron.planning.step_shape import StepShape


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One model on the world."""

    role: str
    known: KnownModel
    layout: str
    data_size: int
    tensor: int
    picture: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Planned, not measured. `ranks` holds one rank of every pair of pipeline stages, `messages` what each of them sends."""

    config: RunConfig
    models: tuple[ModelPlan, ...]
    num_micro_batches: int
    payload_messages: int
    payload_bytes: int
    ranks: tuple[RankMemory, ...]
    messages: tuple[tuple[Message, ...], ...]

    @property
    def largest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.total_bytes)

    @property
    def shown(self) -> list[int]:
        """Return the places in `ranks` of the first, the middle, the last and the largest rank of the world."""
        wanted = {0, self.config.world_size // 2, self.config.world_size - 1, self.largest.rank}
        return [place for place, rank in enumerate(self.ranks) if rank.rank in wanted]


def make_plan(config: RunConfig, published: Sequence[Path]) -> Plan:
    """Return the plan of a run on `config.world_size` ranks; `published` are for models that are not here yet: `know_model`.

    Raises ValueError where the layouts do not fit the world or the models, and for a teacher on ranks of its own.
    """
    config.check_world(config.world_size)
    if config.num_teacher_ranks:
        raise ValueError("teacher.placement=dedicated is not planned yet; plan it as colocated or offloaded")
    student = know_model("student", config.student, published)
    teacher = know_model("teacher", config.teacher, published) if config.teacher is not None and config.training.objective == "opd" else None
    payload = step_payload(config)
    first = plan_rank(config, student, teacher, payload, rank=0)
    ranks = [first, *(plan_rank(config, student, teacher, payload, rank) for rank in ranks_to_plan(first)[1:])]
    return Plan(
        config=config,
        models=tuple(
            ModelPlan(
                role=role,
                known=model.known,
                layout=model.groups.layout.describe(),
                data_size=model.groups.data_size,
                tensor=model.groups.layout.tensor,
                picture=model.groups.picture(role),
            )
            for role, model in (("student", first.student), ("teacher", first.teacher))
            if model is not None
        ),
        num_micro_batches=StepShape(first).num_micro_batches,
        payload_messages=payload.num_messages,
        payload_bytes=payload.plan.sent_rows() * (teacher.architecture.hidden_size * first.student.dtype.itemsize if teacher else 0),
        ranks=tuple(rank_memory(rank) for rank in ranks),
        messages=tuple(tuple(rank_messages(rank)) for rank in ranks),
    )
