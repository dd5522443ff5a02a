"""A model that teaches itself by what it is shown of the solution (OPSD, arXiv 2601.18734; PW-OPSD, arXiv 2605.21606). Four CPU ranks."""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import LossConfig, PositionWeightsConfig, PrivilegedConfig, RunConfig, TeacherConfig
from recipes.quickstart import quickstart


def opsd() -> RunConfig:
    """A student that spells short words learns long ones from itself, shown the solution: clipped forward KL against its weights of step 0.

    Loss, clip and sampling as the authors' scripts have them: temperature 1.1 for both, top-p 0.95, top-k 20, each vocabulary entry clipped at 0.05.
    The learning rate is the quickstart's.
    """
    base = quickstart()
    return replace(
        base,
        student=replace(base.student, hf="recipes/assets/tiny_reader"),
        teacher=TeacherConfig(weights="initial", micro_batch=64),
        privileged=PrivilegedConfig(template="recipes/prompts/spelling_with_solution.jinja"),
        rollout=replace(base.rollout, temperature=1.1, top_p=0.95, top_k=20),
        loss=LossConfig(kind="forward_kl", temperature=1.1, pointwise_clip=0.05),
    )


def opsd_ema() -> RunConfig:
    """The same with the average of the student's weights over the steps as the teacher."""
    base = opsd()
    return replace(base, teacher=TeacherConfig(weights="ema", micro_batch=64))


def opsd_position_weighted() -> RunConfig:
    """PW-OPSD: late tokens weigh more, from 0.29 to 1, and each response counts alike ("moderate")."""
    return replace(opsd(), position_weights=PositionWeightsConfig(enabled=True))
