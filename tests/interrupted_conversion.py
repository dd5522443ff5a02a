"""A conversion that a signal meets when so many of its files are finished: `TOOL SIGNAL FILES`, then the tool's own words."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time

from opd_megatron.conversion.unfinished import FinishedFile, Unfinished


def main() -> int:
    _, tool, name, files, *words = sys.argv
    # A shell that started the tests in the background had them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    add = Unfinished.add

    def add_and_meet(unfinished: Unfinished, file: FinishedFile) -> None:
        add(unfinished, file)
        if len(unfinished.finished) == int(files):
            os.kill(os.getpid(), signal.Signals[name])
            # Python's main thread has to have its turn.
            time.sleep(0.5)

    Unfinished.add = add_and_meet  # type: ignore[method-assign]
    sys.argv = [tool, *words]
    return int(importlib.import_module(tool).main())
