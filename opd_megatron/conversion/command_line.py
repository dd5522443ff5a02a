"""What the two conversion tools share: their options, how they end, and how they are stopped."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from opd_megatron.conversion.settings import Settings, default_workers, read_sha256_file

INTERRUPTED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Two megabytes at a time instead of four kilobytes: fresh memory otherwise costs a conversion as much as its copying. torch reads it when it first allocates.
LARGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")
MEMORY = (
    "Memory, beside the program itself: what the largest tensor takes (its size; twice where it is fused or its stored pieces are joined; once more where "
    "heads are parted, and for --dtype), 576 MiB, and 96 MiB for each worker; --dry-run says what that is."
)


def given_path(text: str) -> Path:
    """Return a path of the command line; an empty one, as of a variable that is not set, is no path."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; is a variable of your shell not set?")
    return Path(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both directions."""
    parser.add_argument("--workers", type=int, default=default_workers(), metavar="N", help="threads that convert and hash (%(default)s)")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not hash the source to compare it with what is known of it")
    parser.add_argument("--dry-run", action="store_true", help="print the mapping and what the disk needs; read headers only, write nothing")
    parser.epilog = f"{MEMORY} An interrupted or failed conversion leaves OUT.partial, and the same command goes on from there."


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return what the options say; ValueError for one that makes no sense."""
    sha256_file: Path | None = getattr(arguments, "sha256", None)
    if sha256_file is not None and not arguments.verify:
        raise ValueError("--sha256 has files compared, and --no-verify has none compared: leave one out")
    return Settings(
        workers=arguments.workers,
        verify=arguments.verify,
        sha256=read_sha256_file(sha256_file) if sha256_file else {},
        keep_unfinished=True,
        show_progress=True,
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )


def prepare_torch() -> None:
    """Set torch up for threads that convert; this process does nothing else."""
    import gc

    import torch

    # Each worker is a thread already.
    torch.set_num_threads(1)
    # Of the archives that a checkpoint's file is a row of; the files have a hash of their own, and torch compares none when it reads.
    torch.serialization.set_crc32_options(False)
    # A collection goes through all that the libraries have made, again and again; nothing here is left in circles.
    gc.disable()


def run(work: Callable[[], None]) -> int:
    """Do the work; return the exit code: 0, 2 after a mistake, which is told in a line, 75 after Ctrl-C or a signal."""
    os.environ.setdefault(*LARGE_PAGES)
    for number in _SIGNALS:
        # A job under nohup ignores HUP, and shall go on doing so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has seen enough, as `head` has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    for number in _SIGNALS:
        # What is finished is being kept: a second one changes nothing.
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
