"""One rank of a job of any size, without the job: the project's own groups over a fake backend, its own models on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from opd_megatron.config import ModulesConfig, ParallelLayout, RunConfig
from opd_megatron.models.allocation import Allocation
from opd_megatron.models.architecture import Architecture
from opd_megatron.models.gpt import DTYPES, build_gpt
from opd_megatron.models.weight_map import EMBEDDING, HEAD
from opd_megatron.models.weights import named_global_parameters
from opd_megatron.parallel.cpu import enable_cpu_backend
from opd_megatron.parallel.groups import ModelGroups, forget_student_groups, student_groups, teacher_groups
from opd_megatron.parallel.layout import RankGrid
from opd_megatron.planning.architectures import KnownModel
from opd_megatron.planning.payload import Payload, model_grids

# A norm of queries or of keys sees the heads of its tensor rank.
_HEAD_NORM = re.compile("[qk]_layernorm")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What one rank holds of a model: layers, and parameters."""

    num_layers: int
    num_parameters: int
    # Those that train (`modules.train`; of `measured`, which is not known before, all), and of them ...
    num_trained: int
    # ... those of experts, whose copies are on other ranks than those of the other parameters,
    num_trained_expert: int
    # those that are whole on every tensor rank, each of which has only a part of their gradient,
    num_trained_partial: int
    # and those of the head, or of the embedding that is it.
    num_trained_head: int
    # Chunks of the pipeline with a parameter that trains and is none of the above ones of experts or of the head, and with one of experts.
    num_trained_chunks: int
    num_trained_expert_chunks: int
    # All of experts.
    num_expert_parameters: int


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
    """Return what `rank` of `config.world_size` ranks builds; tenths of a second, whatever the size of the world, and seconds for a new mixture of experts."""
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
    """Return a model as `rank` of the job holds it, in the world of the model's own ranks; None where it holds nothing of it."""
    if rank not in grid.ranks:
        return None
    precision = config.training.precision
    with _fake_world(rank - grid.first_rank, grid.num_ranks), _on_meta_device():
        groups = student_groups(grid.layout, config.seed) if role == "student" else teacher_groups(grid.layout)
        vocab_multiple, train = (config.student.vocab_multiple, config.modules) if role == "student" else (1, ModulesConfig())
        counts = _count(known.architecture, groups, precision, vocab_multiple, Allocation.of(train, known.architecture).trained)
    return PlannedModel(known=known, groups=groups, counts=counts, dtype=DTYPES[precision])


# Of what was built before, whatever the world was: thousands of experts take seconds to build.
_counted: dict[tuple[Architecture, ParallelLayout, int, str, int, frozenset[str]], Counts] = {}


def _count(architecture: Architecture, groups: ModelGroups, precision: Literal["bf16", "fp32"], vocab_multiple: int, trained: frozenset[str]) -> Counts:
    """Return the counts of the model that a rank with these groups builds."""
    key = (architecture, groups.layout, groups.stage, precision, vocab_multiple, trained)
    if key not in _counted:
        model = build_gpt(architecture, groups, precision=precision, vocab_multiple=vocab_multiple)
        chunks = [list(named_global_parameters([chunk], architecture)) for chunk in model]
        parameters = [pair for chunk in chunks for pair in chunk]
        training = [(name, parameter) for name, parameter in parameters if name in trained]
        head = EMBEDDING if architecture.tied else HEAD

        def numbers(chosen: Iterable[tuple[str, torch.nn.Parameter]]) -> int:
            return sum(parameter.numel() for _, parameter in chosen)

        def is_partial(name: str, parameter: torch.nn.Parameter) -> bool:
            return groups.layout.tensor > 1 and (getattr(parameter, "sequence_parallel", False) or bool(_HEAD_NORM.search(name)))

        def is_expert(parameter: torch.nn.Parameter) -> bool:
            return not getattr(parameter, "allreduce", True)

        _counted[key] = Counts(
            num_layers=sum(len(chunk.decoder.layers) for chunk in model),
            num_parameters=numbers(parameters),
            num_trained=numbers(training),
            num_trained_expert=numbers(pair for pair in training if is_expert(pair[1])),
            num_trained_partial=numbers(pair for pair in training if is_partial(*pair)),
            num_trained_head=numbers(pair for pair in training if pair[0] == head),
            num_trained_chunks=sum(any(name in trained and name != head and not is_expert(parameter) for name, parameter in chunk) for chunk in chunks),
            num_trained_expert_chunks=sum(any(name in trained and is_expert(parameter) for name, parameter in chunk) for chunk in chunks),
            num_expert_parameters=numbers(pair for pair in parameters if is_expert(pair[1])),
        )
    return _counted[key]


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


@contextmanager
def _fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a world whose other ranks do not exist; no collective in it means anything."""
    assert not dist.is_initialized(), "a planner is no rank of a job"
    enable_cpu_backend()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        forget_student_groups()
        dist.destroy_process_group()


@contextmanager
def _on_meta_device() -> Iterator[None]:
    """Give tensors shapes and no memory, also those that Megatron-Core creates on the current CUDA device."""
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = current_device
