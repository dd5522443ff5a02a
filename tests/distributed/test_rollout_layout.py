"""A student that writes in a layout of its own: the same text and the same weights as one that writes where it trains.

Not covered: GPUs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.config import ParallelLayout, RunConfig, apply_overrides
from opd_megatron.models.weights import named_global_parameters, open_weights
from opd_megatron.parallel.groups import student_groups
from opd_megatron.rollout.choice import Choice, agreed_choice
from opd_megatron.rollout.rollouts import replay_rollouts
from opd_megatron.rollout.sampling import SamplingSettings
from opd_megatron.training.rollout_engine import WritingCopy, student_engine
from opd_megatron.training.student import Student
from tests.pool import RankPool
from tests.runs import metrics_of, run_job, run_until_step, small_config, weights_of, with_teacher
from tests.tiny import write_tiny_model


def _writing(config: RunConfig, **layout: int) -> RunConfig:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, record=True, layout=ParallelLayout(**layout) if layout else None))


def _texts(run: Path) -> list[list[tuple[int, list[int], list[int]]]]:
    """Return prompt and response of every sample of every step, in their order."""
    files = sorted((run / "rollouts").glob("step_*.jsonl"))
    return [[(sample.prompt_index, sample.prompt_ids.tolist(), sample.response_ids.tolist()) for sample in replay_rollouts(file).samples] for file in files]


def _assert_same_run(one: Path, other: Path) -> None:
    """The text token for token, and so the trained weights bit for bit: the two differ in who writes, not in who trains."""
    assert _texts(one) == _texts(other)
    assert len(_texts(one)) == 3
    ours, theirs = weights_of(one), weights_of(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for step in metrics_of(other):
        # The copy has the weights of the moment: what it wrote is recomputed to rounding, which those of a step before would miss by 1e-3.
        assert step["rollout_drift_max"] < 2e-5


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, int], int]] = {
    "TP2xPP2 writes as DP4": ({"tensor": 2, "pipeline": 2}, {"tensor": 1}, 4),
    "TP2+SPxDP2 writes as PP4": ({"tensor": 2, "sequence": True}, {"pipeline": 4}, 4),
    "PP2xVPP2 writes as TP2": ({"pipeline": 2, "virtual": 2}, {"tensor": 2}, 2),
    "CP2xTP2 writes as PP2xDP2": ({"context": 2, "tensor": 2}, {"pipeline": 2}, 4),
    "DP4 writes as TP2xPP2": ({}, {"tensor": 2, "pipeline": 2}, 4),
}
SLOW = ("TP2+SPxDP2 writes as PP4", "CP2xTP2 writes as PP2xDP2")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS])
def test_text_and_weights_are_those_of_writing_in_place(models: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    student, writing, world_size = LAYOUTS[name]
    config = small_config(models, **student)
    for run, layout in (("in_place", {}), ("copied", writing)):
        pool.run(run_job, _writing(config, **layout), tmp_path / run, world_size=world_size)
    _assert_same_run(tmp_path / "in_place", tmp_path / "copied")


@pytest.mark.slow
def test_a_mixture_that_trains_as_ep2_writes_whole(models: Path, pool: RankPool, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "experts", "qwen3_moe", vocab_size=263, seed=3, scale=0.3)
    config = small_config(models, expert=2)
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, hf=str(tmp_path / "experts")))
    for run, layout in (("in_place", {}), ("copied", {"pipeline": 2}), ("spread", {"expert": 4})):
        pool.run(run_job, _writing(config, **layout), tmp_path / run)
    _assert_same_run(tmp_path / "in_place", tmp_path / "copied")
    _assert_same_run(tmp_path / "in_place", tmp_path / "spread")


def test_a_student_beside_ranks_of_the_teachers_own(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = with_teacher(small_config(models, tensor=2), 2, pipeline=2)
    for run, layout in (("in_place", {}), ("copied", {"pipeline": 2})):
        pool.run(run_job, _writing(config, **layout), tmp_path / run)
    _assert_same_run(tmp_path / "in_place", tmp_path / "copied")


def test_a_run_resumes_in_another_writing_layout(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config = small_config(models, tensor=2)
    assert pool.run(run_until_step, _writing(config, pipeline=2), tmp_path / "parts", 2, world_size=2) == ["interrupted"] * 2
    pool.run(run_job, _writing(config, tensor=1), tmp_path / "parts", world_size=2)
    pool.run(run_job, _writing(config), tmp_path / "whole", world_size=2)
    _assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_what_effopd_scores_and_held_out_answers_are_written_by_the_copy(models: Path, pool: RankPool, tmp_path: Path) -> None:
    """After a search the student's weights are others than after the step: the next texts and answers show that the copy follows."""
    words = ["effopd.enabled=true", "effopd.prompts=6", "effopd.score=divergence", "effopd.trigger_steps=[1,2]", "effopd.max_k=2"]
    words += [f"evaluation.prompts={models / 'prompts.jsonl'}", "evaluation.every_steps=1", "evaluation.teacher=false", "evaluation.max_response_tokens=4"]
    config = apply_overrides(small_config(models, tensor=2), words)
    for run, layout in (("in_place", {}), ("copied", {"pipeline": 2})):
        pool.run(run_job, _writing(config, **layout), tmp_path / run, world_size=2)
    _assert_same_run(tmp_path / "in_place", tmp_path / "copied")
    ours, theirs = (_without_times((tmp_path / run / "evals.jsonl").read_text()) for run in ("copied", "in_place"))
    assert ours == theirs
    assert len(ours) == 4
    assert ours[0]["examples"] != ours[3]["examples"]


def _without_times(text: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in json.loads(line).items() if key not in ("seconds", "time")} for line in text.splitlines()]


def _what_a_copy_holds(folder: Path, layout: ParallelLayout, writing: ParallelLayout) -> tuple[int, int, int, int, int]:
    """Return the bytes of the copy between and during its uses, its parameters', this rank's broadcasts, and the student's changed parameters seen in it."""
    config = apply_overrides(small_config(folder), [])
    config = dataclasses.replace(
        config, student=dataclasses.replace(config.student, layout=layout), rollout=dataclasses.replace(config.rollout, layout=writing)
    )
    source = open_weights(hf=config.student.hf)
    student = Student(config, source, student_groups(layout, 1), torch.device("cpu"))
    engine = student_engine(config, source, student, vocab_size=263, eos_ids=(258,), note=lambda _: None)
    assert isinstance(engine, WritingCopy)
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in engine.model.parameters()}
    between = sum(storage.nbytes() for storage in storages.values())
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(1.0)
    original = dict(named_global_parameters(student.model, source.architecture))
    with engine._with_weights():
        during = sum(parameter.untyped_storage().nbytes() for parameter in engine.model.parameters())
        norms = {name: parameter for name, parameter in named_global_parameters(engine.model, source.architecture) if parameter.dim() == 1 and name in original}
        equal = sum(torch.equal(parameter, original[name]) for name, parameter in norms.items())
    engine.generate([(1, 2)] if dist.get_rank() == 0 else [], [(1,)] if dist.get_rank() == 0 else [], SamplingSettings(max_response_tokens=2))
    numbers = sum(parameter.numel() for parameter in engine.model.parameters())
    return between, during, 4 * numbers, equal, len(norms)


def test_a_copy_has_the_weights_of_the_moment_and_no_memory_between(models: Path, pool: RankPool) -> None:
    for between, during, wanted, equal, norms in pool.run(_what_a_copy_holds, models, ParallelLayout(tensor=2), ParallelLayout(), world_size=2):
        assert between == 0
        assert during == wanted > 0
        assert equal == norms > 0


def _engine_of(config: RunConfig, notes: list[str]) -> object:
    source = open_weights(hf=config.student.hf)
    student = Student(config, source, student_groups(config.student.layout, 1), torch.device("cpu"))
    return student_engine(config, source, student, vocab_size=263, eos_ids=(258,), note=notes.append)


def _in_place(folder: Path) -> tuple[bool, list[str]]:
    notes: list[str] = []
    engine = _engine_of(_writing(small_config(folder, tensor=2, sequence=True), tensor=2), notes)
    return isinstance(engine, WritingCopy), notes


def test_the_students_own_layout_needs_no_copy(models: Path, pool: RankPool) -> None:
    why = "training.precision=fp32, and flash-attention computes in half precision only"
    assert pool.run(_in_place, models, world_size=2)[0] == (False, [f"rollout engine: static ({why})"])


def _agreed(rank_without: int) -> Choice:
    has_it = dist.get_rank() != rank_without
    return agreed_choice(Choice(engine="dynamic" if has_it else "static", why="flash-attn 2.8" if has_it else "flash-attn: not installed"))


def test_one_node_without_flash_attention_decides_for_all(pool: RankPool) -> None:
    assert pool.run(_agreed, 1, world_size=2) == [Choice(engine="static", why="flash-attn: not installed")] * 2
    assert pool.run(_agreed, 2, world_size=2) == [Choice(engine="dynamic", why="flash-attn 2.8")] * 2


def _refused_engine(folder: Path) -> None:
    _engine_of(apply_overrides(small_config(folder), ["rollout.engine=dynamic", "training.precision=bf16"]), [])


def test_a_dynamic_engine_is_refused_without_a_gpu(models: Path, pool: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"rollout\.engine=dynamic cannot be had: the paged attention needs a GPU; set it to auto or static"):
        pool.run(_refused_engine, models, world_size=1)
