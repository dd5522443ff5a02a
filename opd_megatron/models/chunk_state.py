"""A model chunk's part of a checkpoint: its weights, whoever made its layers, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.gpt import GPTModel


def sharded_weights(chunk: GPTModel, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chunk's sharded state dict without the extra state of Transformer Engine's modules.

    That is a pickle, which nobody reads from a checkpoint here (`models.trusted_pickle`), and which local layers would look for in vain; it holds scales of
    8-bit floats that are kept from step to step, and the scalings of `training.fp8` keep none.
    """
    return {name: entry for name, entry in chunk.sharded_state_dict(metadata=dict(metadata)).items() if not is_extra_state(name)}


def load_weights(chunk: GPTModel, tensors: Mapping[str, Any]) -> None:
    """Set the chunk's weights to those of `sharded_weights`, all of them."""
    missing, unexpected = chunk.load_state_dict(tensors, strict=False)
    differing = [name for name in missing if not is_extra_state(name)] + list(unexpected)
    assert not differing, f"what was read from a checkpoint is not the model's in {differing}"


def is_extra_state(name: str) -> bool:
    """Return whether an entry is a module's extra state; of grouped experts there is one for each, with its number at the end."""
    return name.rpartition(".")[2].rstrip("0123456789") == "_extra_state"
