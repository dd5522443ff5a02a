"""How far a conversion is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts bytes from any thread, and shows them on stderr if `shown`."""

    def __init__(self, total_bytes: int, *, shown: bool) -> None:
        self._total_bytes, self._done_bytes = total_bytes, 0
        self._lock = threading.Lock()
        self._began = self._last_line = time.monotonic()
        self._lines = shown and not sys.stderr.isatty()
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, file=sys.stderr) if shown and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        with self._lock:
            self._done_bytes += num_bytes
            if self._bar is not None:
                self._bar.update(num_bytes)
            elif self._lines and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self._began
        rate = self._done_bytes / seconds
        left = f", {(self._total_bytes - self._done_bytes) / rate:.0f} s left" if rate else ""
        return f"{self._done_bytes / 1e9:.1f} of {self._total_bytes / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s{left}"
