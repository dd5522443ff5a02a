"""Checkpoints of somebody else's, with code in them that would run on every node that reads them. Not covered: Transformer Engine's own state of FP8."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import CheckpointConfig, RunConfig
from tests.pool import RankPool
from tests.programs import run_program
from tests.runs import run_job, small_config


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._proof}",)


def in_index(step: Path, proof: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(Evil(proof)))


def beside_the_index(step: Path, proof: Path) -> None:
    """Leave the index whole, and have one more thing in it."""
    metadata = pickle.loads((step / ".metadata").read_bytes())
    metadata.planner_data = {"more": Evil(proof)}
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common(step: Path, proof: Path) -> None:
    torch.save({"optimizer": Evil(proof)}, step / "common.pt")


def in_place_of_a_weight(step: Path, proof: Path) -> None:
    """Have the index lead to it: tensors are stored one by one, each as a pickle."""
    metadata = pickle.loads((step / ".metadata").read_bytes())
    torch.save(Evil(proof), step / "evil.distcp")
    for index, stored in metadata.storage_data.items():
        if index.fqn == "decoder.final_layernorm.weight":
            metadata.storage_data[index] = dataclasses.replace(stored, relative_path="evil.distcp", offset=0, length=(step / "evil.distcp").stat().st_size)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


PLACES: dict[str, Callable[[Path, Path], None]] = {
    "index": in_index,
    "beside the index": beside_the_index,
    "common state": in_common,
    "in place of a weight": in_place_of_a_weight,
}


@pytest.fixture(scope="module")
def trained(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    pool.run(run_job, config_of(models, 1), run, world_size=1)
    return run


def config_of(models: Path, steps: int) -> RunConfig:
    config = small_config(models)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps), checkpoint=CheckpointConfig(every_steps=1))


def _resume(config: RunConfig, run: Path) -> str:
    try:
        return run_job(config, run)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", PLACES)
def test_a_resumed_run_runs_no_code_of_a_checkpoint(models: Path, trained: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    run, proof = tmp_path / "run", tmp_path / "proof"
    shutil.copytree(trained, run)
    step = run / "checkpoints" / "step_1"
    # Whoever alters a checkpoint alters its checksums.
    (step / "checksums.json").unlink()
    PLACES[name](step, proof)
    (message,) = pool.run(_resume, config_of(models, 2), run, world_size=1)
    assert not proof.exists()
    assert "step_1" in message
    assert "damaged" in message


@pytest.mark.parametrize("name", ["index", "beside the index"])
def test_an_export_runs_no_code_of_a_checkpoint(trained: Path, tmp_path: Path, name: str) -> None:
    step, proof = tmp_path / "step_1", tmp_path / "proof"
    shutil.copytree(trained / "checkpoints" / "step_1", step)
    PLACES[name](step, proof)
    done = run_program("tools.convert_megatron_to_hf", "--checkpoint", step, "--out", tmp_path / "hf")
    assert done.returncode == 2
    assert "which has no place in a checkpoint's index" in done.stderr.splitlines()[-1]
    assert not proof.exists()
    assert not (tmp_path / "hf").exists()
