"""Size and hash of every file of a checkpoint, as a record in it: what is damaged shows before anything is loaded. Standard library only."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

RECORD_FILE = "checksums.json"
# Runs write the first and conversions the second, which finds damage as surely and takes a fifth of the time; the third is what others publish.
ALGORITHMS = ("blake2b", "crc32", "sha256")
# [bytes, hash] of files by their path in the folder.
Digests = dict[str, list[Any]]
_BLOCK_BYTES = 1 << 20


class Hasher(Protocol):
    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Record:
    """What was written down of a folder's files."""

    algorithm: str
    files: Digests


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def new_hasher(algorithm: str) -> Hasher:
    """Return one that has seen nothing."""
    return _Crc32() if algorithm == "crc32" else hashlib.new(algorithm)


def digest_of(file: Path, algorithm: str = ALGORITHMS[0], each_block: Callable[[int], None] = lambda _: None) -> list[Any]:
    """Return [bytes, hash] of a file; `each_block` is told how many bytes were read, and may raise to end it."""
    hasher, size = new_hasher(algorithm), 0
    for block in _blocks(file):
        hasher.update(block)
        size += len(block)
        each_block(len(block))
    return [size, hasher.hexdigest()]


def write_record(folder: Path, digests: Mapping[str, list[Any]], algorithm: str = ALGORITHMS[0]) -> None:
    """Write the record of a folder's files: `digests` as far as they are known, the other files are read."""
    found = {**digests, **{name: digest_of(folder / name, algorithm) for name in names_in(folder) if name not in digests}}
    (folder / RECORD_FILE).write_text(json.dumps({"algorithm": algorithm, "files": dict(sorted(found.items()))}, indent=1) + "\n")


def read_record(folder: Path) -> Record | str | None:
    """Return what was written down; a sentence where that is damaged itself; None where there is nothing."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
        if record["algorithm"] not in ALGORITHMS or not all(len(entry) == 2 for entry in record["files"].values()):
            raise ValueError("not a record of this version")
        return Record(record["algorithm"], record["files"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{RECORD_FILE} cannot be read: {error}"


def damage_in_file(folder: Path, name: str, record: Record) -> str | None:
    """Return what is wrong with a file that is not as it was recorded; None if it is."""
    file = folder / name
    try:
        return difference(file.name, digest_of(file, record.algorithm), record.files[name])
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror or error}"


def difference(name: str, found: list[Any], wanted: list[Any]) -> str | None:
    """Return what is wrong with a file that has another size or hash than it should; a size of None is not known."""
    if wanted[0] is not None and found[0] != wanted[0]:
        return f"{name} has {found[0]:,} bytes instead of {wanted[0]:,}"
    return f"{name} has other bytes than were written" if found[1] != wanted[1] else None


def names_in(folder: Path) -> list[str]:
    """Return the path, in the folder, of every file but the record itself and what is hidden in folders of its own."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != RECORD_FILE)
    return sorted(str(path) for path in files if not any(part.startswith(".") for part in path.parts[:-1]))


def _blocks(file: Path) -> Iterator[memoryview]:
    """Yield what is in a file, in one buffer that is used again and fits a processor's cache."""
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        while count := cast(int, stream.readinto(buffer)):
            yield view[:count]
