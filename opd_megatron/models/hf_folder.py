"""A Hugging Face model folder on disk: its configuration, which file holds which tensor, and whether the files are whole.

Standard library only, so that `recipes.run --check` finds a missing or cut shard without importing torch.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.hf_config import parse_architecture

# What travels beside the weights, as patterns of names: everything a serving engine or a tokenizer reads, and on what terms it may.
ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenizer.model.v*",
    "spiece.model",
    "vocab.txt",
    "preprocessor_config.json",
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)


# Of a safetensors value, in bytes. Numbers of another kind than these mean something only together with scales, which no model here reads.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
INDEX = "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor's values lie."""

    file: Path
    # As safetensors names it; a folder may store several.
    dtype: str
    shape: tuple[int, ...]
    # In bytes, from the beginning of the file; None in a pickle, which has no such place.
    start: int | None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class HFFolder:
    """A folder whose configuration was understood and whose files were found whole."""

    path: Path
    architecture: Architecture
    tensors: Mapping[str, StoredTensor]

    @property
    def tensor_files(self) -> dict[str, Path]:
        return {name: tensor.file for name, tensor in self.tensors.items()}


def open_hf_folder(path: str | Path) -> HFFolder:
    """Return the folder, or raise ValueError saying which file is missing, cut short, quantized, or not understood. Reads headers only."""
    folder = Path(path)
    architecture = read_architecture(folder)
    _refuse_pickles_alone(folder)
    promised = read_index(folder / INDEX) if (folder / INDEX).is_file() else None
    single = folder / "model.safetensors"
    files = sorted(set(promised.values())) if promised else [single]
    if promised and single.is_file() and single not in files:
        raise ValueError(f"{folder} has both {single.name} and {INDEX}, which does not name it: remove the one that is not the model")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        present = _stored_tensors(file)
        names = list(present) if promised is None else [name for name, holder in promised.items() if holder == file]
        absent = [name for name in names if name not in present]
        if absent:
            raise ValueError(f"{file}: the index promises {absent[0]!r}, which the file does not hold; download the folder again")
        # transformers reads whole files, so that it would take a tensor from where the index does not say.
        elsewhere = [name for name in present if promised is not None and promised.get(name) != file]
        if elsewhere:
            says = f"puts it into {promised[elsewhere[0]].name}" if promised and elsewhere[0] in promised else "does not name it"
            raise ValueError(f"{file} holds {elsewhere[0]!r}, and the index {says}; download the folder again")
        for name in names:
            if present[name].dtype not in DTYPE_BYTES:
                stored = present[name].dtype
                raise ValueError(f"{file} stores {name!r} as {stored}, and only unquantized weights are supported: {', '.join(DTYPE_BYTES)}, also mixed")
            tensors[name] = present[name]
    return HFFolder(folder, architecture, tensors)


def read_index(file: Path) -> dict[str, Path]:
    """Return the file that an index names for every tensor; ValueError for none, or for one that is not in the index's own folder."""
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{file} names no tensors; download the folder again")
    strange = [(name, holder) for name, holder in names.items() if not isinstance(holder, str) or holder in ("", "..") or Path(holder).name != holder]
    if strange:
        raise ValueError(f"{file} puts {strange[0][0]!r} into {strange[0][1]!r}, which is no file of its folder")
    return {name: file.parent / holder for name, holder in names.items()}


def _refuse_pickles_alone(folder: Path) -> None:
    """Raise ValueError for a folder of the days before safetensors."""
    pickled = [name for name in (PICKLED_INDEX, PICKLED) if (folder / name).is_file()]
    if pickled and not (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"{folder} has its weights in pickles ({pickled[0]}), which could run code; get the model's safetensors, "
            "or read tensors alone from them with tools/convert_hf_to_megatron.py --allow-pickle"
        )


def _stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return what a safetensors file holds by its header."""
    header = read_safetensors_header(file)
    with file.open("rb") as stream:
        first = 8 + struct.unpack("<Q", stream.read(8))[0]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        try:
            stored = StoredTensor(file=file, dtype=str(entry["dtype"]), shape=tuple(int(size) for size in entry["shape"]), start=first + begin)
            fits = stored.dtype not in DTYPE_BYTES or (begin >= 0 and end - begin == stored.num_bytes)
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"{file} has a header that contradicts itself at {name!r}; download it again")
        tensors[name] = stored
    return tensors


def read_architecture(folder: Path) -> Architecture:
    """Return the architecture named by a folder's config.json."""
    config = folder / "config.json"
    if not config.is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter (LoRA) and no model: merge it into its base model first (PEFT's merge_and_unload), and name the result")
    if not config.is_file():
        raise ValueError(f"{folder} is not a Hugging Face model folder: no config.json in it; give a local folder with config.json and safetensors files")
    return parse_architecture(read_json(config), str(config))


def read_safetensors_header(file: Path) -> dict[str, Any]:
    """Return a safetensors file's tensor entries; raise ValueError if the file is missing or shorter or longer than its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length <= size - 8 else None
            header = header if isinstance(header, dict) else None
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; the folder's download may be incomplete") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError):
        header = None
    if header is None:
        raise ValueError(f"{file} is not a whole safetensors file ({size} bytes); download it again")
    header.pop("__metadata__", None)
    try:
        places = sorted((int(entry["data_offsets"][0]), int(entry["data_offsets"][1])) for entry in header.values())
        expected = 8 + length + (places[-1][1] if places else 0)
    except (TypeError, KeyError, IndexError, ValueError):
        raise ValueError(f"{file} has a header that is not safetensors'; download it again") from None
    if size != expected:
        raise ValueError(f"{file} has {size} bytes where its header promises {expected}; download it again")
    if any(begin != end for (_, end), (begin, _) in zip([(0, 0), *places], places)):
        raise ValueError(f"{file} has a header whose tensors overlap, or leave bytes between them; download it again")
    return header


def stop_token_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that end a response by the folder's generation_config.json, else config.json; chat models name several."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def asset_files(folder: Path) -> list[Path]:
    """Return the files of a folder that travel with its weights."""
    return sorted({file for pattern in ASSETS for file in folder.glob(pattern) if file.is_file()})


def copy_assets(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, chat template and generation files that `source` has."""
    target.mkdir(parents=True, exist_ok=True)
    for file in asset_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content
