"""What can be refused before a process group exists or torch is imported: `recipes.run --check`, and the first act of every rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd_megatron.config import ParallelLayout, RunConfig
from opd_megatron.data.sources import check_source
from opd_megatron.models.architecture import Architecture
from opd_megatron.models.hf_folder import open_hf_folder, read_architecture
from opd_megatron.reporting.run_directory import RunDirectory


def check_run(config: RunConfig, world_size: int) -> None:
    """Raise ValueError, with the values and the way out, for layouts, models or data that do not fit together. Reads headers only."""
    config.check_world(world_size)
    check_source(config.data.prompts)
    if isinstance(config.evaluation.prompts, str):
        check_source(config.evaluation.prompts, "evaluation.prompts")
    if config.rollout.replay:
        _check_replay(RunDirectory(config.rollout.replay), config.training.steps)
    student = _check_model("student", config.student.hf, config.student.checkpoint, config.student.layout)
    student.check_training("student", config.student.layout)
    _check_length(config, "student", student)
    if config.loss.top_k is not None and config.loss.top_k > student.vocab_size:
        raise ValueError(f"loss.top_k={config.loss.top_k} exceeds the student's vocabulary of {student.vocab_size}; lower it, or use a kind without top-k")
    if config.teacher is None or config.training.objective != "opd":
        return
    _check_length(config, "teacher", _check_model("teacher", config.teacher.hf, config.teacher.checkpoint, config.teacher.layout))
    if config.teacher.self_test:
        _check_self_test(student, config.teacher.layout)
    _check_tokenizer_files(_assets(config.student.hf, config.student.checkpoint), _assets(config.teacher.hf, config.teacher.checkpoint))


def _check_length(config: RunConfig, role: str, architecture: Architecture) -> None:
    budgets = {"rollout.max_response_tokens": config.rollout.max_response_tokens, "evaluation.max_response_tokens": config.evaluation.max_response_tokens or 0}
    key = max(budgets, key=lambda name: budgets[name])
    longest = config.data.max_prompt_tokens + budgets[key]
    if longest > architecture.max_positions:
        raise ValueError(f"data.max_prompt_tokens + {key} = {longest} exceeds the {role}'s {architecture.max_positions} positions; lower one of them")


def _check_replay(run: RunDirectory, steps: int) -> None:
    for step in range(1, steps + 1):
        file = run.rollout_file(step)
        if not file.is_file():
            raise ValueError(f"rollout.replay={str(run.path)!r} has no record of step {step}: {file} is missing; record with rollout.record=true")


def _assets(hf: str | None, checkpoint: str | None) -> Path:
    return Path(hf) if hf else Path(checkpoint or "") / "huggingface"


def _check_model(role: str, hf: str | None, checkpoint: str | None, layout: ParallelLayout) -> Architecture:
    """Return the architecture of a model whose files are whole and whose sizes divide over the layout."""
    if hf:
        architecture = open_hf_folder(hf).architecture
    else:
        path = Path(checkpoint or "")
        if not (path / "metadata.json").is_file():
            raise ValueError(f"{role}.checkpoint={checkpoint!r} is not a Megatron checkpoint: no metadata.json in it")
        architecture = read_architecture(_assets(None, checkpoint))
    architecture.check_layout(role, layout)
    return architecture


def _check_self_test(student: Architecture, layout: ParallelLayout) -> None:
    """Raise ValueError unless the student's own weights can be laid out as the teacher's, to be scored in their place."""
    try:
        # A student without experts leaves those axes of the layout unused.
        student.check_layout("teacher", layout if student.experts else replace(layout, expert=1, expert_tensor=1))
    except ValueError as error:
        raise ValueError(
            f"teacher.self_test=true scores the student's weights in the teacher's layout, and there {str(error).replace('the teacher', 'the student')}; "
            "or set teacher.self_test=false"
        ) from None


def _check_tokenizer_files(student: Path, teacher: Path) -> None:
    """Compare the two vocabularies as far as tokenizer.json shows them; the run compares the loaded tokenizers as well."""
    ours, theirs = _vocabulary(student / "tokenizer.json"), _vocabulary(teacher / "tokenizer.json")
    if ours is None or theirs is None or ours == theirs:
        return
    name = min(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    raise ValueError(
        f"student and teacher tokenizers differ: token {name!r} is {ours.get(name, 'absent')} in {student} and {theirs.get(name, 'absent')} in {teacher} "
        f"({len(ours)} and {len(theirs)} in all); choose a teacher with the student's tokenizer"
    )


def _vocabulary(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    vocabulary = content.get("model", {}).get("vocab")
    if isinstance(vocabulary, list):
        vocabulary = {piece[0]: index for index, piece in enumerate(vocabulary)}
    return {**(vocabulary or {}), **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}
