"""The project's programs in copies of a process that has imported what they import: what they print and how they end, without the seconds of a start."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection, get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Program:
    """`main()` of a module with `words` on its command line, in a process, or with several `ranks` in all that torchrun would start. It runs from here on."""

    def __init__(self, module: str, *words: object, ranks: int = 1) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        self._folder = tempfile.TemporaryDirectory(prefix="opd-program-")
        self.stdout, self.stderr = (Path(self._folder.name) / name for name in ("stdout", "stderr"))
        self.command = [module, *map(str, words)]
        environments = [{}] if ranks == 1 else _rank_environments(ranks)
        self.processes = [context.Process(target=_call_main, args=(self.command, environment, self.stdout, self.stderr)) for environment in environments]
        for process in self.processes:
            process.start()

    def send(self, number: int, rank: int) -> None:
        """Send a signal to one rank, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, number)

    def end_survivors(self, after: float) -> int:
        """Do as a launcher does: once a rank has ended, kill those that still run `after` seconds later, and return their number."""
        connection.wait([process.sentinel for process in self.processes])
        return self._kill_late(after)

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Return what was printed and the exit code: that of the first rank that failed, else 0. AssertionError, and no process left, if they take longer."""
        late = self._kill_late(timeout)
        printed = [file.read_text() if file.exists() else "" for file in (self.stdout, self.stderr)]
        self._folder.cleanup()
        assert not late, f"{self.command} did not end within {timeout} seconds: {printed[1]}"
        failed = [process.exitcode for process in self.processes if process.exitcode]
        return subprocess.CompletedProcess(self.command, failed[0] if failed else 0, *printed)

    def _kill_late(self, seconds: float) -> int:
        """Kill what still runs after this time; return how many they were."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in self.processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        return len(late)


def run_program(module: str, *words: object, ranks: int = 1, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Return what a `Program` printed and its exit code."""
    return Program(module, *words, ranks=ranks).wait(timeout)


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
