"""What `parallel.megatron` promises whichever version of Megatron-Core is installed. Run with each: `make test` and `make test-newest`.

Not covered: the same checkpoint in two versions, which needs both installed; what was run of that is in opd_megatron/parallel/README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.inference.contexts import StaticInferenceContext

from opd_megatron.config import ParallelLayout
from opd_megatron.models.forward import forward_hidden, inference_mode
from opd_megatron.models.gpt import build_gpt
from opd_megatron.models.weights import load_model, open_weights
from opd_megatron.parallel.groups import student_groups
from opd_megatron.parallel.megatron import PLAIN_VALUES_FILE, load_checkpoint, reads_plain_object
from tests.pool import RankPool
from tests.tiny import write_tiny_model

PLAIN = {"optimizer": {"step": 3, "rates": [0.5, 0.25]}}


def _weight(values: torch.Tensor) -> dict[str, Any]:
    return {"weight": ShardedTensor.from_rank_offsets("weight", values)}


def _save(folder: Path, form: str) -> None:
    """Write a checkpoint with plain values as the versions before 0.19 do ("file") or as 0.19 does ("object"), whichever is installed."""
    folder.mkdir()
    weight = _weight(torch.arange(6.0))
    if form == ("object" if reads_plain_object() else "file"):
        dist_checkpointing.save({**weight, **PLAIN}, str(folder))
    elif form == "object":
        dist_checkpointing.save({**weight, "common_state": ShardedObject("common_state", PLAIN, (1,), (0,))}, str(folder))
        (folder / PLAIN_VALUES_FILE).unlink()
    else:
        dist_checkpointing.save(weight, str(folder))
        torch.save(PLAIN, folder / PLAIN_VALUES_FILE)


def _saved_and_loaded(folder: Path, form: str) -> tuple[bool, dict[str, Any]]:
    student_groups(ParallelLayout(), seed=1)
    _save(folder, form)
    return (folder / PLAIN_VALUES_FILE).exists(), load_checkpoint(_weight(torch.zeros(6)), folder)


@pytest.mark.parametrize("form", ["file", "object"])
def test_plain_values_are_found_where_any_version_writes_them(pool: RankPool, tmp_path: Path, form: str) -> None:
    has_file, loaded = pool.run(_saved_and_loaded, tmp_path / "checkpoint", form, world_size=1)[0]
    assert has_file == (form == "file")
    assert torch.equal(loaded["weight"], torch.arange(6.0))
    assert loaded["optimizer"] == PLAIN["optimizer"]


def _hidden(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the hidden states of a text: all of it at once, of its beginning with a cache, and of its last token after that."""
    groups = student_groups(ParallelLayout(), seed=1)
    source = open_weights(hf=str(folder))
    model = build_gpt(source.architecture, groups, precision="fp32", vocab_multiple=1)
    load_model(model, groups, source, vocab_multiple=1)
    tokens_BS = torch.arange(10).reshape(2, 5)
    cache = StaticInferenceContext(2, 5)
    with inference_mode(model, groups):
        whole = forward_hidden(model, groups, tokens_BS)
        prefill = forward_hidden(model, groups, tokens_BS[:, :4], cache)
        cache.enable_decode_mode()
        step = forward_hidden(model, groups, tokens_BS[:, 4:], cache)
    assert whole is not None
    assert prefill is not None
    assert step is not None
    return whole, prefill, step


def test_a_forward_with_a_cache_gives_the_last_position_alone(pool: RankPool, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", vocab_size=263)
    whole, prefill, step = pool.run(_hidden, folder, world_size=1)[0]
    assert (whole.shape[1], prefill.shape[1], step.shape[1]) == (5, 1, 1)
    # fp32, summed in another order where keys come from the cache.
    torch.testing.assert_close(prefill[:, 0], whole[:, 3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step[:, 0], whole[:, 4], rtol=1e-5, atol=1e-5)
