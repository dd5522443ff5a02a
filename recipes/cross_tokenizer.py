"""A teacher whose tokenizer is not the student's: tokens that both write (strict), and SimCT's units of text (arXiv 2605.07711).

The `tiny_` ones are for two CPU ranks, on the quickstart's student and a teacher that writes pieces of words (`tiny_merged_teacher`). Those for GPUs are
SimCT's own three pairs, and a pair of arXiv 2610.08448 with SimCT's settings.
"""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import (
    AlignmentConfig,
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
from recipes.alignments import paper_math, public_code_4dae6fc
from recipes.quickstart import quickstart


def _letters_from_pieces(alignment: AlignmentConfig) -> RunConfig:
    """The quickstart with the other teacher, and the reverse KL of the papers; loss.kind=forward_kl is the quickstart's own."""
    base = quickstart()
    return replace(
        base,
        world_size=2,
        student=replace(base.student, layout=ParallelLayout(tensor=2)),
        teacher=TeacherConfig(hf="recipes/assets/tiny_merged_teacher", micro_batch=64),
        alignment=alignment,
        loss=LossConfig(kind="reverse_kl"),
    )


def tiny_strict() -> RunConfig:
    """Only where both write the same token, and on the tokens that both have."""
    return _letters_from_pieces(AlignmentConfig(kind="strict"))


def tiny_simct() -> RunConfig:
    """SimCT as in the paper: every shortest stretch of text between common boundaries, pieces of words among them, is compared."""
    return _letters_from_pieces(paper_math())


def tiny_simct_released() -> RunConfig:
    """SimCT as the authors' code of commit 4dae6fc computes it."""
    return _letters_from_pieces(public_code_4dae6fc())


def llama3_3b_from_qwen2p5_7b_8gpu_h100_strict() -> RunConfig:
    """Llama-3.2-3B-Instruct from Qwen2.5-7B-Instruct where both write the same token, one node: student TP2, teacher TP4.

    The pair is of arXiv 2610.08448, which found strict ahead of SimCT on it. Settings as SimCT has them (arXiv 2605.07711, Table 4): 10,000 prompts twice,
    64 a step, responses of at most 4,096 tokens at temperature 0.6 and top-p 0.95, reverse KL, learning rate 1e-6 on a cosine to 0 after 5 % of warm-up, no
    weight decay. Each family has ends of its own, and the student would unlearn to stop where only one pair of them counted: all are one column.
    """
    return RunConfig(
        world_size=8,
        student=StudentConfig(hf="models/Llama-3.2-3B-Instruct", layout=ParallelLayout(tensor=2, sequence=True)),
        teacher=TeacherConfig(hf="models/Qwen2.5-7B-Instruct", layout=ParallelLayout(tensor=4), micro_batch=2),
        data=DataConfig(prompts="data/math_and_code_10k.jsonl", batch_prompts=64, max_prompt_tokens=1024),
        rollout=RolloutConfig(max_response_tokens=4096, temperature=0.6, top_p=0.95, batch_sequences=64),
        alignment=AlignmentConfig(kind="strict", eos="bridge"),
        loss=LossConfig(kind="reverse_kl"),
        training=TrainingConfig(steps=312, learning_rate=1e-6, warmup_steps=16, lr_schedule="cosine"),
        checkpoint=CheckpointConfig(every_steps=52),
        evaluation=EvaluationConfig(every_steps=52, prompts="data/math500.jsonl", temperature=0.6),
    )


def llama3_3b_from_qwen2p5_7b_8gpu_h100_simct() -> RunConfig:
    """The same with SimCT's units, as in the paper."""
    return replace(llama3_3b_from_qwen2p5_7b_8gpu_h100_strict(), alignment=replace(paper_math(), eos="bridge"))


def gemma2_2b_from_qwen2p5_7b_8gpu_h100_simct() -> RunConfig:
    """Gemma-2-2B-IT from Qwen2.5-7B-Instruct, SimCT's first pair (arXiv 2605.07711, Table 1), one node: student TP2, teacher TP4."""
    base = llama3_3b_from_qwen2p5_7b_8gpu_h100_simct()
    return replace(base, student=replace(base.student, hf="models/gemma-2-2b-it"))


def phi4_mini_from_qwen2p5_7b_8gpu_h100_simct() -> RunConfig:
    """Phi-4-mini-instruct from Qwen2.5-7B-Instruct, SimCT's second pair: text of at most 4,096 tokens, beyond which Phi-4-mini has other frequencies."""
    return _within_4096(replace(llama3_3b_from_qwen2p5_7b_8gpu_h100_simct(), student=_phi4_mini()))


def gemma2_2b_from_phi4_mini_8gpu_h100_simct() -> RunConfig:
    """Gemma-2-2B-IT from Phi-4-mini-instruct, SimCT's third pair: the teacher reads at most 4,096 tokens."""
    base = _within_4096(gemma2_2b_from_qwen2p5_7b_8gpu_h100_simct())
    return replace(base, teacher=TeacherConfig(hf="models/Phi-4-mini-instruct", layout=ParallelLayout(tensor=4), micro_batch=2))


def _phi4_mini() -> StudentConfig:
    return StudentConfig(hf="models/Phi-4-mini-instruct", layout=ParallelLayout(tensor=2, sequence=True))


def _within_4096(config: RunConfig) -> RunConfig:
    """Leave room for the prompt in 4,096 tokens, in either tokenizer."""
    return replace(config, data=replace(config.data, max_prompt_tokens=768), rollout=replace(config.rollout, max_response_tokens=2560))
