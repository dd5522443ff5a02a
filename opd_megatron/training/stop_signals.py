"""The signals that ask a run to stop, remembered from the first moment on: imports and models take their time. Standard library only."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Slurm sends TERM, or USR1 where asked to, ahead of a time limit or a preemption; HUP is a closed terminal, INT is Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class StopSignals:
    """Remembers that a signal came. A second Ctrl-C does not wait: it raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received = False
        for number in _SIGNALS:
            # A job under nohup ignores HUP, and shall go on doing so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)

    @contextmanager
    def ending_a_wait(self, what: str, seconds: float = 60.0) -> Iterator[None]:
        """Inside, end this process `seconds` after a signal: it may wait, in a call that no handler of Python interrupts, for ranks that will never come."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before, over = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), threading.Event()

        def watch() -> None:
            """Wait for a stop signal or the end of the wait, then for the end of the wait alone."""
            while not self.received and not over.is_set():
                if select.select([reader], [], [], 0.5)[0] and set(os.read(reader, 64)) & set(_SIGNALS):
                    break
            if not over.wait(seconds):
                print(f"error: asked to stop while {what}, which did not end within {seconds:g} seconds", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)

        thread = threading.Thread(target=watch, name="stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            signal.set_wakeup_fd(before)
            os.close(reader)
            os.close(writer)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
