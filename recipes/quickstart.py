"""Runs for two CPU cores: tiny Qwen3 models that learn to spell words backward."""

from __future__ import annotations

from dataclasses import replace

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

_LONGEST_WORD = 7


def _spelling(batch_prompts: int, longest_word: int = _LONGEST_WORD) -> DataConfig:
    return DataConfig(
        prompts="reasoning_gym:spell_backward",
        task_options={"min_word_len": 3, "max_word_len": longest_word},
        task_size=20_000,
        batch_prompts=batch_prompts,
        max_prompt_tokens=64,
    )


def _supervised(model: str, *, steps: int, data: DataConfig) -> RunConfig:
    return RunConfig(
        world_size=2,
        student=StudentConfig(hf=model, vocab_multiple=1),
        data=data,
        rollout=RolloutConfig(max_response_tokens=12, batch_sequences=512),
        training=TrainingConfig(
            objective="sft", steps=steps, micro_batch=64, learning_rate=3e-3, min_learning_rate=1e-4, warmup_steps=5, lr_schedule="cosine", precision="fp32"
        ),
        checkpoint=CheckpointConfig(keep=1),
        evaluation=EvaluationConfig(every_steps=50),
    )


def tiny_teacher() -> RunConfig:
    """Make the quickstart's teacher: supervised fine-tuning from random weights on words of 3 to 7 letters."""
    return _supervised("runs/tiny/teacher", steps=500, data=_spelling(128))


def tiny_student() -> RunConfig:
    """Make the quickstart's student, a third of the teacher's size: a warm-up on words of 3 to 5 letters only."""
    return _supervised("runs/tiny/student", steps=200, data=_spelling(128, longest_word=5))


def tiny_deep_student() -> RunConfig:
    """Make a student of 8 thin layers, to see where an update goes: the warm-up of `tiny_student`."""
    return _supervised("runs/tiny/deep_student", steps=400, data=_spelling(128, longest_word=5))


def tiny_reader() -> RunConfig:
    """Make the student that teaches itself (`opsd`): a warm-up on words of 3 to 5 letters, and on words of 3 to 7 with the solution in the prompt."""
    data = DataConfig(prompts="runs/tiny/warm_up.jsonl", batch_prompts=128, max_prompt_tokens=64, grader="exact")
    return _supervised("runs/tiny/student", steps=400, data=data)


def tiny_merged_teacher() -> RunConfig:
    """Make the teacher with a tokenizer of its own (`tiny_simct`): as `tiny_teacher`, on pieces of words, which it would rather learn by heart."""
    base = _supervised("runs/tiny/merged_teacher", steps=800, data=_spelling(128))
    return replace(base, training=replace(base.training, weight_decay=0.1))


def quickstart() -> RunConfig:
    """Distil the tiny teacher into the tiny student on its own rollouts: 4 ranks, student TP2 x PP2, teacher TP1 x DP4."""
    return RunConfig(
        world_size=4,
        student=StudentConfig(hf="recipes/assets/tiny_student", layout=ParallelLayout(tensor=2, pipeline=2), vocab_multiple=1),
        teacher=TeacherConfig(hf="recipes/assets/tiny_teacher", micro_batch=64),
        data=_spelling(128),
        rollout=RolloutConfig(max_response_tokens=12, batch_sequences=512),
        loss=LossConfig(kind="forward_kl"),
        training=TrainingConfig(steps=100, micro_batch=64, learning_rate=3e-3, min_learning_rate=1e-4, warmup_steps=5, lr_schedule="cosine", precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=50),
        evaluation=EvaluationConfig(every_steps=20),
    )


def quickstart_sft() -> RunConfig:
    """What supervised fine-tuning makes of the quickstart's student in as many steps on the reference answers."""
    return _supervised("recipes/assets/tiny_student", steps=100, data=_spelling(128))


def deep_opd() -> RunConfig:
    """The quickstart with the student of 8 layers, checkpoints kept from early on: `tools/analyze_updates.py` reads them."""
    base = quickstart()
    return replace(
        base,
        world_size=1,
        student=StudentConfig(hf="recipes/assets/tiny_deep_student", vocab_multiple=1),
        checkpoint=CheckpointConfig(every_steps=10, keep=100),
    )


def deep_sft() -> RunConfig:
    """The control of `deep_opd`: as many steps of supervised fine-tuning on the reference answers."""
    base = _supervised("recipes/assets/tiny_deep_student", steps=100, data=_spelling(128))
    return replace(base, world_size=1, checkpoint=CheckpointConfig(every_steps=10, keep=100))
