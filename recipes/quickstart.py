"""Runs for two CPU cores: tiny Qwen3 models that learn to spell words backward."""

from __future__ import annotations

from opd_megatron.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ParallelLayout,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)


def _spelling(batch_prompts: int) -> DataConfig:
    return DataConfig(
        prompts="reasoning_gym:spell_backward",
        task_options={"min_word_len": 3, "max_word_len": 7},
        task_size=40_000,
        batch_prompts=batch_prompts,
        max_prompt_tokens=64,
    )


def _warm_up(model: str, *, steps: int, learning_rate: float) -> RunConfig:
    return RunConfig(
        world_size=2,
        student=StudentConfig(hf=model, vocab_multiple=1),
        data=_spelling(batch_prompts=128),
        rollout=RolloutConfig(max_response_tokens=16),
        training=TrainingConfig(
            objective="sft",
            steps=steps,
            micro_batch=64,
            learning_rate=learning_rate,
            min_learning_rate=learning_rate / 30,
            warmup_steps=20,
            lr_schedule="cosine",
            precision="fp32",
        ),
        checkpoint=CheckpointConfig(keep=1),
        evaluation=EvaluationConfig(every_steps=100),
    )


def tiny_teacher() -> RunConfig:
    """Make the quickstart's teacher: supervised fine-tuning from random weights, 2 data-parallel ranks."""
    return _warm_up("runs/tiny/teacher", steps=600, learning_rate=3e-3)


def tiny_student() -> RunConfig:
    """Make the quickstart's student: a short supervised warm-up of a model a sixth the teacher's size."""
    return _warm_up("runs/tiny/student", steps=120, learning_rate=3e-3)


def quickstart() -> RunConfig:
    """Distil the tiny teacher into the tiny student on its own rollouts: 4 ranks, student TP2 x PP2, teacher TP1 x DP4."""
    return RunConfig(
        world_size=4,
        student=StudentConfig(hf="recipes/assets/tiny_student", layout=ParallelLayout(tensor=2, pipeline=2), vocab_multiple=1),
        teacher=TeacherConfig(hf="recipes/assets/tiny_teacher", micro_batch=64),
        data=_spelling(batch_prompts=64),
        rollout=RolloutConfig(max_response_tokens=12, batch_sequences=512),
        loss=LossConfig(kind="reverse_kl"),
        training=TrainingConfig(steps=120, micro_batch=32, learning_rate=2e-3, min_learning_rate=1e-4, warmup_steps=5, lr_schedule="cosine", precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=40),
        evaluation=EvaluationConfig(every_steps=20),
    )
