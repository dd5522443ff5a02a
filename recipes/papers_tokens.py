"""Which tokens count and how much, in the settings of published papers: TIP (arXiv 2604.14084), OPSD (arXiv 2601.18734), PW-OPSD (arXiv 2605.21606).

Planned, not measured. Folders under `models/` and files under `data/` are the user's.
"""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ImportanceConfig,
    LossConfig,
    ParallelLayout,
    PositionWeightsConfig,
    PrivilegedConfig,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from recipes.papers import llama3_8b_from_70b_8gpu_h200, qwen2p5_1p5b_from_14b_4gpu_h200, qwen3_4b_from_8b_grpo_8gpu_h200


def qwen3_4b_from_8b_grpo_8gpu_h200_soft_or_50() -> RunConfig:
    """TIP on Qwen3: the half of each response where the student is unsure or wrong (Table 5, "Soft-OR 50 %")."""
    return replace(qwen3_4b_from_8b_grpo_8gpu_h200(), importance=ImportanceConfig(rule="soft_or_topk", ratio=0.5))


def qwen3_4b_from_8b_grpo_8gpu_h200_entropy_50() -> RunConfig:
    """TIP's baseline on Qwen3: half of the tokens, drawn in proportion to the student's entropy (Tables 3 and 5, "50 %")."""
    return replace(qwen3_4b_from_8b_grpo_8gpu_h200(), importance=ImportanceConfig(rule="entropy_sample", ratio=0.5))


def qwen3_4b_from_8b_grpo_8gpu_h200_q3_10() -> RunConfig:
    """TIP on Qwen3: the tenth of each response where the student is sure and the teacher is not with it (Tables 4 and 8, "Q3 10 %")."""
    return replace(qwen3_4b_from_8b_grpo_8gpu_h200(), importance=ImportanceConfig(rule="q3_topk", ratio=0.1))


def llama3_8b_from_70b_8gpu_h200_soft_or_50() -> RunConfig:
    """TIP on Llama: the half of each response where the student is unsure or wrong (Table 5, "Soft-OR 50 %")."""
    return replace(llama3_8b_from_70b_8gpu_h200(), importance=ImportanceConfig(rule="soft_or_topk", ratio=0.5))


def qwen2p5_1p5b_from_14b_4gpu_h200_soft_or_50() -> RunConfig:
    """TIP on Qwen2.5: the half of each response where the student is unsure or wrong (Table 5, "Soft-OR 50 %")."""
    return replace(qwen2p5_1p5b_from_14b_4gpu_h200(), importance=ImportanceConfig(rule="soft_or_topk", ratio=0.5))


def qwen3_4b_opsd_4gpu_h100() -> RunConfig:
    """Qwen3-4B from itself, shown the reference solution (OPSD as its authors' scripts have it): 100 steps of 32 problems on OpenThoughts mathematics.

    Set as there: one response of at most 1,024 tokens at temperature 1.1, top-p 0.95, top-k 20; forward KL at temperature 1.1, each vocabulary entry clipped at
    0.05, mean over tokens; weights of step 0 as the teacher; learning rate 5e-6, gradient clip 0.1; the student without thinking, the teacher with. There, LoRA
    of rank 64 is trained, here all weights, for which the rate may be high. The prompts are ours. The teacher's prompt ends behind the closed block of
    thinking, as the student's does; there it does not, and the clip absorbs the first token.
    """
    return RunConfig(
        world_size=4,
        student=StudentConfig(hf="models/Qwen3-4B", layout=ParallelLayout(tensor=2, sequence=True)),
        teacher=TeacherConfig(weights="initial", layout=ParallelLayout(tensor=2), micro_batch=2),
        data=DataConfig(
            prompts="data/openthoughts_math_30k.jsonl",
            prompt_key="problem",
            prompt_template="recipes/prompts/mathematics.jinja",
            chat_template_kwargs={"enable_thinking": False},
            batch_prompts=32,
            max_prompt_tokens=2048,
        ),
        privileged=PrivilegedConfig(
            template="recipes/prompts/mathematics_with_solution.jinja", chat_template_kwargs={"enable_thinking": True}, max_prompt_tokens=18_976
        ),
        rollout=RolloutConfig(max_response_tokens=1024, temperature=1.1, top_p=0.95, top_k=20, batch_sequences=32),
        loss=LossConfig(kind="forward_kl", temperature=1.1, pointwise_clip=0.05),
        training=TrainingConfig(steps=100, micro_batch=1, learning_rate=5e-6, clip_grad=0.1),
        checkpoint=CheckpointConfig(every_steps=25, keep=4),
        # A file of its own, whose rows need no solutions: the teacher is not measured on it.
        evaluation=EvaluationConfig(every_steps=25, prompts="data/aime24.jsonl", samples_per_prompt=12, temperature=1.0, teacher=False),
    )


def qwen3_4b_pw_opsd_4gpu_h100() -> RunConfig:
    """PW-OPSD on Qwen3-4B: as `qwen3_4b_opsd_4gpu_h100`, late tokens weigh more ("moderate") and each response counts alike; 150 steps as its launchers run."""
    base = qwen3_4b_opsd_4gpu_h100()
    return replace(base, position_weights=PositionWeightsConfig(enabled=True), training=replace(base.training, steps=150))
