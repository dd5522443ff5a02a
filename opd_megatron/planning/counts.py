"""How many layers and parameters one rank holds of a model: by the rows of its weight map, without a model.

`tests/distributed/test_planned_memory.py` compares them with the models that ranks build.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from opd_megatron.config import ParallelLayout
from opd_megatron.models.architecture import Architecture
from opd_megatron.models.weight_map import EMBEDDING, HEAD, MappedTensor, weight_map
from opd_megatron.models.weight_slices import sliced_shape
from opd_megatron.parallel.layout import RankGrid

# A norm of queries or of keys sees the heads of its tensor rank.
_HEAD_NORM = re.compile("[qk]_layernorm")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


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


def count_rank(architecture: Architecture, grid: RankGrid, rank: int, *, vocab_multiple: int, trained: frozenset[str]) -> Counts:
    """Return what a global rank of the model's grid holds, of which the rows in `trained` train."""
    in_stage = (rank - grid.first_rank) % (grid.num_ranks // grid.layout.pipeline)
    expert_rank = in_stage // grid.layout.expert_tensor % grid.layout.expert
    return _count(architecture, grid.layout, grid.cell(rank).stage, expert_rank, vocab_multiple, trained)


@cache
def _count(architecture: Architecture, layout: ParallelLayout, stage: int, expert_rank: int, vocab_multiple: int, trained: frozenset[str]) -> Counts:
    padded = architecture.padded_vocab_size(layout.tensor, vocab_multiple)
    head = EMBEDDING if architecture.tied else HEAD
    chunks = [
        [_Held.of(row, layout, padded, trained) for row in _rows_of_chunk(architecture, layout, stage, chunk, expert_rank)] for chunk in range(layout.virtual)
    ]
    held = [row for chunk in chunks for row in chunk]
    training = [row for row in held if row.trains]
    return Counts(
        num_layers=architecture.num_layers // layout.pipeline,
        num_parameters=sum(row.num_parameters for row in held),
        num_trained=sum(row.num_parameters for row in training),
        num_trained_expert=sum(row.num_parameters for row in training if row.is_expert),
        num_trained_partial=sum(row.num_parameters for row in training if row.is_partial),
        num_trained_head=sum(row.num_parameters for row in training if row.name == head),
        num_trained_chunks=sum(any(row.trains and row.name != head and not row.is_expert for row in chunk) for chunk in chunks),
        num_trained_expert_chunks=sum(any(row.trains and row.is_expert for row in chunk) for chunk in chunks),
        num_expert_parameters=sum(row.num_parameters for row in held if row.is_expert),
    )


class _Held(NamedTuple):
    """What a rank holds of one row. `is_partial`: whole on every tensor rank, each of which sees only a part of what it is applied to."""

    name: str
    num_parameters: int
    trains: bool
    is_expert: bool
    is_partial: bool

    @classmethod
    def of(cls, row: MappedTensor, layout: ParallelLayout, padded_vocab: int, trained: frozenset[str]) -> _Held:
        name, is_expert = row.name, row.expert is not None
        num_parameters = math.prod(sliced_shape(row, layout.expert_tensor if is_expert else layout.tensor, padded_vocab))
        is_partial = layout.tensor > 1 and row.split_dim is None and not is_expert and (layout.sequence or bool(_HEAD_NORM.search(name)))
        return cls(name, num_parameters, name in trained, is_expert, is_partial)


def _rows_of_chunk(architecture: Architecture, layout: ParallelLayout, stage: int, chunk: int, expert_rank: int) -> list[MappedTensor]:
    """Return the rows that one chunk of a stage holds, whole or a slice; a tied head is a second copy of the embedding where the stages are several."""
    num_layers = architecture.num_layers // (layout.pipeline * layout.virtual)
    first = (chunk * layout.pipeline + stage) * num_layers
    is_first, is_last = (stage, chunk) == (0, 0), (stage, chunk) == (layout.pipeline - 1, layout.virtual - 1)
    layers, outside = _rows_by_layer(architecture)
    own_experts = range(0)
    if architecture.experts is not None:
        num_experts = architecture.experts.num_experts // layout.expert
        own_experts = range(expert_rank * num_experts, (expert_rank + 1) * num_experts)
    rows = [row for layer in range(first, first + num_layers) for row in layers[layer] if row.expert is None or row.expert in own_experts]
    if is_first:
        rows.append(outside[EMBEDDING])
    if is_last:
        rows += [row for name, row in outside.items() if name != EMBEDDING]
        if architecture.tied and not is_first:
            rows.append(outside[EMBEDDING])
    return rows


@cache
def _rows_by_layer(architecture: Architecture) -> tuple[list[list[MappedTensor]], dict[str, MappedTensor]]:
    """Return the rows of every layer, and those outside of the layers by name."""
    layers: list[list[MappedTensor]] = [[] for _ in range(architecture.num_layers)]
    outside: dict[str, MappedTensor] = {}
    for row in weight_map(architecture):
        if layer := _LAYER.match(row.megatron):
            layers[int(layer[1])].append(row)
        else:
            outside[row.name] = row
    return layers, outside
