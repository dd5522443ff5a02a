"""What the files of a checkpoint were when it was written: a flipped bit on a disk, a file cut short, or one that is gone shows before anything is loaded.

Ranks share the files among them, so that a large checkpoint is read by all nodes at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opd_megatron.parallel.world import agreed_by_rank_0, shared_errors

_FILE = "checksums.json"
_ALGORITHM = "blake2b"


def write_checksums(folder: Path) -> None:
    """Write size and hash of every file of a folder into it; every rank calls it, once all files are there. ValueError on every rank if one cannot be read."""
    names = agreed_by_rank_0(_names(folder)) if dist.get_rank() == 0 else agreed_by_rank_0([])
    with shared_errors():
        own = {name: _digest(folder / name) for name in _share(folder, names)}
    parts: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    with shared_errors():
        if dist.get_rank() == 0:
            found = {name: entry for part in parts for name, entry in part.items()}
            (folder / _FILE).write_text(json.dumps({"algorithm": _ALGORITHM, "files": dict(sorted(found.items()))}, indent=1) + "\n")


def damage_in_files(folder: Path) -> str | None:
    """Return, the same on every rank, what is wrong with the first damaged file of a folder; None if all are as written, or nobody wrote down how that is."""
    wanted = agreed_by_rank_0(_read(folder) if dist.get_rank() == 0 else None)
    if not isinstance(wanted, dict):
        return wanted
    own = [damage for name in _share(folder, list(wanted)) if (damage := _compare(folder / name, wanted[name])) is not None]
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    return next((damage for part in parts for damage in part), None)


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != _FILE)


def _share(folder: Path, names: Sequence[str]) -> list[str]:
    """Return this rank's files, every so many-th: those of one rank of the run that wrote them stand together."""
    return list(names)[dist.get_rank() :: dist.get_world_size()]


def _digest(file: Path) -> list[Any]:
    with file.open("rb") as stream:
        return [file.stat().st_size, hashlib.file_digest(stream, _ALGORITHM).hexdigest()]


def _read(folder: Path) -> dict[str, Any] | str | None:
    """Return what was written down, by file; a sentence where that is damaged itself; None where there is nothing."""
    try:
        record = json.loads((folder / _FILE).read_text())
        if record["algorithm"] != _ALGORITHM or not all(len(entry) == 2 for entry in record["files"].values()):
            raise ValueError("not a record of this version")
        files: dict[str, Any] = record["files"]
        return files
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_FILE} cannot be read: {error}"


def _compare(file: Path, wanted: list[Any]) -> str | None:
    try:
        size, digest = _digest(file)
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror or error}"
    if size != wanted[0]:
        return f"{file.name} has {size:,} bytes instead of {wanted[0]:,}"
    return f"{file.name} has other bytes than were written" if digest != wanted[1] else None
