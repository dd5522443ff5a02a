"""The weights of a Hugging Face folder as global Megatron tensors, one at a time."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, cast

import torch

from opd_megatron.models.damage import DAMAGE, damage_in
from opd_megatron.models.hf_folder import HFFolder, StoredTensor
from opd_megatron.models.weight_map import EMBEDDING, MappedTensor, weight_map
from opd_megatron.models.weight_slices import to_megatron

# Buffers that old checkpoints of these families store and no model needs.
_IGNORED_HF = re.compile(r"rotary_emb\.inv_freq$")
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HFWeights:
    """A Hugging Face folder. Tensors the model needs must be there with the shapes it needs, and tensors it does not know are refused."""

    def __init__(self, folder: HFFolder) -> None:
        self.architecture = folder.architecture
        self.path = self.assets = folder.path
        self._tensors = folder.tensors
        self._check_contents()
        # Megatron keeps in one tensor what a folder may store in several dtypes: query, key and value, or the experts of a layer.
        self._dtypes: dict[str, torch.dtype] = {}
        for row in weight_map(self.architecture):
            for name in row.hf:
                stored = STORED_DTYPES[folder.tensors[name].dtype]
                self._dtypes[row.megatron] = torch.promote_types(self._dtypes.get(row.megatron, stored), stored)

    def _check_contents(self) -> None:
        family = self.architecture.family
        shapes = {name: shape for row in weight_map(self.architecture) for name, shape in zip(row.hf, row.hf_shapes, strict=True)}
        missing = sorted(shapes.keys() - self._tensors.keys())
        # Some exporters write the tied head a second time.
        known = shapes.keys() | ({self._head_copy} if self.architecture.tied else set())
        unknown = sorted(name for name in self._tensors.keys() - known if not _IGNORED_HF.search(name))
        if missing:
            raise ValueError(f"{self.path}: {len(missing)} tensors of a {family} model are missing, first {missing[0]!r}")
        if unknown:
            where = self._tensors[unknown[0]].file.name
            raise ValueError(f"{self.path}: {len(unknown)} tensors are unknown to a {family} model, first {unknown[0]!r} in {where}")
        for name, shape in shapes.items():
            stored = self._tensors[name]
            if stored.shape != shape:
                raise ValueError(f"{stored.file}: {name} has shape {stored.shape} where config.json implies {shape}")

    @property
    def _head_copy(self) -> str:
        return f"{self.architecture.tensors.head}.weight"

    def _has_head_copy(self, row: MappedTensor) -> bool:
        return row.megatron == EMBEDDING and self.architecture.tied and self._head_copy in self._tensors

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights, in the order in which a model needs them."""
        return list(dict.fromkeys(self._tensors[name].file for row in weight_map(self.architecture) for name in row.hf))

    def stored(self, row: MappedTensor) -> list[StoredTensor]:
        """Return where the parts of a row lie."""
        return [self._tensors[name] for name in row.hf]

    def dtype_of(self, row: MappedTensor) -> torch.dtype:
        """Return the dtype that `read` gives a row."""
        return self._dtypes[row.megatron]

    def reading_bytes(self, row: MappedTensor) -> int:
        """Return the memory that `read` takes at its peak, its result among it."""
        parts, whole = sum(part.num_bytes for part in self.stored(row)), math.prod(row.shape) * self.dtype_of(row).itemsize
        casts = any(STORED_DTYPES[part.dtype] != self.dtype_of(row) for part in self.stored(row))
        # What is neither fused nor cast is what was read.
        is_plain = row.kind == "plain" and len(row.hf) == 1
        return parts + whole * ((not is_plain) + casts + self._has_head_copy(row))

    def read(self, row: MappedTensor) -> torch.Tensor:
        """Return one global Megatron tensor fused from its Hugging Face parts; no other tensor is read.

        In the dtype they are stored in; where these differ, in the one that holds the values of all.
        """
        tensor = to_megatron(row, [_read_stored(name, self._tensors[name]).to(self.dtype_of(row)) for name in row.hf], self.architecture)
        # transformers does not tie what differs, whatever the configuration says.
        if self._has_head_copy(row) and not torch.equal(tensor, _read_stored(self._head_copy, self._tensors[self._head_copy]).to(tensor.dtype)):
            raise ValueError(
                f"{self.path}: config.json ties the head to the embedding, and {self._head_copy} has other values than {row.hf[0]}: "
                "set tie_word_embeddings to false, or remove the tensor that is not the model's"
            )
        return tensor


def _read_stored(name: str, stored: StoredTensor) -> torch.Tensor:
    """Return a tensor in memory of its own: a mapped file would stay in memory with all that was read of it."""
    try:
        if stored.start is None:
            return torch.load(stored.file, mmap=True, weights_only=True)[name].clone(memory_format=torch.contiguous_format)
        tensor = torch.empty(stored.shape, dtype=STORED_DTYPES[stored.dtype])
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.start)
            view = bytes_of(tensor)
            while len(view):
                count = cast(int, file.readinto(view))
                if not count:
                    raise OSError("the file ends before it")
                view = view[count:]
    except DAMAGE as error:
        raise ValueError(f"{stored.file}: cannot read {name}: {damage_in(error)}") from None
    return tensor


def refuse_non_finite(row: MappedTensor, tensor: torch.Tensor) -> None:
    """Raise ValueError if a tensor holds infinities or NaN, which no model's weights do."""
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        num_damaged = tensor.numel() - int(tensor.isfinite().sum())
        raise ValueError(f"{row.name} ({', '.join(row.hf)}) holds {num_damaged} values that are not finite: the weights are damaged, nothing was written")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, to be read or written."""
    values: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(values)
