"""A stop request that comes before ranks have met."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

# As a rank waits whose peer never comes: in a call of torch that no handler of Python interrupts.
WAIT = """
import sys, datetime, torch.distributed as dist
from opd_megatron.training.stop_signals import StopSignals
signals = StopSignals()
with signals.ending_a_wait("waiting for the other ranks", seconds=1.0):
    print("waiting", flush=True)
    dist.TCPStore("127.0.0.1", 0, 2, True, timeout=datetime.timedelta(seconds=60))
"""


def test_a_rank_that_waits_for_others_in_vain_ends_after_a_stop() -> None:
    rank = subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "waiting\n"
    time.sleep(0.5)
    rank.terminate()
    _, told = rank.communicate(timeout=20)
    assert rank.returncode == 128 + signal.SIGTERM
    assert told.splitlines()[-1] == "error: asked to stop while waiting for the other ranks, which did not end within 1 seconds"


def test_a_wait_that_ends_leaves_the_signal_to_the_run() -> None:
    code = """
import os, signal, time
from opd_megatron.training.stop_signals import StopSignals
signals = StopSignals()
with signals.ending_a_wait("waiting", seconds=0.5):
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1)
print(signals.received)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
