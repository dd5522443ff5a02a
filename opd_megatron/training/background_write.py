"""One rank's share of a checkpoint on its way to the disk: copied to the host at a step's end, written and hashed by a thread while training goes on.

Megatron-Core has processes for it, forked from the trainer for every save; a thread waits for the same disk and inherits no lock that nobody releases.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from opd_megatron.models.file_digests import Digests, digest_of
from opd_megatron.parallel.megatron import begin_save
from opd_megatron.parallel.world import shared_errors

# What is written for every file: in a process of its own, Megatron-Core also stops Python's garbage collection, which here would stop the trainer's.
_write_file = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)


class BackgroundWrite:
    """A distributed checkpoint of `state` in `folder`, begun by every rank at the same time and finished by every rank together.

    What `changes` meanwhile is copied; nothing else of the state may change before `finish`.
    """

    def __init__(self, state: dict[str, Any], folder: Path, content: dict[str, Any], *, changes: Iterable[torch.Tensor]) -> None:
        self._request: AsyncRequest = begin_save(state, folder, content)
        self._folder = folder
        self._error: OSError | None = None
        self.digests: Digests = {}
        self._thread = threading.Thread(target=self._write, args=(_buckets_on_host(self._request, changes),), name="checkpoint", daemon=True)
        self._thread.start()

    def is_written_everywhere(self) -> bool:
        """Return, the same on every rank, whether all have written their share, well or not."""
        written = torch.tensor([int(not self._thread.is_alive())], device=torch.cuda.current_device())
        dist.all_reduce(written, op=dist.ReduceOp.MIN)
        return bool(written.item())

    def finish(self) -> None:
        """Wait for the rank's share, then write the index. On every rank CheckpointException if one could not write, ValueError if one could not read."""
        self._thread.join()
        # Rank 0 gathers what the ranks wrote, writes the index, and tells all if any failed.
        for finalize in self._request.finalize_fns:
            finalize()
        with shared_errors():
            if self._error is not None:
                raise self._error

    def _write(self, buckets: list[Any]) -> None:
        """Write the files of this rank one after another, and hash them while they are in the page cache."""
        if not buckets:
            return
        transforms, results = self._request.async_fn.args[0], self._request.async_fn_args[2]
        told: queue.Queue[Any] = queue.Queue()
        tickets: queue.Queue[int] = queue.Queue()
        written: dict[int, Any] | Exception = {}
        while buckets:
            number = len(buckets) - 1
            tickets.put(number)
            # Popped, so that what is written does not wait in memory for the rest.
            _write_file(transforms, number, buckets.pop(), told, tickets, use_fsync=True)
            _, outcome = told.get()
            if isinstance(outcome, Exception):
                written = outcome
                break
            assert isinstance(written, dict)
            written[number] = outcome
        if isinstance(written, dict):
            try:
                names = {result.storage_data.relative_path for outcomes in written.values() for result in outcomes}
                self.digests = {name: digest_of(self._folder / name) for name in sorted(names)}
            except OSError as error:
                self._error = error
        results.put(written)


def _buckets_on_host(request: AsyncRequest, changes: Iterable[torch.Tensor]) -> list[Any]:
    """Return (path, name, (bytes, tensors)) of every file this rank writes, in host memory that no tensor of `changes` has a part in."""
    if request.async_fn is None:
        return []
    # What comes from a device has been copied, and so has most of the rest: slices of larger tensors.
    in_use = {tensor.untyped_storage().data_ptr() for tensor in changes}
    buckets = [
        (path, name, (told, [(item, tensor.clone() if tensor.untyped_storage().data_ptr() in in_use else tensor) for item, tensor in tensors]))
        for path, name, (told, tensors) in request.preload_fn()
    ]
    # The request would keep the device's tensors; only their number is asked for later.
    request.async_fn_args[1][:] = [None] * len(buckets)
    return buckets
