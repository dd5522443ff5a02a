"""Llama 3 students. Folders under `models/` are downloaded by the user; see recipes/README.md for commands and results."""

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


def llama3_1b_from_8b_8gpu_h100() -> RunConfig:
    """Llama-3.2-1B-Instruct from Llama-3.1-8B-Instruct, one node: student DP8, teacher TP2."""
    return RunConfig(
        world_size=8,
        student=StudentConfig(hf="models/Llama-3.2-1B-Instruct"),
        teacher=TeacherConfig(hf="models/Llama-3.1-8B-Instruct", layout=ParallelLayout(tensor=2)),
        data=DataConfig(prompts="data/math_train.jsonl", batch_prompts=256, max_prompt_tokens=1024),
        rollout=RolloutConfig(max_response_tokens=2048, batch_sequences=64),
        training=TrainingConfig(steps=200, micro_batch=1, learning_rate=1e-6, warmup_steps=10),
        checkpoint=CheckpointConfig(every_steps=50),
        evaluation=EvaluationConfig(every_steps=50, prompts="data/math_test.jsonl"),
    )


def llama3_8b_from_70b_32gpu_h100() -> RunConfig:
    """Llama-3.1-8B-Instruct from Llama-3.3-70B-Instruct on four nodes: student TP4, teacher TP8 within a node."""
    base = llama3_1b_from_8b_8gpu_h100()
    return replace(
        base,
        world_size=32,
        student=StudentConfig(hf="models/Llama-3.1-8B-Instruct", layout=ParallelLayout(tensor=4, sequence=True)),
        teacher=TeacherConfig(hf="models/Llama-3.3-70B-Instruct", layout=ParallelLayout(tensor=8)),
        rollout=replace(base.rollout, batch_sequences=32),
    )
