"""The pickle in a distributed checkpoint, read without running what somebody may have put into it.

torch's checkpoint format keeps its index in `.metadata`, a pickle, which torch loads as it is: whoever can write into a checkpoint could have it run anything
on every node that reads it. Here its classes are compared with those that an index is made of. Everything else in a checkpoint goes through `torch.load`, which
`opd_megatron.import_megatron` has read tensors and plain values alone.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_CHECKPOINT}.metadata": {
        *("Metadata", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex"),
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_CHECKPOINT}.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}
_TORCH = {"Size", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8", "uint8", "bool"}


class _Index(pickle.Unpickler):
    """Makes nothing but what an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if name in (_TORCH if module == "torch" else _ALLOWED.get(module, ())):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place in a checkpoint's index")


def check_index(file: Path) -> None:
    """Raise ValueError if the index of a distributed checkpoint is not one, or would run code; OSError if it cannot be read."""
    try:
        _Index(io.BytesIO(file.read_bytes())).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from None
