"""A Hugging Face model folder on disk: its configuration, which file holds which tensor, and whether the files are whole.

Standard library only, so that `recipes.run --check` finds a missing or cut shard without importing torch.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.models.architecture import Architecture, parse_architecture

# What travels beside the weights: everything a serving engine or a tokenizer reads.
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
)


@dataclass(frozen=True)
class HFFolder:
    """A folder whose configuration was understood and whose safetensors files were found whole."""

    path: Path
    architecture: Architecture
    tensor_files: Mapping[str, Path]
    # As safetensors names them; a folder may store several.
    tensor_dtypes: Mapping[str, str]


# What weights can be cast from. Numbers of another kind mean something only together with scales, which no model here reads.
_FLOATING = ("F64", "F32", "F16", "BF16")


def open_hf_folder(path: str | Path) -> HFFolder:
    """Return the folder, or raise ValueError saying which file is missing, cut short, quantized, or not understood. Reads headers only."""
    folder = Path(path)
    architecture = read_architecture(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} names no tensors; download the folder again")
        tensor_files = {name: folder / file for name, file in weight_map.items()}
    else:
        single = folder / "model.safetensors"
        tensor_files = dict.fromkeys(read_safetensors_header(single), single)
    dtypes: dict[str, str] = {}
    for file in sorted(set(tensor_files.values())):
        present = read_safetensors_header(file)
        promised = [name for name, holder in tensor_files.items() if holder == file]
        absent = [name for name in promised if name not in present]
        if absent:
            raise ValueError(f"{file}: the index promises {absent[0]!r}, which the file does not hold; download the folder again")
        dtypes |= {name: str(present[name].get("dtype")) for name in promised}
        quantized = [name for name in promised if dtypes[name] not in _FLOATING]
        if quantized:
            name = quantized[0]
            raise ValueError(f"{file} stores {name!r} as {dtypes[name]}, and only unquantized weights are supported: {', '.join(_FLOATING)}, also mixed")
    return HFFolder(folder, architecture, tensor_files, dtypes)


def read_architecture(folder: Path) -> Architecture:
    """Return the architecture named by a folder's config.json."""
    config = folder / "config.json"
    if not config.is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter (LoRA) and no model: merge it into its base model first (PEFT's merge_and_unload), and name the result")
    if not config.is_file():
        raise ValueError(f"{folder} is not a Hugging Face model folder: no config.json in it; give a local folder with config.json and safetensors files")
    return parse_architecture(_read_json(config), str(config))


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
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError):
        header = None
    if header is None:
        raise ValueError(f"{file} is not a whole safetensors file ({size} bytes); download it again")
    header.pop("__metadata__", None)
    try:
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (TypeError, KeyError, IndexError):
        raise ValueError(f"{file} has a header that is not safetensors'; download it again") from None
    if size != expected:
        raise ValueError(f"{file} has {size} bytes where its header promises {expected}; download it again")
    return header


def stop_token_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that end a response by the folder's generation_config.json, else config.json; chat models name several."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


@contextmanager
def folder_written_whole(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place at the end; after an error nothing is left.

    ValueError if `out` exists and `replace` is not set, and for whatever the file system refuses.
    """
    if out.exists() and not replace:
        raise ValueError(f"{out} exists; name another folder or remove it")
    unfinished = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def copy_assets(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, chat template and generation files that `source` has."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ASSETS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content
