"""A Hugging Face folder of the days before safetensors: weights in pickles, of which torch makes tensors and plain values only."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from opd_megatron.models.hf_folder import PICKLED, PICKLED_INDEX, HFFolder, StoredTensor, read_architecture, read_index

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def has_pickles_alone(folder: Path) -> bool:
    """Return whether a folder's weights are in pickles and in no other form."""
    has_safetensors = (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file()
    return not has_safetensors and any((folder / name).is_file() for name in (PICKLED, PICKLED_INDEX))


def open_pickled_folder(folder: Path) -> HFFolder:
    """Return the folder, or raise ValueError saying which file is missing or no pickle of tensors. The tensors' values are not read."""
    architecture = read_architecture(folder)
    promised = read_index(folder / PICKLED_INDEX) if (folder / PICKLED_INDEX).is_file() else None
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(promised.values())) if promised else [folder / PICKLED]:
        present = _tensors_in(file)
        names = list(present) if promised is None else [name for name, holder in promised.items() if holder == file]
        absent = [name for name in names if name not in present]
        if absent:
            raise ValueError(f"{file}: the index promises {absent[0]!r}, which the file does not hold; download the folder again")
        tensors |= {name: present[name] for name in names}
    return HFFolder(folder, architecture, tensors)


def _reason(error: Exception) -> str:
    """Return what torch met, without its advice to load the file all the same."""
    text = str(error).strip()
    if asked := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {asked[1]}, which is no part of a tensor"
    if "mmap can only be used" in text:
        return "it has the form that torch wrote before version 1.6; load and save it with a newer torch, as safetensors"
    return text.splitlines()[0] if text else type(error).__name__


def _tensors_in(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise ValueError(f"{file} is missing; the folder's download may be incomplete")
    try:
        content = torch.load(file, mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        raise ValueError(f"{file} cannot be read as tensors alone: {_reason(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{file} is no dictionary of tensors")
    strange = [name for name, value in content.items() if value.dtype not in _NAMES]
    if strange:
        raise ValueError(f"{file} stores {strange[0]!r} as {content[strange[0]].dtype}, and only unquantized weights are supported")
    return {name: StoredTensor(file=file, dtype=_NAMES[value.dtype], shape=tuple(value.shape), start=None) for name, value in content.items()}
