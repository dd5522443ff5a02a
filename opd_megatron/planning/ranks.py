"""One rank of a job of any size, without the job: its place in the grids of both models, and what it holds of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from opd_megatron.config import ModulesConfig, RunConfig
from opd_megatron.models.allocation import Allocation
from opd_megatron.models.gpt import DTYPES
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.layout import RankGrid
from opd_megatron.planning.architectures import KnownModel
from opd_megatron.planning.counts import Counts, count_rank
from opd_megatron.planning.payload import Payload, model_grids


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """One model as one rank holds it."""

    known: KnownModel
    groups: ModelGroups
    counts: Counts
    dtype: torch.dtype

    @property
    def num_expert_copies(self) -> int:
        """Ranks of a stage that hold the same experts."""
        return self.groups.grid.expert_shape["expt_dp"]


@dataclass(frozen=True, kw_only=True)
class PlannedRank:
    """What one rank holds of both models, None of one that is elsewhere, and what all ranks exchange; without a teacher `teacher_known` is None."""

    rank: int
    config: RunConfig
    payload: Payload
    student_known: KnownModel
    teacher_known: KnownModel | None
    student: PlannedModel | None
    # The copy of the student that writes, where `rollout.layout` is another one.
    copy: PlannedModel | None
    teacher: PlannedModel | None

    @property
    def writing(self) -> PlannedModel | None:
        """The student as it writes."""
        return self.copy or self.student

    @property
    def padded_vocab(self) -> int:
        return self.student_known.architecture.padded_vocab_size(self.config.student.layout.tensor, self.config.student.vocab_multiple)

    @property
    def student_columns(self) -> int:
        """Rows of the student's head on a rank of its tensor group."""
        return self.padded_vocab // self.config.student.layout.tensor

    @property
    def teacher_columns(self) -> int:
        """Rows of the teacher's head there: as many, or of a vocabulary of its own an even share (`align.rows`)."""
        if self.config.alignment.is_identity or self.teacher_known is None:
            return self.student_columns
        return -(-self.teacher_known.architecture.vocab_size // self.config.student.layout.tensor)


def plan_rank(config: RunConfig, student: KnownModel, teacher: KnownModel | None, payload: Payload, rank: int) -> PlannedRank:
    """Return what `rank` of `config.world_size` ranks builds."""
    grids = model_grids(config)
    return PlannedRank(
        rank=rank,
        config=config,
        payload=payload,
        student_known=student,
        teacher_known=teacher,
        student=_plan_model(config, "student", student, grids["student"], rank),
        copy=_plan_model(config, "rollout", student, grids["rollout"], rank) if "rollout" in grids else None,
        teacher=_plan_model(config, "teacher", teacher, grids["teacher"], rank) if teacher is not None else None,
    )


def _plan_model(config: RunConfig, role: str, known: KnownModel, grid: RankGrid, rank: int) -> PlannedModel | None:
    """Return a model as `rank` of the job holds it; None where it holds nothing of it."""
    if rank not in grid.ranks:
        return None
    vocab_multiple, train = (config.student.vocab_multiple, config.modules) if role == "student" else (1, ModulesConfig())
    trained = Allocation.of(train, known.architecture).trained
    return PlannedModel(
        known=known,
        # A plan sends nothing.
        groups=ModelGroups(grid=grid, cell=grid.cell(rank), collection=ProcessGroupCollection()),
        counts=count_rank(known.architecture, grid, rank, vocab_multiple=vocab_multiple, trained=trained),
        dtype=DTYPES[config.training.precision],
    )


def ranks_to_plan(config: RunConfig) -> list[int]:
    """Return the first, the middle and the last rank of the world, and one rank of every other kind: they differ by what stages they are of both models.

    On a last stage the context ranks differ as well, by how many scored positions they hold.
    """
    grids, world_size = model_grids(config).values(), config.world_size
    chosen: dict[tuple[tuple[int, int] | None, ...], int] = {}
    for rank in (0, world_size // 2, world_size - 1, *range(world_size)):
        chosen.setdefault(tuple(_kind(grid, rank) for grid in grids), rank)
    return sorted({0, world_size // 2, world_size - 1, *chosen.values()})


def _kind(grid: RankGrid, rank: int) -> tuple[int, int] | None:
    if rank not in grid.ranks:
        return None
    cell = grid.cell(rank)
    return cell.stage, cell.context if cell.stage == grid.layout.pipeline - 1 else 0
