"""Runs of tests: a configuration of tiny models, what a rank of the pool does, and what a run leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from opd_megatron.config import DataConfig, EvaluationConfig, ParallelLayout, RolloutConfig, RunConfig, StudentConfig, TeacherConfig, TrainingConfig
from opd_megatron.reporting import report
from opd_megatron.training.job import run_in_world
from opd_megatron.training.trainer import Trainer

# Of the student, of the teacher, and on how many ranks.
LAYOUTS = {
    "TP2": ({"tensor": 2}, {}, 2),
    "TP2+SP": ({"tensor": 2, "sequence": True}, {}, 2),
    "PP2": ({"pipeline": 2}, {}, 2),
    "TP2xPP2": ({"tensor": 2, "pipeline": 2}, {}, 4),
    "TP2xPP2+SP, teacher PP2": ({"tensor": 2, "pipeline": 2, "sequence": True}, {"pipeline": 2}, 4),
    "DP2": ({}, {}, 2),
    "DP2xPP2, teacher TP2": ({"pipeline": 2}, {"tensor": 2}, 4),
    "TP2xDP2, teacher TP2xPP2": ({"tensor": 2}, {"tensor": 2, "pipeline": 2}, 4),
    "DP4, teacher TP2": ({}, {"tensor": 2}, 4),
    "PP2xVPP2": ({"pipeline": 2, "virtual": 2}, {}, 2),
    "TP2xPP2xVPP2+SP": ({"tensor": 2, "pipeline": 2, "virtual": 2, "sequence": True}, {}, 4),
    "CP2": ({"context": 2}, {}, 2),
    "CP2xTP2+SP, teacher PP2": ({"context": 2, "tensor": 2, "sequence": True}, {"pipeline": 2}, 4),
    "CP2xPP2, teacher CP2": ({"context": 2, "pipeline": 2}, {"context": 2}, 4),
    "TP2, teacher CP4": ({"tensor": 2}, {"context": 4}, 4),
    "one rank, one of the teacher's own": ({}, {"own": 1}, 2),
    "TP2, TP2 of the teacher's own": ({"tensor": 2}, {"tensor": 2, "own": 2}, 4),
    "DP2, PP2 of the teacher's own": ({}, {"pipeline": 2, "own": 2}, 4),
    "PP2, CP2 of the teacher's own": ({"pipeline": 2}, {"context": 2, "own": 2}, 4),
}


def small_config(models: Path, **layout: Any) -> RunConfig:
    return RunConfig(
        student=StudentConfig(hf=str(models / "student"), layout=ParallelLayout(**layout), vocab_multiple=4),
        teacher=TeacherConfig(hf=str(models / "teacher"), micro_batch=3),
        data=DataConfig(prompts=str(models / "prompts.jsonl"), batch_prompts=8, max_prompt_tokens=64, grader="exact"),
        rollout=RolloutConfig(max_response_tokens=10),
        training=TrainingConfig(steps=3, micro_batch=2, learning_rate=1e-3, precision="fp32"),
        evaluation=EvaluationConfig(prompts=0),
    )


def with_teacher(config: RunConfig, own: int | None = None, **layout: Any) -> RunConfig:
    """Lay the teacher out; with `own`, on that many ranks of its own."""
    assert config.teacher is not None
    teacher = dataclasses.replace(config.teacher, layout=ParallelLayout(**layout), placement="dedicated" if own else "colocated", num_ranks=own)
    return dataclasses.replace(config, teacher=teacher)


def run_job(config: RunConfig, run: Path) -> str:
    """Take part in a run, which ends without a report: drawing one takes as long as three steps. Reports are in test_quickstart.py and test_reporting.py."""
    draw, report.write_report = report.write_report, lambda _runs, out: out
    try:
        return run_in_world("test", config, run, torch.device("cpu"))
    finally:
        report.write_report = draw


def run_until_step(config: RunConfig, run: Path, steps: int) -> str:
    """Send this process the signal of a preemption once `steps` steps are done, on one rank only."""
    original = Trainer.step

    def step(self: Trainer, number: int) -> dict[str, float | int]:
        metrics = original(self, number)
        if number == steps and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    Trainer.step = step  # type: ignore[method-assign]
    try:
        return run_job(config, run)
    finally:
        Trainer.step = original  # type: ignore[method-assign]


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")


def write_prompts(file: Path) -> None:
    """Write 64 prompts of uneven length."""
    rows = [{"prompt": "count " + "abc"[: 1 + i % 3] * (1 + i % 5), "answer": str(i)} for i in range(64)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
