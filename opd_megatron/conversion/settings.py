"""How a conversion goes about its work; nothing here changes what it writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MAX_WORKERS = 4


def default_workers() -> int:
    """Return one thread for each core that this process may use, four at most: more would wait for one disk."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def _say_nothing(_: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The defaults are those of a program that converts beside other work, and knows that its source is whole."""

    workers: int = 1
    # Hash the files of the source, and compare with what is known of them.
    verify: bool = False
    # What the user knows of them: sha256 by file name.
    sha256: Mapping[str, str] = field(default_factory=dict)
    # Leave finished files where a conversion breaks off, for the next to go on with.
    keep_unfinished: bool = False
    show_progress: bool = False
    tell: Callable[[str], None] = _say_nothing

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers} must be at least 1")


def read_sha256_file(file: Path) -> dict[str, str]:
    """Return the hashes of a file in sha256sum's format, by file name; ValueError where a line is none."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--sha256 {file} cannot be read: {error}") from None
    known = {}
    for number, line in enumerate(lines, 1):
        digest, _, name = line.strip().partition(" ")
        if not line.strip():
            continue
        if not is_sha256(digest) or not name.strip():
            raise ValueError(f"--sha256 {file}, line {number}: not a line of sha256sum: {line[:80]!r}")
        known[Path(name.strip().removeprefix("*")).name] = digest.lower()
    return known


def is_sha256(text: str) -> bool:
    """Return whether a text is a sha256 in hexadecimal digits."""
    return len(text) == 64 and all(letter in "0123456789abcdefABCDEF" for letter in text)
