"""What the versions of Megatron-Core from 0.16.1 to 0.19.2 do differently, as far as it is met here: the one place that knows.

Each difference is asked of the running version by what it has, not by its number, and says since when it is and when the answer to it can go.
What all of these versions lack alike stays where it is needed (`training/optimizer.py`, `parallel/cpu.py`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import queue
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.strategies.common as plain_values
import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
import megatron.core.inference.utils as inference_utils
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.inference.contexts import BaseInferenceContext, DynamicInferenceContext
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec

# Before 0.19 plain values are in this file; since then they are one more object among the tensors.
PLAIN_VALUES_FILE = "common.pt"
_PLAIN_VALUES_KEY = ShardedObject("common_state", None, (1,), (0,)).unique_key

# What newer versions log as warnings on every rank, and no user can act on: how it begins, by logger. Delete each when we do what it asks for.
_ADVICE = {
    # HybridModel is to take GPTModel's place (0.19).
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # DistributedDataParallel lays out its buffers itself, as it did before one could hand it a layout (0.18).
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    # Another package is to write checkpoints (0.17); see `begin_save`.
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    # Older versions' checkpoints have plain values in a file (0.19), and so have converted ones, for those versions to read.
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}


def quiet_advice() -> None:
    """Drop the messages of _ADVICE for the rest of the process. Safe to call again."""
    for name, beginning in _ADVICE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(beginning))


class _Without(logging.Filter):
    """Lets pass what does not begin with a text."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def generating(cache: BaseInferenceContext | None) -> AbstractContextManager[None]:
    """Return a context in which a forward with a cache gives the last position alone; for one without a cache it does nothing.

    To 0.17 a model in evaluation mode that gets a cache generates. Since 0.18 a flag of the process says so; without it all positions come back.
    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.18.2/megatron/core/inference/utils.py. Delete the question when the range begins at 0.18.
    """
    mode = getattr(inference_utils, "InferenceMode", None)
    return mode.active() if mode is not None and cache is not None else nullcontext()


def makes_paged_caches() -> bool:
    """Return whether DynamicInferenceContext takes a model's sizes, one by one, as `rollout/paged_cache.py` gives them.

    Since 0.17 it takes two configurations instead, of the model and of inference. Delete the question when the cache is made so, and the range begins at 0.17.
    """
    return "params_dtype" in inspect.signature(DynamicInferenceContext.__init__).parameters


def begin_save(state: dict[str, Any], folder: Path, content: dict[str, Any]) -> AsyncRequest:
    """Return what every rank has left to do of a save by Megatron-Core's own writer: `preload_fn`, `async_fn` with its arguments, `finalize_fns`.

    Since 0.17 another package's writer is the default, nvidia-resiliency-ext's, which the project does not need. When Megatron-Core drops its own, as it
    announces from 0.17, `training/background_write.py` needs another way to the files. Delete the question when the range begins at 0.17.
    """
    # Megatron's own queue would start a manager process on every rank.
    filesystem_async._results_queue = queue.Queue()
    own_writer = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
    request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, content_metadata=content, **own_writer)
    assert request is not None, "an asynchronous save returns what is left to do"
    return request


def load_checkpoint(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what `dist_checkpointing.load` does, from a checkpoint that any of the versions wrote.

    0.19 reads what older versions wrote. These look for plain values (Adam's step, learning rates) in a file that 0.19 does not write.
    Delete when the range begins at 0.19: `dist_checkpointing.load` is enough then.
    """
    with nullcontext() if reads_plain_object() or not _has_plain_object(folder) else _plain_values_from_object(folder):
        return dist_checkpointing.load(wanted, str(folder))


def reads_plain_object() -> bool:
    """Return whether the running version keeps plain values as an object among the tensors (0.19), and not in a file of their own."""
    return hasattr(serialization, "_legacy_common_state_exists")


def _has_plain_object(folder: Path) -> bool:
    return not (folder / PLAIN_VALUES_FILE).is_file() and _PLAIN_VALUES_KEY in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata


@contextmanager
def _plain_values_from_object(folder: Path) -> Iterator[None]:
    """Let a version before 0.19 find the plain values where 0.19 puts them."""
    # A strategy's method in 0.16, a function in 0.17 and 0.18.
    owner: Any = getattr(plain_values, "TorchCommonLoadStrategy", serialization)
    original = owner.load_common
    owner.load_common = lambda *_: _read_plain_object(folder)
    try:
        yield
    finally:
        owner.load_common = original


def _read_plain_object(folder: Path) -> dict[str, Any]:
    """Return {name: value}; torch loads tensors and plain values only (`opd_megatron.import_megatron`)."""
    state: dict[str, Any] = {_PLAIN_VALUES_KEY: None}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    # Objects are stored in a list of one.
    return state[_PLAIN_VALUES_KEY][0]


def route_without_transformer_engine() -> None:
    """Let a router compute without Transformer Engine: 0.16.1 asks `te_general_gemm is not None` of a name it then never bound. Delete from 0.17."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def feed_forward_parts(layer: ModuleSpec) -> Any:
    """Return what a layer's feed-forward is made of, `linear_fc1` and `linear_fc2` among it, each to be replaced.

    To 0.17 it is in a ModuleSpec, since 0.18 in a partial call. Delete the question when the range begins at 0.18.
    """
    made = layer.submodules.mlp
    return made.keywords["submodules"] if isinstance(made, functools.partial) else made.submodules
