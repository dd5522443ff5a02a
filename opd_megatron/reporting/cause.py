"""The reason of a failure, left where launchers look for it: torchrun's variable, which our own launcher sets too, and the attempt's folder under Slurm.

Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

# Where slurm/train.sbatch looks for what became of its attempt: a folder that no other attempt writes into.
ATTEMPT_VARIABLE = "OPD_ATTEMPT_DIR"


def attempt_file(name: str) -> Path | None:
    """Return a file of the attempt this process belongs to; None where no job script made a folder for it."""
    folder = os.environ.get(ATTEMPT_VARIABLE)
    return Path(folder) / name if folder else None


def leave_cause(message: str) -> None:
    """Write the message into the file that TORCHELASTIC_ERROR_FILE names, in torchrun's form, and into the attempt's folder unless another rank was first."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": cause}))
    if (cause_file := attempt_file("cause")) is not None:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        # Another rank was first, or the disk is full: what failed is to be told, and not this.
        with contextlib.suppress(OSError), cause_file.open("x") as stream:
            stream.write(f"rank {rank}: {message}\n")
