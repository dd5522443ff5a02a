"""Updates that are extrapolated (EffOPD, arXiv 2605.11739), and students of which only some modules train."""

from __future__ import annotations

from dataclasses import replace

from opd_megatron.config import EffOPDConfig, ModulesConfig, ParallelLayout, RunConfig
from recipes.papers import qwen3_4b_from_rl_4b_32gpu_h20
from recipes.quickstart import deep_opd, quickstart


def tiny_effopd() -> RunConfig:
    """The quickstart on one rank at a third of its learning rate, constant as in the paper, with a search after steps 1, 2, 4, ..., 64."""
    base = quickstart()
    training = replace(base.training, learning_rate=1e-3, min_learning_rate=0.0, warmup_steps=0, lr_schedule="constant")
    return replace(
        base,
        world_size=1,
        student=replace(base.student, layout=ParallelLayout()),
        training=training,
        effopd=EffOPDConfig(enabled=True),
        evaluation=replace(base.evaluation, every_steps=4),
    )


def deep_opd_paper_modules() -> RunConfig:
    """The student of 8 layers, of which only attention and MLP matrices train: what EffOPD moves."""
    return replace(deep_opd(), modules=ModulesConfig(train="paper"))


def deep_opd_measured_modules() -> RunConfig:
    """The student of 8 layers without the modules that move least in a probe of 8 steps, which hold a quarter of the squared update."""
    return replace(deep_opd(), modules=ModulesConfig(train="measured"))


def qwen3_4b_from_rl_4b_32gpu_h20_effopd() -> RunConfig:
    """EffOPD as published, on its plain distillation: 50 training prompts are asked, one sampled answer each."""
    return replace(qwen3_4b_from_rl_4b_32gpu_h20(), effopd=EffOPDConfig(enabled=True, temperature=1.0))
