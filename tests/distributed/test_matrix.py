"""Every layout of a student beside every layout of a teacher, dense and with experts: one step, against one process.

Slow: 63 pairs. A selection of pairs over three steps is in test_training.py and test_experts.py. Three pairs have eight ranks, the others 5 at most.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.config import DataConfig, EvaluationConfig, ParallelLayout, RolloutConfig, RunConfig, StudentConfig, TeacherConfig, TrainingConfig
from tests.pool import RankPool
from tests.runs import run_job
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.slow

STUDENTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "TP2xPP2": {"tensor": 2, "pipeline": 2},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "CP2": {"context": 2},
    "PP2xVPP2": {"pipeline": 2, "virtual": 2},
    "DP2": {},
    "EP2": {"expert": 2},
}
TEACHERS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor": 2},
    "TP4": {"tensor": 4},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "EP2": {"expert": 2},
    "a rank of its own": {},
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """One rank more than the other tests have: four of the student and one of the teacher's own."""
    ranks = RankPool(5)
    yield ranks
    ranks.close()


# On eight ranks.
LARGE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TP2xPP2xDP2, teacher TP4xDP2": ({"tensor": 2, "pipeline": 2}, {"tensor": 4}),
    "TP2xCP2xPP2+SP, teacher TP2xPP2xDP2": ({"tensor": 2, "context": 2, "pipeline": 2, "sequence": True}, {"tensor": 2, "pipeline": 2}),
    "PP2xVPP2xEP4, teacher EP8": ({"pipeline": 2, "virtual": 2, "expert": 4}, {"expert": 8}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family, kind in (("qwen3", "dense"), ("qwen3_moe", "experts")):
        write_tiny_model(folder / f"student {kind}", family, tied=True, vocab_size=263, seed=1, scale=0.3, num_hidden_layers=4)
        write_tiny_model(folder / f"teacher {kind}", family, vocab_size=263, seed=2, scale=0.5, hidden_size=96, num_hidden_layers=4, num_key_value_heads=4)
    rows = [{"prompt": "count " + "abc"[: 1 + i % 3] * (1 + i % 5), "answer": str(i)} for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def _kind(layout: dict[str, Any]) -> str:
    return "experts" if "expert" in layout else "dense"


def _config(
    models: Path, student: dict[str, Any], teacher: dict[str, Any], *, own: int | None = None, kinds: tuple[str, str] | None = None, **rollout: Any
) -> RunConfig:
    student_kind, teacher_kind = kinds or (_kind(student), _kind(teacher))
    placement: dict[str, Any] = {"placement": "dedicated", "num_ranks": own} if own else {}
    return RunConfig(
        student=StudentConfig(hf=str(models / f"student {student_kind}"), layout=ParallelLayout(**student), vocab_multiple=4),
        # The student's 2 key-value heads do not divide over 4 ranks, so its weights cannot be tried in such a teacher's place.
        teacher=TeacherConfig(
            hf=str(models / f"teacher {teacher_kind}"), layout=ParallelLayout(**teacher), micro_batch=3, self_test=teacher != {"tensor": 4}, **placement
        ),
        data=DataConfig(prompts=str(models / "prompts.jsonl"), batch_prompts=8, max_prompt_tokens=64, grader="exact"),
        rollout=RolloutConfig(max_response_tokens=10, **rollout),
        training=TrainingConfig(steps=1, micro_batch=2, learning_rate=1e-3, precision="fp32"),
        evaluation=EvaluationConfig(prompts=0),
    )


@pytest.fixture(scope="module")
def references(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The step of one process for each pair of kinds of model."""
    folder = tmp_path_factory.mktemp("references")
    for kinds in itertools.product(("dense", "experts"), repeat=2):
        pool.run(run_job, _config(models, {}, {}, kinds=kinds, record=True), folder / " ".join(kinds), world_size=1)
    return folder


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_pair_of_layouts_takes_the_step_of_one_process(
    models: Path, references: Path, pool: RankPool, tmp_path: Path, student: str, teacher: str
) -> None:
    ours, theirs = STUDENTS[student], TEACHERS[teacher]
    own = 1 if teacher == "a rank of its own" else None
    student_ranks = {"TP1": 1, "TP2xPP2": 4}.get(student, 2)
    world_size = student_ranks + own if own else max(student_ranks, ParallelLayout(**theirs).model_size, theirs.get("expert", 1))
    reference = references / f"{_kind(ours)} {_kind(theirs)}"
    pool.run(run_job, _config(models, ours, theirs, own=own, replay=str(reference)), tmp_path / "run", world_size=world_size)
    _assert_same_step(tmp_path / "run", reference)


@pytest.mark.parametrize("name", LARGE)
def test_eight_ranks_take_the_step_of_one_process(models: Path, references: Path, tmp_path: Path, name: str) -> None:
    ours, theirs = LARGE[name]
    reference = references / f"{_kind(ours)} {_kind(theirs)}"
    ranks = RankPool(8)
    try:
        ranks.run(run_job, _config(models, ours, theirs, replay=str(reference)), tmp_path / "run", world_size=8)
    finally:
        ranks.close()
    _assert_same_step(tmp_path / "run", reference)


def _assert_same_step(run: Path, reference: Path) -> None:
    """1e-5: fp32 sums in another order."""
    metrics, expected = (json.loads((folder / "metrics.jsonl").read_text()) for folder in (run, reference))
    for key in ("loss", "divergence", "grad_norm"):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-5), key
    weights, exact = (load_file(folder / "hf" / "model.safetensors") for folder in (run, reference))
    difference = torch.stack([(weights[name] - exact[name]).norm() for name in exact]).norm() / torch.stack([tensor.norm() for tensor in exact.values()]).norm()
    assert difference < 1e-5
