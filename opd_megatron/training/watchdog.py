"""A run that stands still ends by itself, and every rank says where it stood.

A rank that hangs (a dead file system, a lost message, a kernel that does not return) keeps all others in a collective. Each rank counts the seconds since it
began what it does, so all of them notice, the one that hangs included.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

# Where Python's threads do not get a turn any more, the interpreter's own timer writes the stacks and ends the process.
_LATER_SECONDS = 30.0
# A launcher kills all others when the first process leaves, and the ranks began what they do at not quite the same time: each waits for the others' stacks.
_OTHERS_SECONDS = 5.0


class Watchdog:
    """Ends this process with the stacks of its threads if `begin` or `end` is not called for `seconds`; 0 watches nothing."""

    def __init__(self, seconds: float, rank: int, leave: Callable[[str], None] = lambda message: None) -> None:
        """`leave` is told the reason last, before the process ends: it is where a launcher looks for it."""
        self._seconds, self._rank, self._leave = seconds, rank, leave
        self._doing, self._since = "", time.monotonic()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def doing(self) -> str:
        """What was begun last."""
        return self._doing

    def begin(self, what: str) -> None:
        """Count from now on for this: a phase of a step, a save, an evaluation."""
        self._doing, self._since = what, time.monotonic()
        if self._seconds <= 0:
            return
        faulthandler.dump_traceback_later(self._seconds + _LATER_SECONDS, exit=True)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Stop watching, at the end of a run."""
        self._stopped.set()
        if self._seconds > 0:
            faulthandler.cancel_dump_traceback_later()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._since > self._seconds:
                self._give_up()

    def _give_up(self) -> None:
        message = f"no progress for {self._seconds:g} seconds in {self._doing} (training.watchdog_seconds)"
        sys.stdout.flush()
        print(f"rank {self._rank}: {message}; its threads stand at", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        time.sleep(_OTHERS_SECONDS)
        print(f"error: rank {self._rank}: {message}", file=sys.stderr, flush=True)
        self._leave(message)
        os._exit(1)
