"""The fp32 numbers that the optimizer updates and model weights are rounded from: read, moved and copied shard by shard, without a message.

A data-parallel rank holds a flat piece of some tensors, as Megatron-Core's distributed optimizer cuts them. In fp32 the pieces are views of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.models.modules import module_of
from opd_megatron.models.weight_map import EMBEDDING, MappedTensor, weight_map
from opd_megatron.models.weights import named_global_parameters
from opd_megatron.training.student import Student


@dataclass(frozen=True, kw_only=True)
class MasterShard:
    """Numbers [start, stop) of this rank's slice of one tensor, flattened. `is_counted`: no other rank holds the same ones and says so."""

    row: MappedTensor
    parameter: torch.nn.Parameter
    start: int
    stop: int
    master: torch.Tensor
    is_counted: bool


def master_shards(student: Student, names: Collection[str]) -> list[MasterShard]:
    """Return this rank's pieces of the rows called `names` that train; they are valid inside `student.optimizer_on_device()`."""
    rows = {row.name: row for row in weight_map(student.architecture)}
    row_of = {parameter: rows[name] for name, parameter in named_global_parameters(student.model, student.architecture)}
    shards = []
    for part in student.optimizer.chained_optimizers:
        for parameter, (group, place) in part.model_param_group_index_map.items():
            if (row := row_of[parameter]).name not in names:
                continue
            owned = part._get_model_param_range_map(parameter)["param"]
            master = part.optimizer.param_groups[group]["params"][place]
            shards.append(
                MasterShard(row=row, parameter=parameter, start=owned.start, stop=owned.end, master=master, is_counted=_is_counted(student, row, parameter))
            )
    return shards


def _is_counted(student: Student, row: MappedTensor, parameter: torch.nn.Parameter) -> bool:
    """Return whether a sum over all ranks counts this rank's numbers: of what tensor ranks or two stages hold alike, the first one's."""
    if row.name == EMBEDDING and not any(parameter is own for own in _first_embedding(student)):
        return False
    return row.split_dim is not None or student.groups.tensor_rank == 0


def _first_embedding(student: Student) -> list[torch.nn.Parameter]:
    return [model.embedding.word_embeddings.weight for model in student.model if model.pre_process]


@torch.no_grad()
def host_copy(shards: list[MasterShard]) -> dict[str, torch.Tensor]:
    """Return the numbers of the shards, in fp32 in host memory, by row name."""
    return {shard.row.name: shard.master.detach().to("cpu", torch.float32, copy=True) for shard in shards}


@torch.no_grad()
def put_back(student: Student, shards: list[MasterShard], copy: Mapping[str, torch.Tensor]) -> None:
    """Set the shards to the numbers of a copy, and the model's weights on all ranks to them. Every rank calls it."""
    for shard in shards:
        shard.master.copy_(copy[shard.row.name])
    publish(student)


@torch.no_grad()
def publish(student: Student) -> None:
    """Round the masters into the model's weights and gather these over the data-parallel ranks, as after an update. Every rank calls it."""
    for part in student.optimizer.chained_optimizers:
        part._copy_main_params_to_model_params()
    for chunk in student.ddp:
        chunk.start_param_sync(force_sync=True)


@torch.no_grad()
def are_finite(student: Student, shards: list[MasterShard]) -> bool:
    """Return, the same on every rank, whether all masters of the shards and the weights that were rounded from them are finite numbers."""
    names = {shard.row.name for shard in shards}
    weights = [parameter for name, parameter in named_global_parameters(student.model, student.architecture) if name in names]
    finite = all(bool(tensor.isfinite().all()) for tensor in [*(shard.master for shard in shards), *weights])
    flag = torch.tensor([int(finite)], device=student.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


@dataclass(frozen=True, kw_only=True)
class ModuleUpdate:
    """How far one module went: the squared Frobenius norm of its update, and how many numbers it has."""

    module: str
    squared_norm: float
    num_parameters: int


@torch.no_grad()
def module_updates(student: Student, shards: list[MasterShard], since: Mapping[str, torch.Tensor], names: Collection[str]) -> list[ModuleUpdate]:
    """Return the update of every module since a copy was made, of the rows called `names`, whose shards these are; the same on every rank.

    A number that is not finite makes its module's norm not finite.
    """
    rows = [row for row in weight_map(student.architecture) if row.name in names]
    counts: dict[str, int] = {}
    for row in rows:
        counts[module_of(row)] = counts.get(module_of(row), 0) + math.prod(row.shape)
    places = {module: place for place, module in enumerate(counts)}
    squares_M = torch.zeros(len(places), dtype=torch.float64, device=student.device)
    for shard in shards:
        if shard.is_counted:
            update = shard.master.detach().double() - since[shard.row.name].to(student.device).double()
            squares_M[places[module_of(shard.row)]] += update.square().sum()
    dist.all_reduce(squares_M)
    return [ModuleUpdate(module=module, squared_norm=norm, num_parameters=counts[module]) for module, norm in zip(places, squares_M.tolist(), strict=True)]


@torch.no_grad()
def whole_slices(
    student: Student, names: Collection[str], shards: list[MasterShard], numbers: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (row name, fp32 tensor in host memory) of what was copied from shards, put together to this rank's whole slices, one at a time.

    Every rank calls it and takes all; the copies of a slice get the same.
    """
    owned = {shard.row.name: shard for shard in shards}
    for name, parameter in named_global_parameters(student.model, student.architecture):
        if name not in names:
            continue
        flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=student.device)
        if name in owned:
            flat[owned[name].start : owned[name].stop] = numbers[name].to(student.device)
        is_expert = not getattr(parameter, "allreduce", True)
        # Each number is one rank's; zeros are added to it.
        dist.all_reduce(flat, group=student.groups.collection.expt_dp if is_expert else student.groups.collection.dp_cp)
        yield name, flat.reshape(parameter.shape).cpu()
