"""What reading damaged weights raises, and in one line why."""

from __future__ import annotations

import pickle

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingException

# What reading a missing, cut or altered checkpoint file raises; torch derives its CheckpointException from BaseException.
DAMAGE = (
    *(OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, AssertionError),
    *(pickle.UnpicklingError, CheckpointingException, dcp.api.CheckpointException),
)


def damage_in(error: BaseException) -> str:
    """Return one line on what reading or writing a checkpoint met; torch wraps the reasons of the ranks."""
    if isinstance(error, dcp.api.CheckpointException):
        causes = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
        return damage_in(causes[0]) if causes else "another rank failed"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
