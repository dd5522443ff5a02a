"""What a checkpoint is, from its headers alone: a Hugging Face folder, or a Megatron distributed checkpoint of a run, of a conversion, or of somebody else.

What is damaged is refused with a ValueError. What is whole but no model of this project keeps its `problem`, beside all that can be told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.checkpoint_weights import ASSETS_FOLDER, damage_in_pieces
from opd_megatron.models.damage import DAMAGE, damage_in
from opd_megatron.models.file_digests import Record, damage_in_file, read_record
from opd_megatron.models.hf_folder import INDEX, read_architecture, read_index, read_json, read_safetensors_header
from opd_megatron.models.origin import read_origin
from opd_megatron.models.trusted_pickle import check_index
from opd_megatron.models.weight_map import weight_map
from opd_megatron.models.weights import WeightSource, open_weights

Kind = Literal["hugging_face", "training", "converted", "megatron"]
Part = Literal["weights", "optimizer", "beside"]

# What training keeps beside weights and optimizer: an averaged teacher, and the weights that EffOPD's last search left.
_BESIDE = ("teacher_average.", "effopd_anchor.")
_OPTIMIZER = "optimizer."
_PROGRESS_FILE = "progress.json"
# As safetensors names them. Others are shown under their own name: they are no weights of a model here.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor as it is stored, whole, whatever ranks or files share it; padding of a vocabulary is in its shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    # Paths in the checkpoint's folder.
    files: tuple[str, ...]
    part: Part = "weights"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What the headers of a checkpoint tell. `source` reads its weights; None where `problem` says why this project cannot."""

    folder: Path
    kind: Kind
    architecture: Architecture | None
    source: WeightSource | None
    problem: str | None
    tensors: tuple[StoredTensor, ...]
    num_files: int
    num_bytes: int
    step: int | None
    # None where it is not recorded.
    origin: dict[str, Any] | None
    transformers_version: str | None
    # Files that checksums.json names; None without one.
    num_recorded_files: int | None

    @property
    def num_parameters(self) -> int:
        """The model's own number, without padding or a tied head's copy; of an unknown architecture what is stored."""
        if self.architecture is not None:
            return sum(math.prod(row.shape) for row in weight_map(self.architecture))
        return sum(math.prod(tensor.shape) for tensor in self.tensors if tensor.part == "weights")

    def to_json(self, *, tensors: bool) -> dict[str, Any]:
        """Return everything in plain values, the single tensors if asked for."""
        origin = self.origin or {}
        versions = origin.get("versions")
        own_versions = {"transformers": self.transformers_version} if self.transformers_version else {}
        record = {
            "folder": str(self.folder),
            "kind": self.kind,
            "supported": self.problem is None,
            "problem": self.problem,
            "architecture": asdict(self.architecture) if self.architecture is not None else None,
            "parameters": self.num_parameters,
            **{part: _counts(tensor for tensor in self.tensors if tensor.part == part) for part in ("weights", "optimizer", "beside")},
            "files": self.num_files,
            "bytes": self.num_bytes,
            "step": self.step,
            "made_by": origin.get("made_by"),
            "source": origin.get("source"),
            "layout": origin.get("layout"),
            "world_size": origin.get("world_size"),
            "versions": {**(versions if isinstance(versions, dict) else {}), **own_versions},
            "recorded_files": self.num_recorded_files,
        }
        return {**record, "stored_tensors": [asdict(tensor) for tensor in self.tensors]} if tensors else record


def _counts(tensors: Iterable[StoredTensor]) -> dict[str, Any] | None:
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
    return {"tensors": sum(dtypes.values()), "dtypes": dtypes} if dtypes else None


def inspect_checkpoint(path: Path) -> Inspection:
    """Return what a folder holds, of a run's directory its newest checkpoint. ValueError if it is no checkpoint, or damaged as far as headers show."""
    folder = _newest_of_run(path) or path
    if (folder / ".metadata").is_file() or (folder / "metadata.json").is_file():
        return _megatron(folder)
    if (folder / "config.json").is_file():
        return _hugging_face(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    raise ValueError(f"{folder} is not a checkpoint: neither config.json of a Hugging Face folder nor .metadata of a Megatron checkpoint is in it")


def damaged_file(folder: Path) -> str | None:
    """Return what is wrong with the first file that is not as checksums.json says, all of them read; None if all are, or none is recorded."""
    record = read_record(folder)
    if not isinstance(record, Record):
        return record
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: damage_in_file(folder, name, record), record.files)
        return next((damage for damage in found if damage is not None), None)


def _newest_of_run(path: Path) -> Path | None:
    """Return the newest checkpoint of a run's directory or of its `checkpoints` folder; None if the path is neither."""
    if any(path.glob("*.safetensors")) or not ((path / "checkpoints").is_dir() or (path / "status").is_file() or path.name == "checkpoints"):
        return None
    checkpoints = path if path.name == "checkpoints" else path / "checkpoints"
    steps = [(int(name[1]), step) for step in checkpoints.glob("step_*") if (name := re.fullmatch(r"step_(0|[1-9]\d*)", step.name)) and step.is_dir()]
    if not steps:
        raise ValueError(f"{path} is a run without checkpoints: there is no step_N in {checkpoints}")
    return max(steps)[1]


def _hugging_face(folder: Path) -> Inspection:
    config = read_json(folder / "config.json")
    return _inspection(folder, "hugging_face", folder, _folder_tensors(folder), config, hf=str(folder))


def _folder_tensors(folder: Path) -> list[StoredTensor]:
    """Return the tensors of a folder's safetensors files; ValueError unless every file that the index names is whole and holds what it promises."""
    index = folder / INDEX
    promised = read_index(index) if index.is_file() else None
    names = sorted(file.name for file in (set(promised.values()) if promised else folder.glob("*.safetensors")))
    if not names:
        raise ValueError(f"{folder} has a config.json and no safetensors files: weights in other formats are not read")
    found = {}
    for file in names:
        for name, entry in read_safetensors_header(folder / file).items():
            try:
                found[name] = StoredTensor(name=name, shape=tuple(entry["shape"]), dtype=_DTYPES.get(entry["dtype"], entry["dtype"]), files=(file,))
            except (KeyError, TypeError):
                raise ValueError(f"{folder / file} is damaged: its header does not say what {name!r} is") from None
    missing = [name for name in promised or {} if name not in found]
    if missing:
        raise ValueError(f"{index} promises {missing[0]!r}, which no file of {folder} holds")
    return list(found.values())


def _megatron(folder: Path) -> Inspection:
    index = _read_index(folder)
    try:
        tensors = _indexed_tensors(folder, index)
    except (AttributeError, KeyError, TypeError) as error:
        return _refuse(folder / ".metadata", damage_in(error))  # type: ignore[no-any-return]
    progress = read_json(folder / _PROGRESS_FILE) if (folder / _PROGRESS_FILE).is_file() else None
    origin = read_origin(folder)
    kind: Kind = "training" if progress is not None else "converted" if str((origin or {}).get("made_by", "")).startswith("convert") else "megatron"
    step = progress.get("step") if progress is not None else None
    assets = folder / ASSETS_FOLDER
    config = read_json(assets / "config.json") if (assets / "config.json").is_file() else {}
    return _inspection(folder, kind, assets, tensors, config, step=step if isinstance(step, int) else None, checkpoint=str(folder))


def _read_index(folder: Path) -> Metadata:
    file = folder / ".metadata"
    if not file.is_file():
        raise ValueError(f"{folder} is no whole Megatron checkpoint: there is a metadata.json and no .metadata in it")
    check_index(file)
    try:
        index = dcp.FileSystemReader(folder).read_metadata()
        return index if isinstance(index.storage_data, dict) else _refuse(file, "it does not say where tensors are")
    except DAMAGE as error:
        return _refuse(file, damage_in(error))


def _refuse(file: Path, reason: str) -> Any:
    raise ValueError(f"{file} is damaged: {reason}")


def _indexed_tensors(folder: Path, index: Metadata) -> list[StoredTensor]:
    """Return the tensors of an index; ValueError if a file is missing or ends before what the index says is in it."""
    damage = damage_in_pieces(folder, index)
    if damage:
        raise ValueError(f"{folder} is damaged: {damage}")
    files: dict[str, set[str]] = {}
    for piece, place in index.storage_data.items():
        files.setdefault(piece.fqn, set()).add(place.relative_path)
    found = []
    for name, stored in index.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            found.append(StoredTensor(name=name, shape=tuple(stored.size), dtype=dtype, files=tuple(sorted(files.get(name, ()))), part=_part_of(name)))
    return found


def _part_of(name: str) -> Part:
    if name.startswith(_OPTIMIZER):
        return "optimizer"
    return "beside" if name.startswith(_BESIDE) else "weights"


def _inspection(
    folder: Path, kind: Kind, assets: Path, tensors: list[StoredTensor], config: dict[str, Any], step: int | None = None, **source: str
) -> Inspection:
    architecture, opened, problem = None, None, None
    try:
        architecture = read_architecture(assets)
        opened = open_weights(**source)
    except ValueError as error:
        problem = str(error)
    if not assets.is_dir():
        problem = f"{folder} does not know its architecture: there is no {ASSETS_FOLDER}/config.json in it, which this project's checkpoints carry"
    files = [file for file in folder.rglob("*") if file.is_file()]
    record = read_record(folder)
    if isinstance(record, str):
        raise ValueError(f"{folder} is damaged: {record}")
    version = config.get("transformers_version")
    return Inspection(
        folder=folder,
        kind=kind,
        architecture=architecture,
        source=opened if problem is None else None,
        problem=problem,
        tensors=tuple(sorted(tensors, key=lambda tensor: (tensor.part != "weights", tensor.name))),
        num_files=len(files),
        num_bytes=sum(file.stat().st_size for file in files),
        step=step,
        origin=read_origin(folder),
        transformers_version=version if isinstance(version, str) else None,
        num_recorded_files=len(record.files) if record is not None else None,
    )
