"""A file that is hashed while it is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from opd_megatron.models.file_digests import new_hasher

# Beside what a conversion does with a byte, sha256 (1.8 GB/s a core with instructions for it, 0.4 without) is slow and crc32 (4 GB/s) is not. Neither is proof
# against somebody who changes the record as well.
ALGORITHM = "crc32"
# Small enough to be in a processor's cache between hashing and writing, and to stop soon.
_BLOCK_BYTES, _FLUSH_BYTES = 1 << 20, 64 << 20


class HashedFile:
    """A new file, written from its beginning, for torch.save among others. `each_block` is told of bytes written, and may raise to end it."""

    def __init__(self, path: Path, each_block: Callable[[int], None]) -> None:
        self._file = path.open("wb", buffering=1 << 16)
        self._hasher = new_hasher(ALGORITHM)
        self._each_block = each_block
        self.position = 0
        self._since_flush = 0
        self._error: OSError | None = None

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                # What the journal calls finished is on the disk.
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """Raise what the file system refused, where a library in the block makes another error of it."""
        try:
            yield
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, data: Any) -> int:
        try:
            return self._write(data)
        except OSError as error:
            self._error = error
            raise

    def _write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            self._hasher.update(block)
            self._file.write(block)
            self._each_block(len(block))
            self._since_flush += len(block)
            if self._since_flush >= _FLUSH_BYTES:
                self._begin_writing()
        self.position += len(view)
        return len(view)

    def _begin_writing(self) -> None:
        """Have the disk begin with what was written, so that little is left for the end; what lies in memory stays readable there until it is."""
        self._since_flush = 0
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Do nothing: torch.save asks for it after every tensor."""

    def digest(self) -> list[Any]:
        """Return [bytes, hash] of what was written."""
        return [self.position, self._hasher.hexdigest()]
