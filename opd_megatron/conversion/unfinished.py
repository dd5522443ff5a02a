"""A folder under construction, `OUT.partial`: locked against a second conversion, with a journal of the files that are whole, renamed to OUT at the end.

The journal's first line says what is converted and how; each further line names a finished file with its size and hash. A conversion of the same source with
the same options goes on with those files; any other starts over. Standard library only.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.conversion.settings import Settings

_OWN_FOLDER = ".conversion"
_JOURNAL, _LOCK = f"{_OWN_FOLDER}/journal.jsonl", f"{_OWN_FOLDER}/lock"
_PARTIAL, _REPLACED = ".partial", ".replaced"


class DamagedSourceError(ValueError):
    """The source is not what it should be, so that nothing made of it may be kept."""


@dataclass(frozen=True, kw_only=True)
class FinishedFile:
    """A file of the folder that was written to its end."""

    name: str
    # [bytes, hash].
    digest: list[Any]
    # What the index of the folder will have to know of it.
    contents: list[Any]


class Unfinished:
    """The folder while it is written; its methods may be called from any thread."""

    def __init__(self, folder: Path, description: dict[str, Any], settings: Settings) -> None:
        self.folder = folder
        self.finished: dict[str, FinishedFile] = {}
        self._lock = threading.Lock()
        found = _read_journal(folder / _JOURNAL)
        if found is not None:
            before, self.finished = found
            differing = sorted(name for name in before.keys() | description.keys() if before.get(name) != description.get(name))
            if differing:
                settings.tell(f"{folder} is of a conversion with another {' and '.join(differing)}: starting over")
                self.finished = {}
        for path in folder.iterdir():
            if path.name != _OWN_FOLDER and path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        lines = [description, *({"name": file.name, "digest": file.digest, "contents": file.contents} for file in self.finished.values())]
        draft = folder / f"{_JOURNAL}.new"
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines))
        draft.replace(folder / _JOURNAL)

    def add(self, file: FinishedFile) -> None:
        """Note that a file is whole and on the disk."""
        line = json.dumps({"name": file.name, "digest": file.digest, "contents": file.contents}) + "\n"
        with self._lock, (self.folder / _JOURNAL).open("a") as journal:
            journal.write(line)
            journal.flush()
            os.fsync(journal.fileno())
            self.finished[file.name] = file

    def forget(self, name: str) -> None:
        """Take back that a file is whole."""
        with self._lock:
            del self.finished[name]


@contextmanager
def unfinished_folder(out: Path, description: dict[str, Any], settings: Settings, *, replace: bool) -> Iterator[Unfinished]:
    """Yield the folder that becomes `out` at the end of the block; after an error it is kept for the next conversion, if `settings` say so.

    ValueError if `out` is there and not empty, unless it is to be replaced; if another conversion writes it; and for whatever the file system refuses.
    """
    out = out.absolute()
    if not out.name:
        raise ValueError(f"{out} is no folder that can be made")
    partial = out.with_name(out.name + _PARTIAL)
    unfinished: Unfinished | None = None
    try:
        _refuse_existing(out, replace=replace)
        with _locked(partial):
            # Somebody may just have finished it.
            _refuse_existing(out, replace=replace)
            try:
                unfinished = Unfinished(partial, description, settings)
                yield unfinished
                _publish(partial, out)
            except BaseException as error:
                _keep_or_remove(partial, unfinished, error, settings)
                raise
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}") from error


def _refuse_existing(out: Path, *, replace: bool) -> None:
    if out.is_symlink():
        raise ValueError(f"{out} is a link; name the folder itself")
    if replace:
        _recover(out)
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists; name another folder or remove it")


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the folder, made if it is not there. The lock ends with its process; the file itself says nothing."""
    own = partial / _OWN_FOLDER
    if partial.exists() and not own.is_dir() and any(partial.iterdir()):
        raise ValueError(f"{partial} exists and is no unfinished conversion; move it away or remove it")
    own.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before may have finished, and taken the file along, since it was opened.
            is_ours = (partial / _LOCK).is_file() and os.path.samestat(os.fstat(lock), (partial / _LOCK).stat())
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise ValueError(f"another conversion is writing {partial}; wait for it, or name another folder")
        yield
    finally:
        os.close(lock)


def _keep_or_remove(partial: Path, unfinished: Unfinished | None, error: BaseException, settings: Settings) -> None:
    if unfinished is not None and unfinished.finished and settings.keep_unfinished and not isinstance(error, DamagedSourceError):
        settings.tell(f"{len(unfinished.finished)} finished files are kept in {partial}: the same command goes on from there")
    else:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, out: Path) -> None:
    """Give the folder its name; what had it before is there until the new one is."""
    replaced = out.with_name(out.name + _REPLACED)
    if out.exists() and any(out.iterdir()):
        out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(out / _OWN_FOLDER)
    shutil.rmtree(replaced, ignore_errors=True)


def _recover(out: Path) -> None:
    """Give a folder its name back that was about to be replaced when its conversion ended."""
    replaced = out.with_name(out.name + _REPLACED)
    if replaced.exists() and not out.exists():
        replaced.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _read_journal(file: Path) -> tuple[dict[str, Any], dict[str, FinishedFile]] | None:
    """Return what was converted and which files were finished; None where that cannot be told. A line that was cut when its process ended is none."""
    try:
        first, *rest = file.read_text().splitlines()
        description = json.loads(first)
    except (OSError, ValueError):
        return None
    if not isinstance(description, dict):
        return None
    finished = {}
    for line in rest:
        try:
            entry = FinishedFile(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if len(entry.digest) == 2 and (file.parents[1] / entry.name).is_file():
            finished[entry.name] = entry
    return description, finished
