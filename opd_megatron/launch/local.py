"""Several ranks on one machine, with an exit code and a last line that tell the truth.

torchrun starts the same processes, but turns every failure into exit code 1 under a traceback of its own, and waits 30 seconds for the
survivors of a crash. Use either; this one keeps exit codes 2 and 75. Standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Survivors of a crash usually notice at once, by a closed connection; those that do not are ended.
_GRACE_SECONDS = 10.0
# A user's mistake, and a stop on request: rank 0 has printed the reason.
_MISTAKE, _INTERRUPTED = 2, 75
_TOLD_BY_THE_RANK = (_MISTAKE, _INTERRUPTED)
_PR_SET_PDEATHSIG = 1


def launch_local(arguments: Sequence[str], num_processes: int) -> int:
    """Run `python -m recipes.run ARGUMENTS` on `num_processes` ranks and return the exit code of the first that failed, else 0.

    Signals are passed on, and the ranks get a TERM if this process dies, so that they can agree on a stop and save.
    """
    with tempfile.TemporaryDirectory(prefix="opd-ranks-") as folder:
        cause_files = [Path(folder) / f"rank_{rank}.json" for rank in range(num_processes)]
        children = _start(arguments, cause_files)
        passed_on = _pass_signals_on(children)
        failed = _first_failure(children)
        if failed is None:
            return 0
        _end_survivors(children)
        if -children[failed].returncode in passed_on:
            # From its first line on, a rank remembers a signal; this one met Python before that.
            print("stopped on request before the run began; start the same command again", flush=True)
            return _INTERRUPTED
        return _report(failed, children[failed].returncode, cause_files[failed])


def _start(arguments: Sequence[str], cause_files: Sequence[Path]) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(cause_files)), "LOCAL_WORLD_SIZE": str(len(cause_files))}
    defaults = {"OMP_NUM_THREADS": "1", **os.environ}
    libc = ctypes.CDLL(None)
    return [
        subprocess.Popen(
            [sys.executable, "-m", "recipes.run", *arguments],
            env={**defaults, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(cause)},
            # Without it, ranks would train on, or wait for ever, after a killed launcher.
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
        )
        for rank, cause in enumerate(cause_files)
    ]


def _pass_signals_on(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Have the ranks get what this process gets; return the list of what they got, which grows."""
    passed_on: list[int] = []

    def forward(number: int, _frame: object) -> None:
        passed_on.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    # A terminal sends INT to the whole group: the ranks have it already, and this process waits for them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return passed_on


def _first_failure(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until a rank fails or all are done; return the first rank seen to fail, death by signal first."""
    while True:
        codes = [child.poll() for child in children]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return min(failed, key=lambda rank: (codes[rank] > 0, rank))  # type: ignore[operator]
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _end_survivors(children: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _GRACE_SECONDS
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _report(rank: int, code: int, cause_file: Path) -> int:
    """Print the cause as the last line, unless the rank said it itself (mistakes and stops), and return the exit code."""
    if code in _TOLD_BY_THE_RANK:
        return code
    if code == 128 + signal.SIGINT:
        print("error: interrupted by a second Ctrl-C; the last checkpoint stays", file=sys.stderr, flush=True)
        return code
    if code < 0:
        print(f"error: rank {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
        return 128 - code
    try:
        message = json.loads(cause_file.read_text())["message"]["message"]
    except (OSError, ValueError, KeyError):
        message = f"exit code {code}"
    print(f"error: rank {rank} failed: {message}", file=sys.stderr, flush=True)
    return code
