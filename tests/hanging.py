"""The runner, in which one rank hangs in its third step, with Python's threads alive or without a turn for any of them."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any


def main() -> int:
    """Run a recipe as `recipes.run` does; the first word on the command line is the rank that hangs, the second `asleep` or `without a turn`."""
    from opd_megatron.training.student import Student
    from recipes import run

    rank, kind = sys.argv[1:3]
    del sys.argv[1:3]
    train, steps = Student.train_step, [0]

    def hang(self: Student, *arguments: Any) -> Any:
        steps[0] += 1
        if steps[0] == 3 and os.environ["RANK"] == rank:
            if kind == "asleep":
                time.sleep(600)
            # PyDLL keeps Python's lock during the call: no other thread of the interpreter runs.
            ctypes.PyDLL(None).sleep(600)
        return train(self, *arguments)

    Student.train_step = hang  # type: ignore[method-assign]
    return run.main()
