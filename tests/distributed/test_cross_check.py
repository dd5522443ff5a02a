"""tools/cross_check.py against the real mbridge, where it is installed (`pip install --no-deps mbridge`, it is no dependency); what it says where nothing is.

Not covered: Megatron Bridge, which imports Transformer Engine.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd_megatron.conversion.cross_check import cross_check
from tests.programs import ROOT
from tests.tiny import write_tiny_model


def _cross_check(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Start the tool in a process of its own: mbridge remembers a tied model."""
    command = [sys.executable, "tools/cross_check.py", "--hf", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama", "llama3"])
def test_mbridge_makes_the_same_tensors(tmp_path: Path, family: str, tied: bool) -> None:
    pytest.importorskip("mbridge", reason="needs mbridge: pip install --no-deps mbridge")
    done = _cross_check(write_tiny_model(tmp_path / "hf", family, tied=tied, vocab_size=263))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["different"] == 0
    assert record["tensors"] >= 26


class _Concatenates:
    """Makes queries, keys and values one after another, knows no head, and takes everything else for the final norm."""

    library = "other"

    def make(self, name: str, read: Callable[[str], torch.Tensor]) -> tuple[list[str], torch.Tensor]:
        if name == "output_layer.weight":
            raise KeyError(name)
        qkv = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
        parts = qkv if name.endswith("linear_qkv.weight") else ["model.norm.weight"]
        return parts, torch.cat([read(part) for part in parts])


def test_another_mapping_is_seen(tmp_path: Path) -> None:
    found = {one.name: one.difference for one in cross_check(write_tiny_model(tmp_path / "hf", "llama", num_hidden_layers=1), _Concatenates())}
    assert len(found) == 9
    assert found["output_layer.weight"] == "other makes none: KeyError: 'output_layer.weight'"
    # The first two query heads are where they belong; other's third is our first key head.
    assert str(found["decoder.layers.0.self_attention.linear_qkv.weight"]).endswith("values are not other's, the first at [32, 0]")
    assert found["embedding.word_embeddings.weight"] == "made of model.embed_tokens.weight; other makes it of model.norm.weight"
    assert [name for name, difference in found.items() if difference is None] == ["decoder.final_layernorm.weight"]


@pytest.mark.parametrize(("library", "module"), [("mbridge", "mbridge"), ("megatron-bridge", "megatron.bridge")])
def test_a_library_that_is_not_there_is_named(library: str, module: str) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"needs an environment without {library}")
    done = _cross_check(ROOT / "recipes" / "assets" / "tiny_student", "--with", library)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {library} is not installed"
