"""Tensors that leave the device between the phases of a step, and what a phase needed at most.

A storage gives its memory back while every view of it stays valid for later, so Megatron-Core's buffers and optimizers never notice.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch


class Offloaded:
    """The storages of some tensors, which can wait on the host. Values of `frozen` tensors travel to the device only.

    With CUDA, tensors arrive on a stream of their own, in the given order: see `wait_for`. On a CPU the host copy takes the same memory again.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], *, frozen: bool) -> None:
        """Reserve pinned host memory; the tensors stay where they are until `leave`."""
        self._keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._tensors = list({tensor.untyped_storage()._cdata: _whole(tensor) for tensor in tensors if tensor.numel()}.values())
        self._sizes = [tensor.untyped_storage().nbytes() for tensor in self._tensors]
        self._hosts = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in self._tensors]
        self._frozen, self._saved = frozen, False
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._stream = torch.cuda.Stream() if any(tensor.is_cuda for tensor in self._tensors) else None

    @property
    def device_bytes(self) -> int:
        """Bytes that these tensors hold now where they are computed with."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors)

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these are the same storages."""
        return self._keys == {tensor.untyped_storage()._cdata for tensor in tensors}

    def arrive_empty(self) -> None:
        """Allocate the device's memory for values that are about to be written; the next `leave` brings those to the host, of frozen tensors as well."""
        if self._stream is not None:
            # What may still travel must not land on the new values.
            torch.cuda.current_stream().wait_stream(self._stream)
        self._arrived.clear()
        for tensor, size in zip(self._tensors, self._sizes, strict=True):
            tensor.untyped_storage().resize_(size)
        self._saved = False

    def leave(self) -> None:
        """Bring the values to the host, where they are not yet, and free the device's memory."""
        if not (self._frozen and self._saved):
            for tensor, host in zip(self._tensors, self._hosts, strict=True):
                host.copy_(tensor)
            self._saved = True
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(0)

    def arrive(self) -> None:
        """Allocate the device's memory again and bring the values back."""
        for tensor, size in zip(self._tensors, self._sizes, strict=True):
            tensor.untyped_storage().resize_(size)
        if self._stream is None:
            for tensor, host in zip(self._tensors, self._hosts, strict=True):
                tensor.copy_(host)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        self._arrived.clear()
        with torch.cuda.stream(self._stream):
            for tensor, host in zip(self._tensors, self._hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
                self._arrived[tensor.untyped_storage()._cdata] = self._stream.record_event()
        if not self._frozen:
            torch.cuda.current_stream().wait_stream(self._stream)

    def wait_for(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let the current stream wait until these frozen tensors have arrived; what comes later still travels."""
        for tensor in tensors:
            event = self._arrived.get(tensor.untyped_storage()._cdata)
            if event is not None:
                torch.cuda.current_stream().wait_event(event)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a flat view of a tensor's whole storage, in its dtype."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (storage.nbytes() // tensor.element_size(),), (1,))


def start_peak() -> int:
    """Begin a measurement of `peak_bytes`; return the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _process_bytes("VmRSS")


def peak_bytes() -> int:
    """Return the most bytes in use since `start_peak`: allocated on the GPU, or resident in this process where there is none.

    Where the kernel does not let a process reset its peak, that since the process began.
    """
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _process_bytes("VmHWM")


def _process_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
