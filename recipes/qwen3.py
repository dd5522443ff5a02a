"""Qwen3 students. Folders under `models/` are downloaded by the user; see recipes/README.md for commands and results."""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import ParallelLayout, RunConfig, StudentConfig, TeacherConfig
from recipes.shared import mathematics, without_thinking


def _without_thinking(*, world_size: int, student: StudentConfig, teacher: TeacherConfig) -> RunConfig:
    base = without_thinking(mathematics(world_size=world_size, student=student, teacher=teacher))
    return replace(base, rollout=replace(base.rollout, max_response_tokens=3072))


def qwen3_1p7b_from_8b_8gpu_h100() -> RunConfig:
    """Qwen3-1.7B from Qwen3-8B on competition mathematics, one node: student TP2, teacher TP4 on the same 8 GPUs."""
    return _without_thinking(
        world_size=8,
        student=StudentConfig(hf="models/Qwen3-1.7B", layout=ParallelLayout(tensor=2, sequence=True)),
        teacher=TeacherConfig(hf="models/Qwen3-8B", layout=ParallelLayout(tensor=4)),
    )


def qwen3_1p7b_from_8b_16gpu_h100_pipelined() -> RunConfig:
    """The same run on two nodes: the student in two pipeline stages, the teacher TP8 within a node."""
    base = qwen3_1p7b_from_8b_8gpu_h100()
    assert base.teacher is not None
    return replace(
        base,
        world_size=16,
        student=replace(base.student, layout=ParallelLayout(tensor=2, pipeline=2, sequence=True)),
        teacher=replace(base.teacher, layout=ParallelLayout(tensor=8)),
    )


def qwen3_1p7b_from_8b_8gpu_h100_long() -> RunConfig:
    """The same run with responses of up to 16k tokens: the student's sequences are split over four context ranks, the teacher's over two."""
    base = qwen3_1p7b_from_8b_8gpu_h100()
    assert base.teacher is not None
    return replace(
        base,
        student=replace(base.student, layout=ParallelLayout(tensor=2, context=4, sequence=True)),
        teacher=replace(base.teacher, layout=ParallelLayout(tensor=4, context=2), micro_batch=1),
        data=replace(base.data, batch_prompts=64),
        rollout=replace(base.rollout, max_response_tokens=16_384, batch_sequences=8),
    )


def qwen3_8b_from_32b_32gpu_h100() -> RunConfig:
    """Qwen3-8B from Qwen3-32B on four nodes: student TP4, teacher TP8 within a node, its weights on the host while the student writes and trains."""
    base = _without_thinking(
        world_size=32,
        student=StudentConfig(hf="models/Qwen3-8B", layout=ParallelLayout(tensor=4, sequence=True)),
        teacher=TeacherConfig(hf="models/Qwen3-32B", layout=ParallelLayout(tensor=8), placement="offloaded"),
    )
    return replace(base, rollout=replace(base.rollout, batch_sequences=32))


def qwen3_30b_a3b_from_235b_a22b_256gpu_h100() -> RunConfig:
    """Qwen3-30B-A3B from Qwen3-235B-A22B on 32 nodes of 8 H100 (80 GB); planned, not measured: 61 GiB a GPU.

    Student TP4 and EP8, so that its experts are spread over the 8 GPUs of a node. Teacher TP4, EP8 and two pipeline stages, its weights on the host
    (30 GB a GPU) while the student writes and trains.
    """
    base = _without_thinking(
        world_size=256,
        student=StudentConfig(hf="models/Qwen3-30B-A3B", layout=ParallelLayout(tensor=4, expert=8, sequence=True)),
        teacher=TeacherConfig(hf="models/Qwen3-235B-A22B", layout=ParallelLayout(tensor=4, pipeline=2, expert=8), placement="offloaded", micro_batch=4),
    )
    return replace(base, data=replace(base.data, batch_prompts=1024), rollout=replace(base.rollout, batch_sequences=16))
