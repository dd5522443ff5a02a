"""What needs a GPU, and how to run it without one: `OPD_GPU_TESTS_DEVICE=cpu` puts the CPU in the GPU's place, to test these tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gpu.ranks import DEVICE
from tests.runs import write_prompts
from tests.tiny import write_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _needs_a_gpu() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device, which torch {torch.__version__} does not find; OPD_GPU_TESTS_DEVICE=cpu takes the CPU for it")


@pytest.fixture
def assert_figure(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Keep a figure for the report of tools/gpu_check.py, which reads it from pytest's XML: `assert_figure(name, value, bar)` fails above the bar."""

    def keep(name: str, value: float, bar: float) -> None:
        record_property("figure", json.dumps({"name": name, "value": value, "bar": bar}))
        assert value <= bar, f"{name}: {value:.3g} is above {bar:.0e}"

    return keep


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher, a model of each kind that computes otherwise, and prompts of uneven length."""
    folder: Path = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", tied=True, vocab_size=263, seed=1, scale=0.3)
    write_tiny_model(folder / "teacher", tied=False, vocab_size=263, seed=2, scale=0.5, hidden_size=96)
    for family in ("qwen3", "qwen3_moe", "gemma2"):
        # Of two layers, of which Gemma 2 has one with a window: the CPU's own bf16 is 1.04 to 1.25 % off in four, above the bar for the GPU's.
        write_tiny_model(folder / family, family, tied=family == "gemma2", vocab_size=263, seed=3, scale=0.5, num_hidden_layers=2)
    write_prompts(folder / "prompts.jsonl")
    return folder
