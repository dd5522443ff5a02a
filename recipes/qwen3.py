"""Qwen3 students. Folders under `models/` are downloaded by the user; see recipes/README.md for commands and results."""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ParallelLayout,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)


def qwen3_1p7b_from_8b_8gpu_h100() -> RunConfig:
    """Qwen3-1.7B from Qwen3-8B on competition mathematics, one node: student TP2, teacher TP4 on the same 8 GPUs."""
    return RunConfig(
        world_size=8,
        student=StudentConfig(hf="models/Qwen3-1.7B", layout=ParallelLayout(tensor=2, sequence=True)),
        teacher=TeacherConfig(hf="models/Qwen3-8B", layout=ParallelLayout(tensor=4)),
        data=DataConfig(prompts="data/math_train.jsonl", batch_prompts=256, max_prompt_tokens=1024, chat_template_kwargs={"enable_thinking": False}),
        rollout=RolloutConfig(max_response_tokens=3072, batch_sequences=64),
        training=TrainingConfig(steps=200, micro_batch=1, learning_rate=1e-6, warmup_steps=10),
        checkpoint=CheckpointConfig(every_steps=50),
        evaluation=EvaluationConfig(every_steps=50, prompts="data/math_test.jsonl"),
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
    base = qwen3_1p7b_from_8b_8gpu_h100()
    return replace(
        base,
        world_size=32,
        student=StudentConfig(hf="models/Qwen3-8B", layout=ParallelLayout(tensor=4, sequence=True)),
        teacher=TeacherConfig(hf="models/Qwen3-32B", layout=ParallelLayout(tensor=8), placement="offloaded"),
        rollout=replace(base.rollout, batch_sequences=32),
    )
