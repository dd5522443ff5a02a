"""A Hugging Face folder -> a Megatron distributed checkpoint that any layout loads, written as torch's distributed checkpoints are, without a process group.

`dist_checkpointing.save` would hold the model: it wants all tensors before it writes the first. What it leaves behind is written here tensor by tensor:
`__0_N.distcp` with one torch.save after another, `.metadata` which says where each lies, `metadata.json` and an empty `common.pt`.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties, TensorStorageMetadata

from opd_megatron.conversion.convert import Part, convert, parts_of, stored_bytes
from opd_megatron.conversion.hashed_file import HashedFile
from opd_megatron.conversion.settings import Settings
from opd_megatron.conversion.unfinished import FinishedFile
from opd_megatron.conversion.workers import Workers
from opd_megatron.models.checkpoint_weights import ASSETS_FOLDER
from opd_megatron.models.hf_folder import copy_assets
from opd_megatron.models.hf_weights import refuse_non_finite
from opd_megatron.models.origin import write_origin
from opd_megatron.models.weight_map import MappedTensor, weight_map
from opd_megatron.models.weights import StoredWeights

# A 64th of the model, within these: enough files for many threads or nodes to read, and none that costs an hour to write again.
_MIN_PART_BYTES, _MAX_PART_BYTES, _PARTS = 256 << 20, 2 << 30, 64


def write_checkpoint(source: StoredWeights, out: Path, settings: Settings | None = None, *, max_part_bytes: int | None = None) -> None:
    """Write every weight in the source's dtype, the vocabulary unpadded, and beside them what is not weights; where it came from in `origin.json`.

    The folder appears whole or not at all; ValueError if it exists or cannot be written, or if the source is damaged.
    """
    convert(ToMegatron(source, max_part_bytes), out, settings or Settings())


class ToMegatron:
    """How a source becomes a checkpoint."""

    def __init__(self, source: StoredWeights, max_part_bytes: int | None = None) -> None:
        self.source = source
        rows = weight_map(source.architecture)
        total = sum(stored_bytes(source, row) for row in rows)
        limit = max_part_bytes or min(max(total // _PARTS, _MIN_PART_BYTES), _MAX_PART_BYTES)
        self.parts = parts_of(rows, lambda row: stored_bytes(source, row), limit, lambda number: f"__0_{number}.distcp")
        self.notes_digests = True
        self.options: dict[str, Any] = {"to": "megatron"}
        self.files_to_check = source.files

    def row_bytes(self, row: MappedTensor) -> int:
        return self.source.reading_bytes(row)

    def write(self, part: Part, file: HashedFile, workers: Workers) -> list[Any]:
        """Return [row, first byte, number of bytes] of each."""
        places = []
        for row in part.rows:
            with workers.memory(self.row_bytes(row)):
                start = file.position
                tensor = self.source.read(row).contiguous()
                refuse_non_finite(row, tensor)
                # A piece has as many dimensions as the tensor it is of.
                with file.own_errors():
                    torch.save(tensor if row.expert is None else tensor[None], cast(IO[bytes], file))
                places.append([row.name, start, file.position - start])
        return places

    def complete(self, folder: Path, finished: dict[str, FinishedFile], source_digests: dict[str, str]) -> None:
        copy_assets(self.source.assets, folder / ASSETS_FOLDER)
        _write_index(self.source, folder / ".metadata", finished)
        torch.save({}, folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        write_origin(folder, "convert_hf_to_megatron", source=str(self.source.path.resolve()), source_digests=source_digests)


def _write_index(source: StoredWeights, file: Path, finished: dict[str, FinishedFile]) -> None:
    """Write the index: of every tensor its shape, dtype and pieces, and of every piece where it lies."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    written = {name: _StorageInfo(part.name, start, length) for part in finished.values() for name, start, length in part.contents}
    for row in weight_map(source.architecture):
        stack = () if row.expert is None else (row.expert,)
        offsets = torch.Size([*stack, *(0 for _ in row.shape)])
        if row.megatron not in tensors:
            depth = () if source.architecture.experts is None or row.expert is None else (source.architecture.experts.num_experts,)
            properties = TensorProperties(dtype=source.dtype_of(row))
            tensors[row.megatron] = TensorStorageMetadata(properties=properties, size=torch.Size([*depth, *row.shape]), chunks=[])
        tensors[row.megatron].chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([*(1 for _ in stack), *row.shape])))
        storage[MetadataIndex(row.megatron, offsets)] = written[row.name]
    metadata = Metadata(state_dict_metadata={**tensors}, storage_data=storage, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    with file.open("wb") as stream:
        pickle.dump(metadata, stream)
        stream.flush()
        os.fsync(stream.fileno())
