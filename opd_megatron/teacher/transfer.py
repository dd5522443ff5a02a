"""The student's weights on their way into another layout: the teacher's, where it is the student itself (`teacher.weights` live, ema), or a copy's that writes.

Row after row of the weight map, every rank has one tensor whole for a moment: its slices are broadcast by ranks that hold them, spread over the
replicas, and each rank keeps what its part of the other model needs. Any layout goes to any other; memory is that of the largest tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.gpt import ModelChunks
from opd_megatron.models.weight_map import EMBEDDING, HEAD, MappedTensor, weight_map
from opd_megatron.models.weight_slices import joined_slices, local_slice, sliced_shape, vocab_slice
from opd_megatron.models.weights import named_global_parameters
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.world import Bridge

# Takes one whole Megatron tensor, vocabulary unpadded.
Sink = Callable[[torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class HeldSlice:
    """A parameter of this rank, and which slice of its row it is."""

    parameter: torch.nn.Parameter
    place: int


def held_slices(model: ModelChunks, groups: ModelGroups, architecture: Architecture) -> dict[str, HeldSlice]:
    """Return {row name: slice} for every parameter of this rank; a tied embedding that the rank has once answers once."""
    rows = {row.name: row for row in weight_map(architecture)}
    held = {}
    for name, parameter in named_global_parameters(model, architecture):
        row = rows[name]
        place = 0 if row.split_dim is None else groups.tensor_rank if row.expert is None else groups.expert_tensor_rank
        held[name] = HeldSlice(parameter=parameter, place=place)
    return held


@dataclass(frozen=True, kw_only=True)
class WeightTransfer:
    """Who broadcasts which slice: `sources[row name][place]` are ranks of the job, all of the student. The same on every rank of the job."""

    architecture: Architecture
    bridge: Bridge
    sources: Mapping[str, tuple[int, ...]]
    padded_vocab: int
    dtype: torch.dtype
    device: torch.device

    def sent_from(self, rank: int) -> list[str]:
        """Return the rows of which a rank sends a slice."""
        return [name for name, ranks in self.sources.items() if rank in ranks]

    @property
    def num_broadcasts(self) -> int:
        return sum(map(len, self.sources.values()))

    def run(self, own: Callable[[str], torch.Tensor], sinks: Mapping[str, list[Sink]]) -> None:
        """Send every tensor to every rank; each passes those that it has sinks for on to them. `own` gives the slices that this rank sends."""
        for row in weight_map(self.architecture):
            sources = self.sources[row.name]
            slices = [self._broadcast(row, source, len(sources), own) for source in sources]
            if row.name in sinks:
                whole = joined_slices(row, slices)
                for sink in sinks[row.name]:
                    sink(whole)

    def _broadcast(self, row: MappedTensor, source: int, num_slices: int, own: Callable[[str], torch.Tensor]) -> torch.Tensor:
        if self.bridge.rank == source:
            piece = own(row.name).to(self.dtype, copy=True)
        else:
            piece = torch.empty(sliced_shape(row, num_slices, self.padded_vocab), dtype=self.dtype, device=self.device)
        dist.broadcast(piece, src=source, group=self.bridge.group)
        return piece


def choose_sources(architecture: Architecture, bridge: Bridge, held: Mapping[str, HeldSlice]) -> dict[str, tuple[int, ...]]:
    """Let all ranks of the student know who holds what, and choose a source of every slice: the holder with the least to send so far, large slices first."""
    places: list[dict[str, int]] = [{} for _ in bridge.student_ranks]
    dist.all_gather_object(places, {name: piece.place for name, piece in held.items()})
    rows = weight_map(architecture)
    holders: dict[str, dict[int, list[int]]] = {row.name: {} for row in rows}
    for rank, by_name in zip(bridge.student_ranks, places, strict=True):
        for name, place in by_name.items():
            holders[name].setdefault(place, []).append(rank)
    load = dict.fromkeys(bridge.student_ranks, 0)
    sources = {}
    for row in sorted(rows, key=lambda row: -math.prod(row.shape)):
        chosen = []
        for _, ranks in sorted(holders[row.name].items()):
            chosen.append(min(ranks, key=lambda rank: (load[rank], rank)))
            load[chosen[-1]] += math.prod(row.shape) // len(holders[row.name])
        sources[row.name] = tuple(chosen)
    return sources


def model_sinks(model: ModelChunks, groups: ModelGroups, architecture: Architecture, *, vocab_multiple: int) -> dict[str, list[Sink]]:
    """Return what fills this rank's part of a model."""
    rows = {row.name: row for row in weight_map(architecture)}
    padded = architecture.padded_vocab_size(groups.layout.tensor, vocab_multiple)

    def fill(row: MappedTensor, parameter: torch.nn.Parameter) -> Sink:
        """Return what copies this rank's slice of a row's whole tensor into a parameter."""
        rank, size = (groups.tensor_rank, groups.layout.tensor) if row.expert is None else (groups.expert_tensor_rank, groups.layout.expert_tensor)

        def sink(whole: torch.Tensor) -> None:
            parameter.data.copy_(local_slice(row, whole, tensor_rank=rank, tensor_size=size, padded_vocab=padded))

        return sink

    sinks: dict[str, list[Sink]] = {}
    for name, parameter in named_global_parameters(model, architecture):
        sinks.setdefault(name, []).append(fill(rows[name], parameter))
    return sinks


def head_sink(head_WG: torch.Tensor, groups: ModelGroups, architecture: Architecture, *, padded_vocab: int) -> dict[str, list[Sink]]:
    """Return what fills the teacher's head, cut as the student's vocabulary is."""

    def sink(whole_VG: torch.Tensor) -> None:
        head_WG.copy_(vocab_slice(whole_VG, tensor_rank=groups.tensor_rank, tensor_size=groups.layout.tensor, padded_vocab=padded_vocab))

    return {EMBEDDING if architecture.tied else HEAD: [sink]}


def joined(*parts: Mapping[str, list[Sink]]) -> dict[str, list[Sink]]:
    """Return the sinks of several models on one rank."""
    names: Iterator[str] = (name for part in parts for name in part)
    return {name: [sink for part in parts for sink in part.get(name, [])] for name in names}
