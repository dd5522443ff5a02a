"""The reason of a failure, left where launchers look for it: torchrun's variable, which our own launcher sets too. Standard library only."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


def leave_cause(message: str) -> None:
    """Write the message into the file that TORCHELASTIC_ERROR_FILE names, in torchrun's form; nothing where it names none."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": cause}))
