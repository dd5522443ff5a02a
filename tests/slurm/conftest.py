"""One Slurm for all tests of this folder, and a run that takes seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from tests.slurm.cluster import Cluster, missing_programs, start_cluster
from tests.slurm.jobs import STEPS, weights_of_an_undisturbed_run
from tests.tiny import write_tiny_model


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    cluster = start_cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what makes of the quickstart a run of four ranks that takes seconds."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", tied=True, seed=1, scale=0.3, num_hidden_layers=2)
    write_tiny_model(folder / "teacher", seed=2, scale=0.5, num_hidden_layers=2)
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return [
        *(f"student.hf={folder / 'student'}", f"teacher.hf={folder / 'teacher'}", f"data.prompts={folder / 'prompts.jsonl'}"),
        *("data.task_options={}", "data.batch_prompts=8", "data.grader=exact", "training.micro_batch=4", "evaluation.prompts=0"),
        *("student.layout.tensor=1", "student.layout.pipeline=2", "teacher.self_test=false"),
    ]


@pytest.fixture(scope="module")
def whole(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing disturbed."""
    return weights_of_an_undisturbed_run(tmp_path_factory.mktemp("whole") / "run", *small_run, *STEPS)
