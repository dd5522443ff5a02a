"""The tensors of one row of the weight map: made of Hugging Face's parts and taken apart again, cut for tensor ranks and joined.

Shapes: V vocabulary, H hidden, W one rank's slice of the padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.weight_map import MappedTensor


def to_megatron(row: MappedTensor, parts: list[torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """Return the global Megatron tensor made of its Hugging Face tensors; ValueError if one has another shape than the config says."""
    for name, part, shape in zip(row.hf, parts, row.hf_shapes, strict=True):
        if tuple(part.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(part.shape)} where config.json implies {shape}")
    if row.kind == "qkv":
        if len(parts) == 1:
            parts = list(parts[0].split([shape[0] for shape in row.part_shapes]))
        # Megatron keeps each key-value group together: [its query heads, its key head, its value head].
        groups = architecture.num_kv_heads
        return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def to_hf(row: MappedTensor, tensor: torch.Tensor, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Return the Hugging Face tensors of a global Megatron tensor; the inverse of `to_megatron`."""
    if row.kind == "qkv":
        groups = architecture.num_kv_heads
        sizes = [shape[0] // groups for shape in row.part_shapes]
        split = tensor.reshape(groups, -1, *tensor.shape[1:]).split(sizes, dim=1)
        parts = [part.flatten(0, 1) for part in split]
        if len(row.hf) == 1:
            parts = [torch.cat(parts)]
    else:
        parts = list(tensor.split([shape[0] for shape in row.hf_shapes]))
    return {name: part.contiguous() for name, part in zip(row.hf, parts, strict=True)}


def local_slice(row: MappedTensor, tensor: torch.Tensor, *, tensor_rank: int, tensor_size: int, padded_vocab: int) -> torch.Tensor:
    """Return what one tensor-parallel rank holds of a global tensor; vocabulary rows are padded with zeros first."""
    if row.split_dim is None:
        return tensor
    if row.is_vocab:
        return vocab_slice(tensor, tensor_rank=tensor_rank, tensor_size=tensor_size, padded_vocab=padded_vocab)
    if row.kind == "gate_up":
        return torch.cat([half.chunk(tensor_size)[tensor_rank] for half in tensor.chunk(2)])
    return tensor.chunk(tensor_size, dim=row.split_dim)[tensor_rank]


def vocab_slice(tensor_VH: torch.Tensor, *, tensor_rank: int, tensor_size: int, padded_vocab: int) -> torch.Tensor:
    """Return one rank's rows [W, H] of a vocabulary matrix, zeros where the padding lies."""
    width = padded_vocab // tensor_size
    rows = tensor_VH[tensor_rank * width : (tensor_rank + 1) * width]
    if rows.size(0) == width:
        return rows
    return torch.cat([rows, rows.new_zeros(width - rows.size(0), rows.size(1))])


def sliced_shape(row: MappedTensor, tensor_size: int, padded_vocab: int) -> tuple[int, ...]:
    """Return the shape of what one of `tensor_size` ranks holds of a tensor."""
    shape = [padded_vocab, *row.shape[1:]] if row.is_vocab else list(row.shape)
    if row.split_dim is not None:
        shape[row.split_dim] //= tensor_size
    return tuple(shape)


def joined_slices(row: MappedTensor, slices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the global tensor of the slices of all tensor ranks; the inverse of `local_slice`, without the padding of a vocabulary."""
    if row.split_dim is None:
        return slices[0]
    if row.kind == "gate_up":
        halves = [piece.chunk(2) for piece in slices]
        return torch.cat([half for side in range(2) for half in (pair[side] for pair in halves)])
    whole = torch.cat(list(slices), dim=row.split_dim)
    return whole[: row.shape[0]] if row.is_vocab else whole
