"""Whether a run fits into the memory that its GPUs have free: the planner is asked before a weight is loaded. And what is said of too little in mid-run.

What it does not count (the CUDA context is there already; communication buffers, fragmentation) may still end a run whose plan just fits.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from opd_megatron.config import RunConfig
from opd_megatron.models.limits import planned_teacher_prompt
from opd_megatron.parallel.world import shared_errors
from opd_megatron.planning.architectures import KnownModel, find_model
from opd_megatron.planning.memory import RankMemory, rank_memory
from opd_megatron.planning.payload import step_payload
from opd_megatron.planning.ranks import plan_rank
from opd_megatron.planning.remedies import Catalogue, shortfall
from opd_megatron.planning.text import GIB
from opd_megatron.reporting.cause import out_of_memory
from opd_megatron.training.layouts import check_layouts
from opd_megatron.training.preflight import check_engine, check_recomputation


def make_catalogue(published: Sequence[Path], recipes: Mapping[str, Callable[[], RunConfig]]) -> Catalogue:
    """Return the ways out that a run would accept."""
    return Catalogue(published=published, recipes=recipes, check=lambda config: refuse_layouts(config, published))


def refuse_layouts(config: RunConfig, published: Sequence[Path]) -> None:
    """Raise ValueError where a run would refuse the layouts of `config`, with the nearest that it takes, its engine, or what it computes again."""
    student = find_model("student", config.student, published).architecture
    settings = config.teacher_source
    teacher = find_model("teacher", settings, published).architecture if settings is not None else None
    check_layouts(config, config.world_size, student, teacher)
    check_engine(config, student)
    check_recomputation(config.training, student)


def free_memory_message(
    config: RunConfig, rank: int, free_bytes: int, student: KnownModel, teacher: KnownModel | None, catalogue: Catalogue | None = None
) -> str | None:
    """Return None if `rank` of `config.world_size` is planned to fit into `free_bytes`, else the numbers and the ways out."""
    return shortfall(config, planned_memory(config, rank, student, teacher), free_bytes, catalogue or make_catalogue((), {}))


def planned_memory(config: RunConfig, rank: int, student: KnownModel, teacher: KnownModel | None) -> RankMemory:
    """Return what one rank of `config.world_size` is planned to hold."""
    prompt_tokens = planned_teacher_prompt(config, teacher.architecture) if teacher is not None else None
    return rank_memory(plan_rank(config, student, teacher, step_payload(config, prompt_tokens), rank))


def check_free_memory(
    config: RunConfig, student: KnownModel, teacher: KnownModel | None, free_bytes: int, catalogue: Catalogue | None, note: Callable[[str], None]
) -> None:
    """Raise ValueError, the same on every rank, if one of them is planned to need more than it has free; each rank of the job says what that is.

    The rank that lacks most looks for the ways out.
    """
    config = replace(config, world_size=dist.get_world_size())
    rank, memory = dist.get_rank(), planned_memory(config, dist.get_rank(), student, teacher)
    missing: list[int] = [0] * config.world_size
    dist.all_gather_object(missing, memory.total_bytes - free_bytes)
    with shared_errors():
        if max(missing) > 0 and rank == missing.index(max(missing)):
            message = free_memory_message(config, rank, free_bytes, student, teacher, catalogue)
            raise ValueError(f"too little GPU memory: {message}; training.check_memory=false begins all the same")
    note(f"memory: rank 0 is planned to need {memory.total_bytes / GIB:.1f} of {free_bytes / GIB:.1f} GiB free, at its peak in {memory.peak_phase}")


def free_gpu_bytes(device: torch.device) -> int:
    """Return this rank's even share of what its GPU has free: ranks that see the same GPU share it. Every rank of the job calls it."""
    # Not yet run on a GPU.
    free, _ = torch.cuda.mem_get_info(device)
    gpus: list[str] = [""] * dist.get_world_size()
    mine = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    dist.all_gather_object(gpus, mine)
    return free // gpus.count(mine)


@contextmanager
def naming_memory(doing: Callable[[], str]) -> Iterator[None]:
    """Have the error of a GPU without memory say what was done and what to turn. It stays a crash: steps before it are saved, and the run can go on."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(out_of_memory(doing(), str(error))) from error
