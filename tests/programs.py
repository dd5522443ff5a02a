"""The project's programs in copies of a process that has imported what they import: what they print and how they end, without the seconds of a start."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_program(module: str, *words: object, ranks: int = 1, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Return what `main()` of a module printed and returned, called with `words` on its command line; with several `ranks`, of all that torchrun would start.

    The exit code is that of the first rank that failed, else 0.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with tempfile.TemporaryDirectory(prefix="opd-program-") as folder:
        (stdout, stderr) = (Path(folder) / name for name in ("stdout", "stderr"))
        environments = [{}] if ranks == 1 else _rank_environments(ranks)
        command = [module, *map(str, words)]
        processes = [context.Process(target=_call_main, args=(command, environment, stdout, stderr)) for environment in environments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"{command} did not end within {timeout} seconds: {stderr.read_text()}"
        failed = [process.exitcode for process in processes if process.exitcode]
        return subprocess.CompletedProcess(command, failed[0] if failed else 0, stdout.read_text(), stderr.read_text())


def _rank_environments(ranks: int) -> list[dict[str, str]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _call_main(command: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    os.chdir(ROOT)
    os.environ.update(environment)
    for file, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = command
    sys.exit(importlib.import_module(command[0]).main())
