"""A Megatron checkpoint, or any source, -> a Hugging Face folder that transformers and vLLM load.

Names, shapes and dtypes follow from the weight map and the source's index, so that a safetensors file's header is written before its first tensor is read.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch

from opd_megatron.conversion.convert import Part, convert, parts_of
from opd_megatron.conversion.hashed_file import HashedFile
from opd_megatron.conversion.settings import Settings
from opd_megatron.conversion.source_check import with_recorded
from opd_megatron.conversion.unfinished import FinishedFile
from opd_megatron.conversion.workers import Workers
from opd_megatron.models.hf_folder import INDEX, copy_assets
from opd_megatron.models.hf_weights import STORED_DTYPES, bytes_of, refuse_non_finite
from opd_megatron.models.weight_map import MappedTensor, weight_map
from opd_megatron.models.weight_slices import to_hf
from opd_megatron.models.weights import StoredWeights

_DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
# A 16th of the model, within these: files that several threads write and loaders read at a time, none larger than transformers used to make them.
_MIN_SHARD_BYTES, MAX_SHARD_BYTES, _SHARDS = 1 << 30, 5 * 10**9, 16


def export_hf(
    source: StoredWeights,
    out: Path,
    settings: Settings | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    replace: bool = False,
) -> None:
    """Write a Hugging Face folder: safetensors with index, configuration, tokenizer files, checksums.

    `dtype=None` keeps the source's. The folder appears whole or not at all; ValueError if it exists and `replace` is not set, or if values are not finite.
    """
    convert(ToHF(source, dtype, max_shard_bytes), out, settings or Settings(), replace=replace)


class ToHF:
    """How a source becomes a Hugging Face folder."""

    def __init__(self, source: StoredWeights, dtype: torch.dtype | None = None, max_shard_bytes: int | None = None) -> None:
        self.source = source
        self._dtype = dtype
        rows = weight_map(source.architecture)
        limit = max_shard_bytes or min(max(sum(map(self._out_bytes, rows)) // _SHARDS, _MIN_SHARD_BYTES), MAX_SHARD_BYTES)
        parts = parts_of(rows, self._out_bytes, limit, str)
        # As transformers names them. Larger numbers first, as safetensors has them, so that each lies where its size divides its place.
        self.parts = [
            Part(_shard_name(number, len(parts)), tuple(sorted(part.rows, key=lambda row: -self._out_dtype(row).itemsize)), part.num_bytes)
            for number, part in enumerate(parts, 1)
        ]
        self.notes_digests = False
        self.options: dict[str, Any] = {"to": "hf", "dtype": str(dtype)}
        self.files_to_check = with_recorded(source.path, source.files)

    def _out_dtype(self, row: MappedTensor) -> torch.dtype:
        return self._dtype or self.source.dtype_of(row)

    def _out_bytes(self, row: MappedTensor) -> int:
        return sum(math.prod(shape) for shape in row.hf_shapes) * self._out_dtype(row).itemsize

    def row_bytes(self, row: MappedTensor) -> int:
        # A cast comes on top of what was read, and heads that lie side by side are parted into new tensors; rows of other kinds are parted where they lie.
        return self.source.reading_bytes(row) + self._out_bytes(row) * ((row.kind == "qkv") + (self._out_dtype(row) != self.source.dtype_of(row)))

    def write(self, part: Part, file: HashedFile, workers: Workers) -> list[Any]:
        """Return the names in the file."""
        entries, end = {}, 0
        for row in part.rows:
            for name, shape in zip(row.hf, row.hf_shapes, strict=True):
                start, end = end, end + math.prod(shape) * self._out_dtype(row).itemsize
                entries[name] = {"dtype": _DTYPE_NAMES[self._out_dtype(row)], "shape": list(shape), "data_offsets": [start, end]}
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        file.write(struct.pack("<Q", len(header)) + header)
        for row in part.rows:
            with workers.memory(self.row_bytes(row)):
                for name, tensor in self._converted(row).items():
                    assert entries[name]["shape"] == list(tensor.shape), f"{name} has shape {tuple(tensor.shape)}, not that of the weight map"
                    file.write(bytes_of(tensor.contiguous()))
        return list(entries)

    def _converted(self, row: MappedTensor) -> dict[str, torch.Tensor]:
        """Return the Hugging Face tensors of a row, in their order; ValueError for one that holds values which are not finite."""
        tensor = self.source.read(row)
        out = tensor.to(self._out_dtype(row))
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(out)):
            refuse_non_finite(row, tensor)
            raise ValueError(f"{row.name} holds values beyond what {str(self._dtype).removeprefix('torch.')} holds: name another --dtype")
        del tensor
        parts = to_hf(row, out, self.source.architecture)
        return {name: parts[name] for name in row.hf}

    def complete(self, folder: Path, finished: dict[str, FinishedFile], source_digests: dict[str, str]) -> None:
        """Write configuration, tokenizer files, and the index of several shards (`total_size` in bytes)."""
        copy_assets(self.source.assets, folder)
        if self._dtype is not None:
            _record_dtype(folder / "config.json", self._dtype)
        if len(self.parts) > 1:
            names = {name: part.name for part in self.parts for name in finished[part.name].contents}
            index = {"metadata": {"total_size": sum(part.num_bytes for part in self.parts)}, "weight_map": names}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shard_name(number: int, num_shards: int) -> str:
    return "model.safetensors" if num_shards == 1 else f"model-{number:05d}-of-{num_shards:05d}.safetensors"


def _record_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Write the exported dtype under the key the configuration already uses (transformers 4: torch_dtype, 5: dtype)."""
    config = json.loads(config_file.read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")
