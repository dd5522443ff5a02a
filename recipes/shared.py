"""What recipes for GPUs have in common. No recipes."""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)


def mathematics(*, world_size: int, student: StudentConfig, teacher: TeacherConfig) -> RunConfig:
    """Return 200 steps on competition mathematics, 256 prompts each, responses of up to 2k tokens."""
    return RunConfig(
        world_size=world_size,
        student=student,
        teacher=teacher,
        data=DataConfig(prompts="data/math_train.jsonl", batch_prompts=256, max_prompt_tokens=1024),
        rollout=RolloutConfig(max_response_tokens=2048, batch_sequences=64),
        training=TrainingConfig(steps=200, micro_batch=1, learning_rate=1e-6, warmup_steps=10),
        checkpoint=CheckpointConfig(every_steps=50),
        evaluation=EvaluationConfig(every_steps=50, prompts="data/math_test.jsonl"),
    )


def without_thinking(config: RunConfig) -> RunConfig:
    """Return a run of Qwen3 models whose chat template closes the think block at once."""
    return replace(config, data=replace(config.data, chat_template_kwargs={"enable_thinking": False}))
