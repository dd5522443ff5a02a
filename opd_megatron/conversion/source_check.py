"""Is a source what its publisher or writer made? Its files are hashed beside the converting and compared with what is known of them.

Known is, in this order: what the user gives (`--sha256`), `checksums.json` beside the files (this project's), what `hf download --local-dir` notes in
`.cache/huggingface/download/NAME.metadata` (its second line is the sha256 of a large file), and the names of files in the hub's cache (`blobs/SHA256`, to
which a snapshot's files are links).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opd_megatron.conversion.hashed_file import ALGORITHM
from opd_megatron.conversion.settings import Settings, is_sha256
from opd_megatron.conversion.unfinished import DamagedSourceError
from opd_megatron.conversion.workers import Workers
from opd_megatron.models.file_digests import RECORD_FILE, Record, difference, digest_of, read_record


@dataclass(frozen=True)
class Known:
    """What a file should be, and who says so."""

    algorithm: str
    # [bytes or None, hash].
    digest: list[Any]
    said_by: str


class SourceCheck:
    """The files of a source, and what is known of them. `found` holds what was hashed, as "sha256:..." or "crc32:...", by name."""

    def __init__(self, folder: Path, files: list[Path], settings: Settings, *, hash_unknown: bool) -> None:
        """With `hash_unknown`, files that nothing is known of are hashed for `found` alone."""
        self._folder = folder
        self.found: dict[str, str] = {}
        self._known = known_digests(folder, files, settings) if settings.verify else {}
        unknown = [file.name for file in files if file not in self._known]
        if unknown and settings.verify:
            which = "any file" if len(unknown) == len(files) else f"{len(unknown)} of {len(files)} files, first {unknown[0]},"
            settings.tell(f"no hash is known of {which} of {folder}: a damaged one may go unnoticed")
        self._files = [file for file in files if file in self._known or (settings.verify and hash_unknown)]

    def jobs(self, workers: Workers) -> list[tuple[float, Callable[[], None]]]:
        """Return a job for every file, with its place in the source, between 0 and 1."""
        sizes = [file.stat().st_size for file in self._files]
        total = max(1, sum(sizes))
        places = [sum(sizes[:number]) / total for number in range(len(sizes))]
        return [(place, partial(self._check, file, workers)) for place, file in zip(places, self._files, strict=True)]

    def _check(self, file: Path, workers: Workers) -> None:
        known = self._known.get(file)
        algorithm = known.algorithm if known else ALGORITHM
        try:
            found = digest_of(file, algorithm, lambda _: workers.check())
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
        if known and (damage := difference(str(file), found, known.digest)):
            raise DamagedSourceError(f"{damage} (known by {known.said_by}); nothing of it is kept: get the file again")
        self.found[str(file.relative_to(self._folder))] = f"{algorithm}:{found[1]}"


def known_digests(folder: Path, files: list[Path], settings: Settings) -> dict[Path, Known]:
    """Return what is known of each file; ValueError where the user's list has none of them, or the folder's record is damaged."""
    if not files:
        return {}
    if settings.sha256 and not any(file.name in settings.sha256 for file in files):
        raise ValueError(f"--sha256 names none of the files of {folder}, such as {files[0].name}")
    record = read_record(folder)
    if isinstance(record, str):
        raise DamagedSourceError(f"{folder}: {record}")
    found = {file: _known(folder, file, record, settings) for file in files}
    return {file: known for file, known in found.items() if known is not None}


def with_recorded(folder: Path, weights: list[Path]) -> list[Path]:
    """Return the files to check of a checkpoint: those with its weights, and all that is small; what holds no weight of the model is not read."""
    record = read_record(folder)
    small = [folder / name for name in record.files if not name.endswith(".distcp")] if isinstance(record, Record) else []
    missing = [file for file in small if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} is damaged: {missing[0].relative_to(folder)} is missing, which {RECORD_FILE} names")
    return [*small, *weights]


def _known(folder: Path, file: Path, record: Record | None, settings: Settings) -> Known | None:
    if file.name in settings.sha256:
        return Known("sha256", [None, settings.sha256[file.name]], "--sha256")
    name = str(file.relative_to(folder))
    if record and name in record.files:
        return Known(record.algorithm, record.files[name], "checksums.json")
    note = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    if note.is_file():
        lines = note.read_text(errors="replace").splitlines()
        if len(lines) > 1 and is_sha256(lines[1].strip()):
            return Known("sha256", [None, lines[1].strip().lower()], f"its download ({note})")
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and is_sha256(blob.name):
        return Known("sha256", [None, blob.name.lower()], "its name in the hub's cache")
    return None
