"""Stopping by agreement: a signal on any rank ends the run on all ranks at the same step boundary."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

# Slurm sends TERM, or USR1 where asked to, ahead of a time limit or a preemption; HUP is a closed terminal, INT is Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class StopRequest:
    """Remembers a signal until the ranks ask together. A second Ctrl-C does not wait: it raises KeyboardInterrupt."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._received = False
        for number in _SIGNALS:
            # A job under nohup ignores HUP, and shall go on doing so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._received = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def agreed(self) -> bool:
        """Return, the same on every rank, whether any rank has been asked to stop."""
        flag = torch.tensor([int(self._received)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
