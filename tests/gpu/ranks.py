"""Ranks in fresh processes that join a job as a run does: CUDA cannot be used in a copy of a process that has looked for it, so these are no `tests.pool`."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Where what is tested computes; its reference is always the CPU.
DEVICE = os.environ.get("OPD_GPU_TESTS_DEVICE", "cuda")


def on_ranks(function: Callable[..., Any], *arguments: Any, num_ranks: int = 1, device: str = DEVICE, timeout: float = 240) -> list[Any]:
    """Return what `function(device, *arguments)` returns on every rank; AssertionError with every rank's traceback if one raised or did not answer.

    TF32 is off, and kernels that add in no fixed order are replaced where torch can: two runs give the same bits.
    """
    context = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="opd-gpu-ranks-") as folder:
        files = [Path(folder) / f"rank_{rank}" for rank in range(num_ranks)]
        processes = []
        for rank, file in enumerate(files):
            process = context.Process(target=_take_part, args=(function, arguments, file))
            # A new interpreter takes the environment as it is now.
            with _environment(_variables(rank, num_ranks, device, Path(folder))):
                process.start()
            processes.append(process)
        deadline = time.monotonic() + timeout
        try:
            while time.monotonic() < deadline and any(process.exitcode is None for process in processes) and not any(process.exitcode for process in processes):
                time.sleep(0.05)
            if any(process.exitcode for process in processes):
                # The others notice by a closed connection, or never.
                time.sleep(3)
        finally:
            for process in processes:
                process.kill()
                process.join()
        outcomes = [pickle.loads(file.read_bytes()) if file.is_file() else ("silence", "no answer") for file in files]
    errors = [f"rank {rank}: {said}" for rank, (kind, said) in enumerate(outcomes) if kind != "result"]
    assert not errors, "\n".join(errors)
    return [result for _, result in outcomes]


_PORTS: dict[Path, str] = {}


def _variables(rank: int, num_ranks: int, device: str, folder: Path) -> dict[str, str]:
    """Return what a launcher of one node sets."""
    if folder not in _PORTS:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            _PORTS[folder] = str(listener.getsockname()[1])
    size = str(num_ranks)
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _PORTS[folder]},
        **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        # What a test imports is imported first, and may ask for GPUs: these must be out of sight from the start.
        **({"OPD_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    }


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _take_part(function: Callable[..., Any], arguments: tuple[Any, ...], file: Path) -> None:
    outcome: tuple[str, Any]
    try:
        import opd_megatron

        opd_megatron.import_megatron()
        import torch

        from opd_megatron.parallel.world import join_world

        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        if torch.cuda.is_available():
            torch.use_deterministic_algorithms(True, warn_only=True)
        device = join_world()
        outcome = ("result", function(device, *arguments))
        torch.distributed.barrier()
    except BaseException:
        outcome = ("error", traceback.format_exc())
    partial = file.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(file)
    # An orderly end of the process groups would wait for ranks that failed.
    os._exit(outcome[0] != "result")
