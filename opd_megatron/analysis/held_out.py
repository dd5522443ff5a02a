"""The run's own evaluation of its held-out prompts, on a model of this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from opd_megatron.analysis.experiments import EditedModel
from opd_megatron.analysis.updates import AnalyzedRun
from opd_megatron.config import ParallelLayout
from opd_megatron.models.gpt import build_gpt
from opd_megatron.parallel.groups import student_groups
from opd_megatron.training.evaluator import evaluate_held_out
from opd_megatron.training.setup import make_sampler, open_sources


def open_evaluation(run: AnalyzedRun, device: torch.device, num_prompts: int | None) -> tuple[EditedModel, Callable[[], tuple[float, int]]]:
    """Return a model to edit, and what measures it: prompts, grader, sampling, seed and precision are the run's; ValueError if it held out no prompts.

    `num_prompts` takes the first of them only. Called in a joined world of one rank.
    """
    if dist.get_world_size() != 1:
        raise ValueError(f"the experiments run on one rank, not {dist.get_world_size()}: start the tool without torchrun")
    config = run.config
    if config.evaluation.prompts == 0:
        raise ValueError(f"{run.directory.path} held out no prompts (evaluation.prompts=0), so nothing can be measured; leave out --window and --recover")
    sources = open_sources(replace(config, student=replace(config.student, layout=ParallelLayout(), vocab_multiple=1)))
    held_out = sources.evaluation_prompts
    assert held_out is not None
    if num_prompts is not None:
        sources = replace(sources, evaluation_prompts=replace(held_out, prompts=held_out.prompts[:num_prompts]))
    groups = student_groups(ParallelLayout(), seed=config.seed)
    model = build_gpt(run.final.architecture, groups, precision=config.training.precision, vocab_multiple=1).to(device)
    sampler = make_sampler(model, groups, config, sources.student_text)

    def evaluate() -> tuple[float, int]:
        record = evaluate_held_out(sampler, config, sources, as_teacher=False)
        assert record is not None
        return record["accuracy"], record["prompts"]

    return EditedModel(run, model), evaluate
