"""Stopping by agreement: a signal on any rank ends the run on all ranks at the same step boundary."""

from __future__ import annotations

import torch
import torch.distributed as dist

from opd_megatron.training.stop_signals import StopSignals


class StopRequest:
    """What the ranks make of the signals that came to any of them."""

    def __init__(self, device: torch.device, signals: StopSignals | None = None) -> None:
        """`signals` are those of this process since its start; without them they count from now on."""
        self._device = device
        self._signals = signals or StopSignals()

    def agreed(self) -> bool:
        """Return, the same on every rank, whether any rank has been asked to stop."""
        flag = torch.tensor([int(self._signals.received)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
