"""Tiny models and one run of theirs, for all distributed tests that want no others."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.converting import PARTS, TO_MEGATRON, converted, shards_of
from tests.pool import RankPool
from tests.runs import run_job, small_config, write_prompts
from tests.tiny import write_tiny_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher folder, and prompts of uneven length."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", tied=True, vocab_size=263, seed=1, scale=0.3, num_hidden_layers=4)
    write_tiny_model(folder / "teacher", tied=False, vocab_size=263, seed=2, scale=0.5, hidden_size=96)
    write_prompts(folder / "prompts.jsonl")
    return folder


@pytest.fixture(scope="session")
def recorded(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-process run whose rollouts the other layouts replay."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    config = small_config(models)
    pool.run(run_job, dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, record=True)), run, world_size=1)
    return run


@pytest.fixture(scope="session")
def planned_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models to plan for, dense and with experts."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", "qwen3", tied=True, vocab_size=263, hidden_size=128)
    write_tiny_model(folder / "llama", "llama", vocab_size=263, hidden_size=128)
    write_tiny_model(folder / "gemma2", "gemma2", tied=True, vocab_size=263, hidden_size=128)
    write_tiny_model(folder / "phi3", "phi3", vocab_size=263)
    write_tiny_model(folder / "wide_gemma2", "gemma2", vocab_size=263, hidden_size=128, intermediate_size=1024)
    # As in real models the feed-forward is the widest part of a layer; of a mixture, the copies of every token.
    write_tiny_model(folder / "wide", vocab_size=263, hidden_size=128, intermediate_size=512)
    write_tiny_model(folder / "wide_mixture", "qwen3_moe", vocab_size=263, hidden_size=128, num_experts_per_tok=6)
    write_tiny_model(folder / "teacher", "qwen3", vocab_size=263, hidden_size=96)
    write_tiny_model(folder / "mixture", "qwen3_moe", tied=True, vocab_size=263, hidden_size=128)
    write_tiny_model(folder / "mixture_teacher", "qwen3_moe", vocab_size=263, hidden_size=96, norm_topk_prob=False)
    return folder


@pytest.fixture(scope="session")
def planner() -> Iterator[Callable[..., Any]]:
    """Call a function in a process that is no rank: a plan makes a process one of a world that does not exist."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result(timeout=300)


@pytest.fixture(scope="session")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files."""
    folder = write_tiny_model(tmp_path_factory.mktemp("hf") / "hf", vocab_size=263)
    shards_of(folder)
    return folder


@pytest.fixture(scope="session")
def sharded_checkpoint(sharded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a checkpoint of several files."""
    out = tmp_path_factory.mktemp("checkpoint") / "checkpoint"
    converted(TO_MEGATRON, sharded_folder, out, *PARTS)
    return out


@pytest.fixture
def hf(sharded_folder: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sharded_folder, tmp_path / "hf"))


@pytest.fixture
def checkpoint(sharded_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sharded_checkpoint, tmp_path / "sharded_checkpoint"))
