"""Small runs whose plans are compared with what their ranks do."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from opd_megatron.config import DataConfig, EvaluationConfig, ParallelLayout, RolloutConfig, RunConfig, StudentConfig, TeacherConfig, TrainingConfig
from tests.programs import ROOT

PUBLISHED = (ROOT / "recipes" / "architectures", ROOT / "recipes" / "assets")
GIB = 1 << 30


def tiny_config(
    models: Path, student: ParallelLayout, teacher: ParallelLayout, *, world_size: int, precision: str = "fp32", micro_batch: int = 2, mixture: bool = False
) -> RunConfig:
    folders = (models / "mixture", models / "mixture_teacher") if mixture else (models / "student", models / "teacher")
    return RunConfig(
        world_size=world_size,
        student=StudentConfig(hf=str(folders[0]), layout=student, vocab_multiple=4),
        teacher=TeacherConfig(hf=str(folders[1]), layout=teacher, micro_batch=3),
        data=DataConfig(prompts="prompts.jsonl", batch_prompts=16, max_prompt_tokens=20),
        rollout=RolloutConfig(max_response_tokens=12),
        training=TrainingConfig(micro_batch=micro_batch, precision=precision),
        evaluation=EvaluationConfig(prompts=0),
    )


def build(config: RunConfig, bridge: Any = None) -> tuple[Any, Any]:
    """Return the student and the teacher that a rank of a run builds; with a `bridge`, a student whose teacher is on ranks of its own."""
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.groups import student_groups, teacher_groups
    from opd_megatron.parallel.world import worlds
    from opd_megatron.teacher.teacher import Teacher
    from opd_megatron.training.setup import make_router, make_scorer
    from opd_megatron.training.student import Student

    device, source = torch.device("cpu"), open_weights(hf=config.teacher.hf)
    student = Student(config, open_weights(hf=config.student.hf), student_groups(config.student.layout, 1), device)
    scorer = make_scorer(source, config, teacher_groups(config.teacher.layout), device) if bridge is None else None
    with worlds(0) if bridge is None else nullcontext(bridge) as way:
        router = make_router(source, config, way)
    return student, Teacher(source, router, scorer, student.groups, student_padded_vocab=student.padded_vocab, device=device)


def longest_rollouts(config: RunConfig) -> Any:
    """Return a step in which every prompt and every response has reached its limit."""
    from opd_megatron.data.batches import Sample
    from opd_megatron.rollout.rollouts import Rollouts

    prompt, response = torch.arange(config.data.max_prompt_tokens), torch.arange(config.rollout.max_response_tokens)
    return Rollouts(tuple(Sample(index, 0, prompt, response, None, True) for index in range(config.num_sequences)), 0)


def buffers(student: Any) -> list[Any]:
    """Return what holds the student's gradients; experts have buffers of their own."""
    return [buffer for chunk in student.ddp for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def storages(tensors: Any) -> dict[int, int]:
    """Return the bytes of every storage once."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


LAYOUTS = {
    "TP2xPP2, teacher DP4": ({"tensor": 2, "pipeline": 2}, {}),
    "TP2+SPxDP2, teacher TP2xPP2": ({"tensor": 2, "sequence": True}, {"tensor": 2, "pipeline": 2}),
    "PP2xDP2, teacher TP2xDP2": ({"pipeline": 2}, {"tensor": 2}),
    "CP2xTP2, teacher CP2xPP2": ({"context": 2, "tensor": 2}, {"context": 2, "pipeline": 2}),
    "PP2xVPP2xDP2, teacher DP4": ({"pipeline": 2, "virtual": 2}, {}),
}


# Of two mixtures of experts.
MIXTURES = {
    "EP2xPP2, teacher EP4": ({"expert": 2, "pipeline": 2}, {"expert": 4}),
    "TP2+SPxEP2, teacher EP2xPP2": ({"tensor": 2, "sequence": True, "expert": 2}, {"expert": 2, "pipeline": 2}),
    "CP2xEP4, teacher EP2xTP2": ({"context": 2, "expert": 4}, {"expert": 2, "tensor": 2}),
    "DP4 of whole mixtures, teacher TP2": ({}, {"tensor": 2}),
    "EP2xETP2, teacher TP2xETP2": ({"expert": 2, "expert_tensor": 2}, {"tensor": 2, "expert_tensor": 2}),
    "TP2+SPxETP2, teacher ETP4": ({"tensor": 2, "sequence": True, "expert_tensor": 2}, {"expert_tensor": 4}),
    "PP2xETP2, teacher EP2xETP2": ({"pipeline": 2, "expert_tensor": 2}, {"expert": 2, "expert_tensor": 2}),
}


def config_of(models: Path, name: str, precision: str = "fp32") -> RunConfig:
    student, teacher = {**LAYOUTS, **MIXTURES}[name]
    return tiny_config(models, ParallelLayout(**student), ParallelLayout(**teacher), world_size=4, precision=precision, mixture=name in MIXTURES)


# Settings under which a step keeps and sends other things.
RECOMPUTED, PACKED = "training.recompute=full", "training.micro_batch_tokens=96"
SELECTED = ("training.recompute=selective", "training.recompute_modules=core_attn,mlp,moe")
