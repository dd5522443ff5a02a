"""Joining and leaving the job: ranks from torchrun or Slurm, the default process group, and errors every rank shares."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from opd_megatron.parallel.cpu import enable_cpu_backend
from opd_megatron.parallel.shared_gpu import send_through_host

T = TypeVar("T")

# Long enough for rank 0 to write a large export while the others wait; a dead peer is noticed by its closed connection.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=60)
# A rank that hangs is found by its own model's ranks; a teacher that waits for the student is no sign of one.
_WAITING_TIMEOUT = datetime.timedelta(days=2)


def rank_environment() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) from torchrun's variables, else Slurm's, else a world of one."""
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", "0"))
    return 0, 1, 0


def join_world() -> torch.device:
    """Initialize torch.distributed and return this rank's device: NCCL with CUDA; gloo without, and where ranks share a GPU."""
    rank, world_size, local_rank = rank_environment()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and world_size > 1:
        raise ValueError(f"{' and '.join(missing)} not set for a world of {world_size} ranks; start with torchrun, or export them: the first node, a free port")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if enable_cpu_backend():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
        return torch.device("cpu")
    local_size = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else None
    place = choose_gpu(local_rank, local_size, world_size, torch.cuda.device_count())
    device = torch.device("cuda", place.index)
    torch.cuda.set_device(device)
    if place.is_shared:
        send_through_host()
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=COLLECTIVE_TIMEOUT, device_id=device)
    return device


@dataclass(frozen=True, kw_only=True)
class GpuPlace:
    """Which of the GPUs that a rank sees it computes on, and whether another rank does as well."""

    index: int
    is_shared: bool


def choose_gpu(local_rank: int, local_size: int | None, world_size: int, num_gpus: int) -> GpuPlace:
    """Return a rank's GPU. `local_size` is how many ranks its node has, which torchrun and our launcher say and Slurm does not.

    A node with fewer GPUs than ranks is for checks: all of the job must be on it, since the other nodes' ranks could not know that these need gloo.
    """
    if local_size is None:
        if local_rank >= num_gpus > 1:
            raise ValueError(
                f"local rank {local_rank} has no GPU of its own: this node shows {num_gpus}; start as many tasks on it (--ntasks-per-node={num_gpus})"
            )
        # The only one is the task's own (srun --gpus-per-task=1).
        return GpuPlace(index=local_rank if num_gpus > 1 else 0, is_shared=False)
    if local_size > num_gpus and local_size != world_size:
        raise ValueError(
            f"{local_size} ranks on a node of {num_gpus} GPUs, in a job of {world_size}: ranks share a GPU only where all of them are on one node; "
            f"use --nproc-per-node {num_gpus}"
        )
    return GpuPlace(index=local_rank % num_gpus, is_shared=local_size > num_gpus)


def describe_device(device: torch.device) -> str:
    """Return one line for the log: on what the job's ranks compute, and by what they talk."""
    ranks = f"{dist.get_world_size()} ranks" if dist.get_world_size() > 1 else "1 rank"
    if device.type == "cpu":
        return f"device: {ranks} on the CPU, messages by gloo"
    name = torch.cuda.get_device_name(device)
    if "nccl" in dist.get_backend_config():
        return f"device: {ranks}, each on a GPU of its own ({name}), messages by NCCL"
    return f"device: {ranks} share {torch.cuda.device_count()} x {name}, messages by gloo through the host: for checks, its times mean nothing"


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """All ranks of the job, whichever model they serve. Where the models have ranks of their own, it is the only way between them."""

    group: dist.ProcessGroup
    rank: int
    student_ranks: range
    teacher_ranks: range

    def tell_teacher(self, message: Any) -> None:
        """Send the first student rank's message to the teacher's ranks; every student rank calls it."""
        dist.broadcast_object_list([message], src=self.student_ranks[0], group=self.group)

    def told_by_student(self) -> Any:
        """Return, on a rank of the teacher's own, what the student's ranks tell."""
        return self._receive(self.student_ranks[0])

    def tell_student(self, message: Any) -> None:
        """Send the first teacher rank's message to the student's ranks; every teacher rank calls it."""
        dist.broadcast_object_list([message], src=self.teacher_ranks[0], group=self.group)

    def told_by_teacher(self) -> Any:
        """Return, on a student rank, what the teacher's ranks tell."""
        return self._receive(self.teacher_ranks[0])

    def _receive(self, source: int) -> Any:
        messages = [None]
        dist.broadcast_object_list(messages, src=source, group=self.group)
        return messages[0]


def own_world() -> Bridge:
    """Return the ranks of this rank's world alone, inside `worlds`: those of the student, or those of a teacher that has its own."""
    group = dist.group.WORLD
    assert group is not None
    ranks = range(dist.get_world_size())
    return Bridge(group=group, rank=dist.get_rank(), student_ranks=ranks, teacher_ranks=ranks)


@contextmanager
def worlds(num_teacher_ranks: int) -> Iterator[Bridge]:
    """Give the teacher the last ranks of the job as a world of its own and the student the others; with 0, both share all ranks.

    Inside, the default process group is that of the own world, its ranks counted from 0: Megatron-Core calls collectives over the default group while it
    builds groups, optimizers and checkpoints, and would wait for the other model's ranks for ever.
    """
    everyone, size = dist.group.WORLD, dist.get_world_size()
    assert everyone is not None
    rank, num_student = dist.get_rank(), size - num_teacher_ranks
    if num_teacher_ranks == 0:
        yield Bridge(group=everyone, rank=rank, student_ranks=range(size), teacher_ranks=range(size))
        return
    # The teacher waits here while the student writes, trains and is evaluated.
    across = dist.new_group(list(range(size)), timeout=_WAITING_TIMEOUT)
    groups = [dist.new_group(list(ranks), timeout=COLLECTIVE_TIMEOUT) for ranks in (range(num_student), range(num_student, size))]
    distributed_c10d._update_default_pg(groups[rank >= num_student])
    try:
        yield Bridge(group=across, rank=rank, student_ranks=range(num_student), teacher_ranks=range(num_student, size))
    finally:
        distributed_c10d._update_default_pg(everyone)


def leave_world() -> None:
    """Destroy every process group of this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def shared_errors() -> Iterator[None]:
    """Raise on every rank the first ValueError or OSError that any rank met inside; a block without collectives.

    Every rank must enter. Without it, the ranks that met no error would wait for the others in the next collective.
    """
    error: str | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = str(caught)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, message in enumerate(errors):
        if message is not None:
            raise ValueError(message if error is not None or dist.get_rank() == rank else f"rank {rank}: {message}")


def agreed_by_rank_0(value: T) -> T:
    """Return rank 0's value on every rank: what a file system shows may differ between nodes for a while."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
