"""Stopping by agreement: a signal on any rank ends the run on all ranks at the same step boundary."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Remembers SIGTERM and SIGUSR1 (what Slurm sends ahead of a time limit or a preemption) until the ranks ask together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, _signal: int, _frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """Return, the same on every rank, whether any rank has been asked to stop."""
        flag = torch.tensor([int(self._received)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
