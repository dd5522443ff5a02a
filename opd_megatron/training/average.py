"""The average of a model's weights over the steps, which teaches in place of the last ones (`teacher.weights=ema`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from opd_megatron.models.gpt import ModelChunks

_PREFIX = "teacher_average."


class MovingAverage:
    """a <- decay a + (1 - decay) w after every update, in fp32, of some of this rank's weights; the ranks of a job share all slices among them, each once."""

    def __init__(self, weights: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._weights = dict(weights)
        self._decay = decay
        self.tensors = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, tensor in self.tensors.items():
            tensor.lerp_(self._weights[name].float(), 1 - self._decay)

    def sharded_state(self, model: ModelChunks, state: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return what a checkpoint keeps of this rank's share, made of the model's own sharded `state`: names, shapes and places are the weights'."""
        owned = {id(weight): self.tensors[name] for name, weight in self._weights.items()}
        kept: list[dict[str, Any]] = []
        for chunk, entries in zip(model, state, strict=True):
            parameters = dict(chunk.named_parameters())
            kept.append({name: _copy_with(entry, owned[id(parameters[name])]) for name, entry in entries.items() if id(parameters.get(name)) in owned})
            add_prefix_for_sharding(kept[-1], _PREFIX)
        return kept

    def load_state(self, model: ModelChunks, state: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Take back what `sharded_state` described."""
        owned = {id(weight): self.tensors[name] for name, weight in self._weights.items()}
        for chunk, entries in zip(model, state, strict=True):
            parameters = dict(chunk.named_parameters())
            for name, tensor in entries.items():
                owned[id(parameters[name])].copy_(tensor)


def _copy_with(entry: ShardedTensor | ShardedTensorFactory, tensor: torch.Tensor) -> ShardedTensor | ShardedTensorFactory:
    """Return an entry of a sharded state with other values, of which this rank has the only copy."""
    entry.data, entry.replica_id = tensor, 0
    if isinstance(entry, ShardedTensor):
        entry.dtype = tensor.dtype
    return entry
