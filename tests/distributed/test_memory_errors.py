"""Too little GPU memory, found before anything is loaded or in the middle of a run: what the ranks say, and how they end.

The plan and its ways out are in tests/unit/test_free_memory.py. Not covered: a GPU; its free bytes and its error are given.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from opd_megatron.config import RunConfig
from opd_megatron.models.weights import open_weights
from opd_megatron.planning.architectures import KnownModel
from opd_megatron.reporting.cause import MEMORY_LEVERS, out_of_memory
from opd_megatron.training.free_memory import check_free_memory
from recipes.run import find_recipe
from tests.distributed.test_faults import _command
from tests.distributed.test_faults import models as faults_models
from tests.pool import RankPool
from tests.programs import run_program
from tests.runs import small_config

__all__ = ["faults_models"]


def _checked(config: RunConfig, free_bytes: list[int]) -> tuple[str | None, list[str]]:
    """Check as a run does, with so many bytes free on each rank; return the refusal and what was noted."""
    notes: list[str] = []
    student, teacher = (KnownModel(source.architecture, source.assets) for source in (open_weights(hf=config.student.hf), open_weights(hf=config.teacher.hf)))
    try:
        check_free_memory(config, student, teacher, free_bytes[dist.get_rank()], None, notes.append)
    except ValueError as error:
        return str(error), notes
    return None, notes


def test_all_ranks_refuse_what_one_of_them_has_too_little_memory_for(models: Path, pool: RankPool) -> None:
    plenty = 1 << 40
    config = small_config(models, pipeline=2)
    for message, notes in pool.run(_checked, config, [plenty] * 4):
        assert message is None
        assert len(notes) == 1
        assert notes[0].startswith("memory: rank 0 is planned to need ")
    for rank, (message, notes) in enumerate(pool.run(_checked, config, [plenty, 1 << 16, 1 << 17, plenty])):
        assert message is not None
        assert notes == []
        # The one that lacks most, once.
        assert message.startswith("rank 1: " * (rank != 1) + "too little GPU memory: rank 1 needs ")
        assert message.endswith("; training.check_memory=false begins all the same")


def test_every_lever_is_a_key_of_the_configuration() -> None:
    values: dict[str, Any] = find_recipe("quickstart")().to_json()
    for levers in MEMORY_LEVERS.values():
        keys = [key for lever in levers for key in re.findall(r"(?<!/)\b[a-z]+(?:[.][a-z_]+)+", lever)]
        assert len(keys) >= len(levers)
        for key in keys:
            section = values
            for name in key.split("."):
                assert name in section, key
                section = section[name]


@pytest.mark.parametrize(
    ("doing", "lever"),
    [
        ("the phase 'train' of step 3", "set training.recompute=full"),
        ("the phase 'rollout' of step 3", "lower rollout.batch_sequences"),
        ("the phase 'teacher' of step 3", "lower teacher.micro_batch"),
        ("the evaluation after step 3", "lower evaluation.max_response_tokens"),
        ("the search after step 3", "set effopd.enabled=false"),
        ("loading", "set teacher.placement=offloaded"),
    ],
)
def test_a_phase_has_its_own_levers(doing: str, lever: str) -> None:
    message = out_of_memory(doing, "CUDA out of memory.\nTried to allocate 2.00 GiB.")
    assert message.startswith(f"out of GPU memory in {doing}: ")
    assert lever in message
    assert message.endswith("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert len(message.splitlines()) == 1


def test_a_run_that_ends_for_want_of_memory_names_the_phase_and_is_a_crash(faults_models: Path, tmp_path: Path) -> None:
    words = _command(faults_models, tmp_path / "run", "training.steps=500", "checkpoint.every_steps=1", "checkpoint.in_background=false")
    job = run_program("tests.failing", "1", "of memory", *words[3:4], *words[6:], ranks=2)
    assert job.returncode == 1
    expected = "OutOfMemoryError: out of GPU memory in the phase 'train' of step 2: set training.recompute=full, or lower training.micro_batch or "
    assert expected in job.stderr
    assert (tmp_path / "run" / "status").read_text().strip() == "crashed"
    # What was saved before is there.
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_1"]
