"""A pool of processes for distributed tests: started once, each call a fresh gloo world of 1 to 4 ranks.

A fork server imports torch and Megatron-Core once, so a world costs a fraction of a second instead of the seconds of an import.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SECONDS_AFTER_FIRST_ERROR = 5


def _serve(rank: int, inbox: Any, outbox: Any, stacks: Path) -> None:
    """Run one job after another; a job is (function, arguments, world size, rendezvous file). SIGUSR1 writes every thread's stack to `stacks`."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    import datetime
    import faulthandler
    import gc

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from opd_megatron.parallel.cpu import enable_cpu_backend

    torch.set_num_threads(1)
    # What was imported is never garbage: a collection need not look at it.
    gc.freeze()
    faulthandler.register(signal.SIGUSR1, file=stacks.open("w"), all_threads=True)
    enable_cpu_backend()
    while (job := _next_job(inbox)) is not None:
        function, arguments, world_size, store = job
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=120))
            outcome = ("result", function(*arguments))
            dist.barrier()
        except BaseException:
            outcome = ("error", traceback.format_exc())
        outbox.put((rank, outcome))
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        # A group's threads and sockets end with its last reference, which a model in a cycle of references would keep.
        gc.collect()


def _next_job(inbox: Any) -> Any:
    """Return the next job, or None when the test session is gone. These processes are no daemons: checkpoint writers fork from them."""
    session = multiprocessing.parent_process()
    while session is not None and session.is_alive():
        try:
            return inbox.get(timeout=5)
        except queue.Empty:
            continue
    return None


class RankPool:
    """`run` calls a top-level function on every rank and returns the results by rank."""

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._folder = tempfile.TemporaryDirectory(prefix="opd-pool-")
        self._jobs = 0
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any, world_size: int = 4, timeout: float = 120) -> list[Any]:
        """Return each rank's result; AssertionError with every rank's traceback if one raised or did not answer in `timeout` seconds."""
        if not self._processes:
            self._start()
        self._jobs += 1
        store = Path(self._folder.name) / f"store_{self._jobs}"
        for inbox in self._inboxes[:world_size]:
            inbox.put((function, arguments, world_size, store))
        outcomes: dict[int, tuple[str, Any]] = {}
        try:
            while len(outcomes) < world_size:
                rank, outcome = self._outbox.get(timeout=timeout)
                outcomes[rank] = outcome
                if outcome[0] == "error":
                    # The others may wait in a collective for ever.
                    timeout = _SECONDS_AFTER_FIRST_ERROR
        except queue.Empty:
            pass
        errors = [f"rank {rank}:\n{outcome[1]}" for rank, outcome in sorted(outcomes.items()) if outcome[0] == "error"]
        silent = sorted(set(range(world_size)) - set(outcomes))
        if errors or silent:
            hung = [self._silence_of(rank) for rank in silent]
            self.close()
            raise AssertionError("\n".join([*errors, *hung]))
        return [outcomes[rank][1] for rank in range(world_size)]

    def _silence_of(self, rank: int) -> str:
        """Return where a rank that gave no answer stands, or how it died."""
        process = self._processes[rank]
        if not process.is_alive():
            return f"rank {rank} gave no answer: it ended with exit code {process.exitcode}"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
        return f"rank {rank} gave no answer; it stands at\n{self._stacks[rank].read_text()}"

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(self._size)]
        self._stacks = [Path(self._folder.name) / f"stacks_of_rank_{rank}" for rank in range(self._size)]
        ranks = zip(range(self._size), self._inboxes, self._stacks, strict=True)
        self._processes = [context.Process(target=_serve, args=(rank, inbox, self._outbox, stacks)) for rank, inbox, stacks in ranks]
        for process in self._processes:
            process.start()

    def close(self) -> None:
        """End every process; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
