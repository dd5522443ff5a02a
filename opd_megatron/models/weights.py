"""Weights in: a Hugging Face folder or a Megatron distributed checkpoint -> this rank's model.

Both sources give the same thing, global Megatron tensors by name, one at a time, so memory stays at one tensor beside the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.checkpoint_weights import CheckpointWeights
from opd_megatron.models.gpt import ModelChunks
from opd_megatron.models.hf_folder import open_hf_folder
from opd_megatron.models.hf_weights import HFWeights
from opd_megatron.models.weight_map import EMBEDDING, HEAD, MappedTensor, name_in_layer, weight_map
from opd_megatron.models.weight_slices import local_slice, vocab_slice
from opd_megatron.parallel.groups import ModelGroups


class WeightSource(Protocol):
    """Where a model's weights come from."""

    architecture: Architecture
    assets: Path

    def read(self, row: MappedTensor) -> torch.Tensor:
        """Return one global Megatron tensor, vocabulary unpadded."""
        ...


class StoredWeights(WeightSource, Protocol):
    """A source on disk, which can be converted: what reading it takes is known before it is read."""

    path: Path

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights, in the order in which a model needs them."""
        ...

    def dtype_of(self, row: MappedTensor) -> torch.dtype:
        """Return the dtype that `read` gives a row."""
        ...

    def reading_bytes(self, row: MappedTensor) -> int:
        """Return the memory that `read` takes at its peak, its result among it."""
        ...


def open_weights(*, hf: str | None = None, checkpoint: str | None = None) -> StoredWeights:
    """Return the source named by exactly one of the two paths; ValueError if it is not whole or not understood."""
    if hf:
        return HFWeights(open_hf_folder(hf))
    assert checkpoint is not None
    return CheckpointWeights(Path(checkpoint))


def load_model(model: ModelChunks, groups: ModelGroups, source: WeightSource, *, vocab_multiple: int) -> None:
    """Copy this rank's slice of every weight into the model, in the model's dtype."""
    architecture = source.architecture
    rows = {row.name: row for row in weight_map(architecture)}
    padded = architecture.padded_vocab_size(groups.layout.tensor, vocab_multiple)
    with torch.no_grad():
        for name, parameter in named_global_parameters(model, architecture):
            row = rows[name]
            rank, size = (groups.tensor_rank, groups.layout.tensor) if row.expert is None else (groups.expert_tensor_rank, groups.layout.expert_tensor)
            parameter.copy_(local_slice(row, source.read(row), tensor_rank=rank, tensor_size=size, padded_vocab=padded))


def named_global_parameters(model: Iterable[GPTModel], architecture: Architecture) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield every parameter of this rank with the name of its row in the weight map; a tied head answers to the embedding's."""
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if name == HEAD and architecture.tied:
                name = EMBEDDING
            local = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
            if local:
                layer = chunk.decoder.layers[int(local[1])]
                local_experts = layer.mlp.local_expert_indices if architecture.experts else []
                name = f"decoder.layers.{layer.layer_number - 1}.{name_in_layer(local[2], architecture, local_experts)}"
            yield name, parameter


def load_head_slice(source: WeightSource, groups: ModelGroups, *, padded_vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows [W, G] of a source's LM head for this rank of another model's tensor group, padded as that model pads."""
    piece = vocab_slice(_read_head(source), tensor_rank=groups.tensor_rank, tensor_size=groups.layout.tensor, padded_vocab=padded_vocab)
    return piece.to(dtype=dtype, copy=True)


def load_head_rows(source: WeightSource, ids_C: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows [C, G] of a source's LM head for these ids, in their order."""
    return _read_head(source)[ids_C].to(dtype)


def _read_head(source: WeightSource) -> torch.Tensor:
    name = EMBEDDING if source.architecture.tied else HEAD
    return source.read(next(row for row in weight_map(source.architecture) if row.megatron == name))
