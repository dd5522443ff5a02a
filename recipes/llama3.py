"""Llama 3 students. Folders under `models/` are downloaded by the user; see recipes/README.md for commands and results."""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import ParallelLayout, RunConfig, StudentConfig, TeacherConfig
from recipes.shared import mathematics


def llama3_1b_from_8b_8gpu_h100() -> RunConfig:
    """Llama-3.2-1B-Instruct from Llama-3.1-8B-Instruct, one node: student DP8, teacher TP2."""
    return mathematics(
        world_size=8,
        student=StudentConfig(hf="models/Llama-3.2-1B-Instruct"),
        teacher=TeacherConfig(hf="models/Llama-3.1-8B-Instruct", layout=ParallelLayout(tensor=2)),
    )


def llama3_8b_from_70b_32gpu_h100() -> RunConfig:
    """Llama-3.1-8B-Instruct from Llama-3.3-70B-Instruct on four nodes: student TP4, teacher TP8 within a node."""
    base = mathematics(
        world_size=32,
        student=StudentConfig(hf="models/Llama-3.1-8B-Instruct", layout=ParallelLayout(tensor=4, sequence=True)),
        teacher=TeacherConfig(hf="models/Llama-3.3-70B-Instruct", layout=ParallelLayout(tensor=8)),
    )
    return replace(base, rollout=replace(base.rollout, batch_sequences=32))
