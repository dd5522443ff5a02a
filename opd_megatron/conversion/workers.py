"""Threads that convert: torch, hashlib and file objects let go of Python's lock while they copy, hash and write, so that processes would gain nothing.

They share a budget of memory, so that what a conversion holds follows from its largest tensor and not from how many work on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager

# What other tensors may take beside the largest.
BUFFER_BYTES = 512 << 20
# What comes on top: lists of names, and for each thread the block that it hashes in and what the C library keeps of freed tensors below 32 MiB.
_PROGRAM_BYTES, _THREAD_BYTES = 64 << 20, 96 << 20


def stated_bytes(largest_bytes: int, workers: int) -> int:
    """Return the most that a conversion may hold; `largest_bytes` is what its largest tensor takes at its peak."""
    return largest_bytes + BUFFER_BYTES + _PROGRAM_BYTES + workers * _THREAD_BYTES


class StoppedError(Exception):
    """Another job failed, or the user asked to stop."""


class Workers:
    """Run jobs on threads until all are done, or the first fails; the others then end at their next `check`."""

    def __init__(self, number: int, largest_bytes: int) -> None:
        """`largest_bytes` is the most that a job will ask for at once."""
        self._number = number
        self._stop = threading.Event()
        self._free_bytes = largest_bytes + BUFFER_BYTES
        self._given_back = threading.Condition()

    def check(self) -> None:
        """Raise StoppedError if the conversion is to end."""
        if self._stop.is_set():
            raise StoppedError

    @contextmanager
    def memory(self, num_bytes: int) -> Iterator[None]:
        """Inside, this much of the budget is this thread's; waits for it."""
        with self._given_back:
            while self._free_bytes < num_bytes:
                self.check()
                self._given_back.wait(timeout=1)
            self._free_bytes -= num_bytes
        try:
            yield
        finally:
            with self._given_back:
                self._free_bytes += num_bytes
                self._given_back.notify_all()

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Run the jobs, begun in this order; raise what the first failing one raised."""
        with ThreadPoolExecutor(self._number, thread_name_prefix="convert") as pool:
            futures = [pool.submit(job) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                for future in futures:
                    future.cancel()
                raise
