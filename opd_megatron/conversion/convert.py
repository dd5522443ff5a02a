"""The straight path of both directions: room, source, parts on several threads, index, name."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import opd_megatron
from opd_megatron.conversion.hashed_file import ALGORITHM, HashedFile
from opd_megatron.conversion.progress import Progress
from opd_megatron.conversion.settings import Settings
from opd_megatron.conversion.source_check import SourceCheck
from opd_megatron.conversion.unfinished import FinishedFile, Unfinished, unfinished_folder
from opd_megatron.conversion.workers import Workers
from opd_megatron.models.file_digests import difference, digest_of, write_record
from opd_megatron.models.hf_folder import asset_files
from opd_megatron.models.weight_map import MappedTensor
from opd_megatron.models.weights import StoredWeights

# What an index and a journal say of a tensor, about.
_ENTRY_BYTES = 2048


@dataclass(frozen=True)
class Part:
    """A file to be written, and the rows of the weight map that go into it, in this order."""

    name: str
    rows: tuple[MappedTensor, ...]
    num_bytes: int


class Conversion(Protocol):
    """One direction."""

    source: StoredWeights
    parts: list[Part]
    # What decides, beside the source, what is written.
    options: dict[str, Any]
    files_to_check: list[Path]
    # Whether it notes the hashes of its source.
    notes_digests: bool

    def row_bytes(self, row: MappedTensor) -> int:
        """Return the memory that converting a row takes at its peak."""
        ...

    def write(self, part: Part, file: HashedFile, workers: Workers) -> list[Any]:
        """Write a part, and return what the index has to know of it."""
        ...

    def complete(self, folder: Path, finished: dict[str, FinishedFile], source_digests: dict[str, str]) -> None:
        """Write what is not weights."""
        ...


def convert(conversion: Conversion, out: Path, settings: Settings, *, replace: bool = False) -> None:
    """Write the folder `out`, which appears whole or not at all; ValueError for whatever stands against it."""
    source, parts = conversion.source, conversion.parts
    with unfinished_folder(out, describe(conversion), settings, replace=replace) as unfinished:
        left = [part for part in parts if part.name not in unfinished.finished]
        _check_room(out, unfinished.folder, sum(part.num_bytes + _ENTRY_BYTES * len(part.rows) for part in left) + _small_bytes(source.assets))
        if len(left) < len(parts):
            settings.tell(f"{len(parts) - len(left)} of {len(parts)} files are there already: going on with the others")
        check = SourceCheck(source.path, conversion.files_to_check, settings, hash_unknown=conversion.notes_digests)
        workers = Workers(settings.workers, max(conversion.row_bytes(row) for part in parts for row in part.rows))
        with Progress(sum(part.num_bytes for part in parts), shown=settings.show_progress) as progress:
            jobs = check.jobs(workers) + _part_jobs(conversion, unfinished, workers, progress, settings)
            # A file of the source is hashed about when it is converted, so that it comes from the disk once.
            workers.run(job for _, job in sorted(jobs, key=lambda one: one[0]))
        conversion.complete(unfinished.folder, unfinished.finished, dict(sorted(check.found.items())))
        write_record(unfinished.folder, {file.name: file.digest for file in unfinished.finished.values()}, ALGORITHM)


def describe(conversion: Conversion) -> dict[str, Any]:
    """Return what a conversion is of, as JSON: two with the same description write the same files."""
    source = conversion.source
    beside = (source.path / ".metadata", *asset_files(source.assets))
    files = [*source.files, *(file for file in beside if file.is_file())]
    plan = [[part.name, part.num_bytes, [row.name for row in part.rows]] for part in conversion.parts]
    return {
        "version": opd_megatron.__version__,
        "source": {"path": str(source.path.resolve()), "files": {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}},
        "options": {**conversion.options, "files": hashlib.sha256(json.dumps(plan).encode()).hexdigest()},
    }


def parts_of(rows: list[MappedTensor], row_bytes: Callable[[MappedTensor], int], max_bytes: int, name: Callable[[int], str]) -> list[Part]:
    """Return the rows as files of at most this size, but for a row that is larger alone."""
    groups: list[list[MappedTensor]] = []
    sizes: list[int] = []
    for row in rows:
        size = row_bytes(row)
        if not groups or sizes[-1] + size > max_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(row)
        sizes[-1] += size
    return [Part(name(number), tuple(group), size) for number, (group, size) in enumerate(zip(groups, sizes, strict=True))]


def stored_bytes(source: StoredWeights, row: MappedTensor) -> int:
    """Return the size of a row in the dtype that the source gives it."""
    return math.prod(row.shape) * source.dtype_of(row).itemsize


def _part_jobs(
    conversion: Conversion, unfinished: Unfinished, workers: Workers, progress: Progress, settings: Settings
) -> list[tuple[float, Callable[[], None]]]:
    """Return a job for every part, with its place among them, between 0 and 1."""

    def each_block(num_bytes: int) -> None:
        workers.check()
        progress.add(num_bytes)

    def make(part: Part) -> None:
        """Write a part, or keep the one that is there if its bytes are those of the journal."""
        workers.check()
        path, before = unfinished.folder / part.name, unfinished.finished.get(part.name)
        if before is not None:
            damage = difference(part.name, digest_of(path, ALGORITHM, each_block), before.digest)
            if damage is None:
                return
            settings.tell(f"{damage}: writing it again")
            unfinished.forget(part.name)
        with HashedFile(path, each_block) as file:
            contents = conversion.write(part, file, workers)
        unfinished.add(FinishedFile(name=part.name, digest=file.digest(), contents=contents))

    total = sum(part.num_bytes for part in conversion.parts)
    places = [sum(part.num_bytes for part in conversion.parts[:number]) / total for number in range(len(conversion.parts))]
    return [(place, partial(make, part)) for place, part in zip(places, conversion.parts, strict=True)]


def _small_bytes(assets: Path) -> int:
    return (1 << 20) + sum(file.stat().st_size for file in asset_files(assets))


def _check_room(out: Path, folder: Path, needed_bytes: int) -> None:
    """Raise ValueError if the disk will not hold what is to be written."""
    usage = shutil.disk_usage(folder)
    # Some network file systems say nothing of their size.
    if usage.total and usage.free < needed_bytes:
        raise ValueError(f"{out} needs about {needed_bytes:,} bytes and {usage.free:,} are free on its disk; make room or name another folder")
