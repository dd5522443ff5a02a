"""The runner, in which one rank fails in its second step: between two rounds of the teacher's scores, or of memory in its training."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch


def main() -> int:
    """Run a recipe as `recipes.run` does; the first word on the command line is the rank that fails, the second `between rounds` or `of memory`."""
    from opd_megatron.teacher.routing import Courier
    from opd_megatron.training.student import Student
    from recipes import run

    rank, kind = sys.argv[1:3]
    del sys.argv[1:3]
    send, begin, train, steps = Courier.send, Courier.__init__, Student.train_step, [0, 0]

    def begin_counted(self: Courier, *arguments: Any, **keywords: Any) -> None:
        steps[0] += 1
        begin(self, *arguments, **keywords)

    def fail_after_one_round(self: Courier, rows: Any) -> None:
        if kind == "between rounds" and os.environ["RANK"] == rank and steps[0] == 2 and self._under_way:
            raise RuntimeError("no more rounds")
        send(self, rows)

    def fail_of_memory(self: Student, *arguments: Any) -> Any:
        steps[1] += 1
        if kind == "of memory" and os.environ["RANK"] == rank and steps[1] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return train(self, *arguments)

    Courier.__init__, Courier.send, Student.train_step = begin_counted, fail_after_one_round, fail_of_memory  # type: ignore[method-assign]
    return run.main()
