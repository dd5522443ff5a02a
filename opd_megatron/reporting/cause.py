"""The reason of a failure, in words, and left where launchers look for it: torchrun's variable, which our own launcher sets too, and the attempt's folder
under Slurm.

Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

# What lessens the memory of a phase, by a word in the name of what was done; the first word that fits counts.
MEMORY_LEVERS = {
    "evaluation": ("lower rollout.batch_sequences", "lower evaluation.max_response_tokens", "set evaluation.teacher=false where it was the teacher's"),
    "search": ("lower rollout.batch_sequences", "lower rollout.max_response_tokens", "set effopd.enabled=false"),
    "'probe'": ("lower rollout.batch_sequences", "lower rollout.max_response_tokens", "set effopd.enabled=false"),
    "'rollout'": ("lower rollout.batch_sequences", "lower rollout.max_response_tokens", "set training.offload_optimizer=true"),
    "'teacher'": ("lower teacher.micro_batch", "set teacher.placement=offloaded", "raise teacher.layout.tensor"),
    "'weigh'": ("lower training.micro_batch or training.micro_batch_tokens", "set teacher.placement=offloaded", "raise student.layout.tensor"),
    "'train'": ("set training.recompute=full", "lower training.micro_batch or training.micro_batch_tokens", "raise student.layout.tensor"),
    "checkpoint": ("set training.offload_optimizer=true", "set teacher.placement=offloaded", "raise student.layout.tensor"),
    "": ("set teacher.placement=offloaded", "set training.offload_optimizer=true", "raise student.layout.tensor or student.layout.pipeline"),
}
# Where slurm/train.sbatch looks for what became of its attempt: a folder that no other attempt writes into.
ATTEMPT_VARIABLE = "OPD_ATTEMPT_DIR"


def out_of_memory(doing: str, said: str) -> str:
    """Return one line for a GPU that had no memory left: what was done, what to turn, and what the allocator said."""
    levers = next(levers for word, levers in MEMORY_LEVERS.items() if word in doing)
    return f"out of GPU memory in {doing}: {', or '.join(levers)} (tools/plan.py says what each saves); {' '.join(said.split())}"


def attempt_file(name: str) -> Path | None:
    """Return a file of the attempt this process belongs to; None where no job script made a folder for it."""
    folder = os.environ.get(ATTEMPT_VARIABLE)
    return Path(folder) / name if folder else None


def leave_cause(message: str, *, is_mistake: bool = False) -> None:
    """Write the message into the file that TORCHELASTIC_ERROR_FILE names, in torchrun's form, and into the attempt's folder unless another rank was first.

    A mistake of the user's leaves a file `mistake` beside it: the job must end with 2, and srun tells the largest exit code, which is that of a rank it ended.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": cause}))
    if (cause_file := attempt_file("cause")) is not None:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        # Another rank was first, or the disk is full: what failed is to be told, and not this.
        with contextlib.suppress(OSError), cause_file.open("x") as stream:
            stream.write(f"rank {rank}: {message}\n")
            if is_mistake:
                cause_file.with_name("mistake").touch()
