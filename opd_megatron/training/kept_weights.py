"""Tensors beside the weights, in their shapes, in a checkpoint that any layout loads: the average of the weights, EffOPD's anchor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from opd_megatron.models.gpt import ModelChunks

Slices = Mapping[torch.nn.Parameter, torch.Tensor]


def sharded_beside(model: ModelChunks, state: Sequence[Mapping[str, Any]], slices: Slices, prefix: str, *, only_copy: bool) -> dict[str, Any]:
    """Return what a checkpoint keeps of slices of this rank, made of the model's own sharded `state`, which is changed: its names, shapes and places.

    With `only_copy` no other rank gives the same slice; otherwise the copies are told apart as those of the weights are.
    """
    kept: dict[str, Any] = {}
    for number, (chunk, entries) in enumerate(zip(model, state, strict=True)):
        parameters = dict(chunk.named_parameters())
        chosen = {name: _with(entry, slices[parameters[name]], only_copy) for name, entry in entries.items() if parameters.get(name) in slices}
        add_prefix_for_sharding(chosen, prefix)
        kept |= {f"{number} {name}": entry for name, entry in chosen.items()}
    return kept


def loaded_beside(model: ModelChunks, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield (parameter, slice) of what `sharded_beside` described, after a load."""
    parameters = {f"{number} {name}": parameter for number, chunk in enumerate(model) for name, parameter in chunk.named_parameters()}
    for key, tensor in state.items():
        yield parameters[key], tensor


def _with(entry: ShardedTensor | ShardedTensorFactory, tensor: torch.Tensor, only_copy: bool) -> ShardedTensor | ShardedTensorFactory:
    """Return an entry of a sharded state with other values."""
    entry.data = tensor
    if only_copy:
        entry.replica_id = 0
    if isinstance(entry, ShardedTensor):
        entry.dtype = tensor.dtype
    return entry
