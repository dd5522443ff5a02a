"""Plain on-policy distillation in the settings of published papers: all positions count alike, all weights move by the optimizer alone. Planned, not measured.

Folders under `models/` and files under `data/` are the user's. A fine-tuned teacher lies in a folder of its base model's name, which `tools/plan.py` knows.
"""

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
from recipes.shared import without_thinking


def _token_importance(*, world_size: int, student: StudentConfig, teacher: TeacherConfig, learning_rate: float = 1e-6) -> RunConfig:
    """Return what Table 9 of arXiv 2604.14084 gives for all of its pairs.

    The paper states neither the number of steps nor warm-up, weight decay and clipping: 1,739 steps are one epoch of a public re-implementation with 8 prompts
    a step, the others are the defaults of the authors' released launch scripts. Adam's betas and how often to look are this project's choice.
    """
    return RunConfig(
        world_size=world_size,
        student=student,
        teacher=teacher,
        data=DataConfig(prompts="data/dapo_math.jsonl", batch_prompts=8, max_prompt_tokens=2048),
        rollout=RolloutConfig(max_response_tokens=8192, samples_per_prompt=16, temperature=1.0, top_p=1.0, batch_sequences=32),
        loss=LossConfig(kind="reverse_kl"),
        training=TrainingConfig(steps=1739, micro_batch=1, learning_rate=learning_rate, lr_schedule="cosine", weight_decay=0.1, clip_grad=1.0),
        checkpoint=CheckpointConfig(every_steps=100),
        evaluation=EvaluationConfig(every_steps=100, prompts="data/math500.jsonl", samples_per_prompt=16, temperature=1.0),
    )


def qwen3_4b_from_8b_grpo_8gpu_h200() -> RunConfig:
    """Qwen3-4B from a GRPO-tuned Qwen3-8B: the column "100 %" of Tables 3 to 5 of TIP (arXiv 2604.14084), sizes and rates of its Table 9.

    Set as there: 8 prompts with 16 responses each, 2,048 and 8,192 tokens at most, temperature 1, reverse KL at every position, learning rate 1e-6 on a
    cosine, evaluation on MATH-500 as the mean of 16 samples. Thinking is off as in the released code; the paper does not say.
    """
    return without_thinking(
        _token_importance(
            world_size=8,
            student=StudentConfig(hf="models/Qwen3-4B", layout=ParallelLayout(tensor=2, sequence=True)),
            teacher=TeacherConfig(hf="models/grpo/Qwen3-8B", layout=ParallelLayout(tensor=4), micro_batch=4),
        )
    )


def llama3_8b_from_70b_8gpu_h200() -> RunConfig:
    """Llama-3.1-8B-Instruct from Llama-3.3-70B-Instruct: the column "100 %" of Tables 3 to 5 of TIP (arXiv 2604.14084), as its Table 9 has it.

    As `qwen3_4b_from_8b_grpo_8gpu_h200`, at a learning rate of 3e-7.
    """
    return _token_importance(
        world_size=8,
        student=StudentConfig(hf="models/Llama-3.1-8B-Instruct", layout=ParallelLayout(tensor=4, sequence=True)),
        teacher=TeacherConfig(hf="models/Llama-3.3-70B-Instruct", layout=ParallelLayout(tensor=8), micro_batch=2),
        learning_rate=3e-7,
    )


def qwen2p5_1p5b_from_14b_4gpu_h200() -> RunConfig:
    """Qwen2.5-1.5B-Instruct from a Qwen2.5-14B-Instruct that thinks: the column "100 %" of Tables 3 to 5 of TIP (arXiv 2604.14084), as its Table 9 has it.

    As `qwen3_4b_from_8b_grpo_8gpu_h200`, on 4 GPUs. The student's 2 key-value heads allow its weights, which the self-test scores, no more than two ranks.
    """
    return _token_importance(
        world_size=4,
        student=StudentConfig(hf="models/Qwen2.5-1.5B-Instruct", layout=ParallelLayout(tensor=2, sequence=True)),
        teacher=TeacherConfig(hf="models/thinking/Qwen2.5-14B-Instruct", layout=ParallelLayout(tensor=2), micro_batch=2),
    )


def _eff_opd(*, world_size: int, student: StudentConfig, teacher: TeacherConfig) -> RunConfig:
    """Return the set-up of arXiv 2605.11739, which is that of G-OPD (arXiv 2602.12125).

    There the loss is a policy gradient on sampled tokens with the advantage log teacher - log student, whose expectation is the gradient of the reverse KL
    that is minimized here over the whole vocabulary. 40 steps are where the paper sees plain distillation converge (30 to 40).
    """
    config = RunConfig(
        world_size=world_size,
        seed=42,
        student=student,
        teacher=teacher,
        data=DataConfig(prompts="data/deepmath.jsonl", batch_prompts=1024, max_prompt_tokens=2048),
        rollout=RolloutConfig(max_response_tokens=16_384, temperature=1.0, top_p=1.0, batch_sequences=32),
        loss=LossConfig(kind="reverse_kl"),
        training=TrainingConfig(steps=40, micro_batch=1, learning_rate=1e-6),
        checkpoint=CheckpointConfig(every_steps=2),
        evaluation=EvaluationConfig(every_steps=2, prompts="data/aime24.jsonl", samples_per_prompt=32, temperature=1.0),
    )
    return without_thinking(config)


def qwen3_4b_from_rl_4b_32gpu_h20() -> RunConfig:
    """Qwen3-4B from itself after reinforcement learning: the "vanilla OPD" that EffOPD (arXiv 2605.11739) is compared with, on DeepMath.

    Set as there: 1,024 prompts with one response each, 2,048 and 16,384 tokens at most, temperature 1, constant learning rate 1e-6 without warm-up,
    a checkpoint and an evaluation every two steps, seed 42, no thinking. The paper's other students need other folders and layouts.
    """
    return _eff_opd(
        world_size=32,
        student=StudentConfig(hf="models/Qwen3-4B", layout=ParallelLayout(tensor=4, sequence=True)),
        teacher=TeacherConfig(hf="models/rl/Qwen3-4B", layout=ParallelLayout(tensor=2), micro_batch=2),
    )
