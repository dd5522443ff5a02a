"""The weights of a distributed checkpoint as global Megatron tensors, one at a time, without process groups."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import IO, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from opd_megatron.models.damage import DAMAGE, damage_in
from opd_megatron.models.hf_folder import read_architecture
from opd_megatron.models.trusted_pickle import check_index
from opd_megatron.models.weight_map import MappedTensor, weight_map

# A checkpoint carries the Hugging Face files that are not weights here, so it knows its own architecture and tokenizer.
ASSETS_FOLDER = "huggingface"
# Megatron-Core keeps an optimizer's fp32 weights in the model's shapes, under the model's names after this.
_MASTERS = "optimizer.state.param."
# What a GPTModel calls its weights.
_WEIGHT = re.compile(r"(embedding|decoder|output_layer)\.")
# Where a checkpoint stacks its layers, their number is left out of the name.
_LAYER, _LAYERS = re.compile(r"decoder\.layers\.(\d+)\."), "decoder.layers."


class CheckpointWeights:
    """A distributed checkpoint of any layout, read without process groups; padded vocabulary rows are dropped.

    Its layers may have tensors of their own, as this project writes them, or be slices of one, as Megatron-LM stacks layers that are alike.
    `assets` is a Hugging Face folder with the configuration and tokenizer of a checkpoint that has none in it.
    """

    def __init__(self, path: Path, assets: Path | None = None) -> None:
        self.path = path
        self.assets = assets or path / ASSETS_FOLDER
        if not (path / "metadata.json").is_file() or not (path / ".metadata").is_file():
            raise ValueError(f"{path} is not a Megatron checkpoint: no metadata.json and .metadata in it")
        if assets is None and not self.assets.is_dir():
            raise ValueError(f"{path} has no {ASSETS_FOLDER}/ with configuration and tokenizer in it, as one of another program; name such a folder (--hf DIR)")
        self.architecture = read_architecture(self.assets)
        self._reader = dcp.FileSystemReader(path)
        check_index(path / ".metadata")
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            self._tensors = metadata.state_dict_metadata
            damage = damage_in_pieces(path, metadata)
            wrong = None if damage else self._wrong_contents()
        except DAMAGE as error:
            raise ValueError(f"{path / '.metadata'} is damaged: {damage_in(error)}") from None
        if damage:
            raise ValueError(f"{path} is damaged: {damage}")
        if wrong:
            raise ValueError(f"{path}: {wrong}")

    def _wrong_contents(self) -> str | None:
        """Every tensor the architecture needs is there with its shape, and no other: a checkpoint of another model is refused before it is read."""
        rows = weight_map(self.architecture)
        for row in rows:
            key, wanted = self._key(row), self._stored_shape(row)
            stored = self._tensors.get(key)
            shape = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else None
            fits = shape is not None and shape[1:] == wanted[1:] and (shape[0] == wanted[0] or (row.is_vocab and shape[0] > wanted[0]))
            if not fits:
                return f"{key} has shape {shape} where {self.assets / 'config.json'} implies {wanted}; another model's checkpoint?"
        # Beside the weights: optimizer state, averages, random states, what Transformer Engine keeps of a layer.
        weights = {
            key for key, stored in self._tensors.items() if isinstance(stored, TensorStorageMetadata) and _WEIGHT.match(key) and "_extra_state" not in key
        }
        unknown = sorted(weights - {self._key(row) for row in rows})
        if unknown:
            return f"{len(unknown)} weights have no place in the model of {self.assets / 'config.json'}, first {unknown[0]}; another model's checkpoint?"
        return None

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights, in the order in which a model needs them."""
        reads = (self._items(self._key(row), row) for row in weight_map(self.architecture))
        return list(dict.fromkeys(self.path / self._reader.storage_data[item.storage_index].relative_path for items in reads for item in items))

    def dtype_of(self, row: MappedTensor) -> torch.dtype:
        """Return the dtype that `read` gives a row."""
        return self._stored(self._key(row)).properties.dtype

    def reading_bytes(self, row: MappedTensor) -> int:
        """Return the memory that `read` takes at its peak, its result among it."""
        key = self._key(row)
        stored, whole = self._stored(key), math.prod(row.shape)
        chunks = {tuple(chunk.offsets): math.prod(chunk.sizes) for chunk in stored.chunks}
        pieces = [chunks[tuple(item.storage_index.offset or ())] for item in self._items(key, row)]
        return (max(pieces, default=0) + (0 if len(pieces) == 1 else whole)) * stored.properties.dtype.itemsize

    def read(self, row: MappedTensor) -> torch.Tensor:
        """Return one global Megatron tensor, or one expert's slice, in the dtype it is stored in; ValueError where its files are damaged.

        Only the stored pieces that hold it are read, and vocabulary padding is not.
        """
        return self._read(self._key(row), row)

    def read_exact(self, row: MappedTensor) -> torch.Tensor:
        """Return the same in fp32: of a run in bf16 the optimizer's master weight, where there is one, which training moves and `read` is a rounding of."""
        return self._read(self._key(row) if self.is_rounded(row) else self._exact_key(row), row).float()

    def is_rounded(self, row: MappedTensor) -> bool:
        """Whether only a rounding to 16 bits is stored: a converted model, or a tensor that did not train."""
        stored = self._tensors.get(self._exact_key(row))
        return not (isinstance(stored, TensorStorageMetadata) and stored.properties.dtype == torch.float32)

    def _exact_key(self, row: MappedTensor) -> str:
        key = self._key(row)
        return key if self._stored(key).properties.dtype == torch.float32 else _MASTERS + key

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self._tensors[key]
        assert isinstance(stored, TensorStorageMetadata)
        return stored

    def _key(self, row: MappedTensor) -> str:
        """Return the name of the stored tensor that holds a row."""
        stacked = _LAYER.sub(_LAYERS, row.megatron)
        return stacked if row.megatron not in self._tensors and stacked in self._tensors else row.megatron

    def _stack(self, row: MappedTensor) -> list[tuple[int, int]]:
        """Return (place, length) in each dimension that the stored tensor has before those of a row: layers, experts."""
        stack = []
        if (layer := _LAYER.match(row.megatron)) and self._key(row) != row.megatron:
            stack.append((int(layer[1]), self.architecture.num_layers))
        if row.expert is not None:
            assert self.architecture.experts is not None
            stack.append((row.expert, self.architecture.experts.num_experts))
        return stack

    def _stored_shape(self, row: MappedTensor) -> tuple[int, ...]:
        return (*(length for _, length in self._stack(row)), *row.shape)

    def _items(self, key: str, row: MappedTensor) -> list[ReadItem]:
        """Return which slices of which stored pieces make up a row."""
        stack = self._stack(row)
        start = [*(place for place, _ in stack), *(0 for _ in row.shape)]
        box = ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size([*(1 for _ in stack), *row.shape]))
        return create_read_items_for_chunk_list(key, self._stored(key), [box])

    def _read(self, key: str, row: MappedTensor) -> torch.Tensor:
        items = self._items(key, row)
        try:
            if len(items) == 1 and math.prod(items[0].lengths) == math.prod(row.shape):
                return self._read_piece(items[0]).reshape(row.shape)
            tensor = torch.empty([*(1 for _ in self._stack(row)), *row.shape], dtype=self._stored(key).properties.dtype)
            for item in items:
                narrow_tensor_by_index(tensor, item.dest_offsets, item.lengths).copy_(self._read_piece(item))
        except DAMAGE as error:
            raise ValueError(f"{self.path} is damaged: cannot read {row.name}: {damage_in(error)}") from None
        return tensor.reshape(row.shape)

    def _read_piece(self, item: ReadItem) -> torch.Tensor:
        """Return what a row needs of a stored piece, as torch's own reader would, which then copies it once more."""
        place = self._reader.storage_data[item.storage_index]
        with (self.path / place.relative_path).open("rb") as file:
            view = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
            stream = self._reader.transforms.transform_load_stream(item, place.transform_descriptors or (), view)
            piece = torch.load(stream if stream.seekable() else io.BytesIO(stream.read()), map_location="cpu", weights_only=True)
        if not isinstance(piece, torch.Tensor):
            raise TypeError(f"{place.relative_path} holds a {type(piece).__name__} there")
        return narrow_tensor_by_index(piece, item.storage_offsets, item.lengths)


def damage_in_pieces(folder: Path, index: Metadata) -> str | None:
    """Return which file of a checkpoint is missing, or ends before what the index says is in it; None if all are there."""
    ends: dict[str, int] = {}
    for place in index.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size < end:
            return f"{name} is cut: it has {size:,} bytes where the index needs {end:,}"
    return None
