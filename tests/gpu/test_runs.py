"""Whole short runs on a GPU against the same rollouts on the CPU in fp32: layouts, bf16, resuming, offloading, experts, and layers of Transformer Engine.

Ranks share a GPU over gloo where there are fewer GPUs than ranks, and have one each over NCCL otherwise: `opd_megatron.parallel.shared_gpu`.
Not covered: several nodes, and how fast any of it is.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import CheckpointConfig, ParallelLayout, RunConfig, StudentConfig, TeacherConfig
from opd_megatron.packages import probe
from tests.gpu.ranks import DEVICE, on_ranks
from tests.runs import metrics_of, small_config, weights_of, with_teacher

pytestmark = pytest.mark.gpu

# Losses and gradient norms of three steps: fp32 in another order, and the roundings of bf16.
FP32_BAR, BF16_BAR = 1e-5, 1e-2


def run_on(device: torch.device, config: RunConfig, run: Path) -> str:
    """Take part in a run, which ends without a report; return the line on who talks by what."""
    from opd_megatron.parallel.world import describe_device
    from opd_megatron.reporting import report
    from opd_megatron.training.job import run_in_world

    line = describe_device(device)
    report.write_report = lambda _runs, out: out
    assert run_in_world("test", config, run, device) == "finished"
    return line


def changed(config: RunConfig, **training: Any) -> RunConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def replaying(config: RunConfig, run: Path) -> RunConfig:
    """Have the run train on what another one wrote, so that no token differs."""
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, replay=str(run)))


def difference(run: Path, other: Path, key: str) -> float:
    """Return the largest relative difference of a metric over the steps."""
    pairs = list(zip(metrics_of(run), metrics_of(other), strict=True))
    assert pairs
    return max(abs(one[key] - two[key]) / abs(two[key]) for one, two in pairs)


@pytest.fixture(scope="session")
def recorded(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank on the CPU, in fp32, whose rollouts the others replay."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    config = small_config(models)
    on_ranks(run_on, dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, record=True)), run, device="cpu")
    return run


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "one rank": ({}, {}, 1),
    "TP2xPP2+SP, teacher PP2": ({"tensor": 2, "pipeline": 2, "sequence": True}, {"pipeline": 2}, 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_has_the_losses_of_the_cpu(figure: Callable[..., None], models: Path, recorded: Path, tmp_path: Path, name: str) -> None:
    student, teacher, num_ranks = LAYOUTS[name]
    lines = on_ranks(run_on, replaying(with_teacher(small_config(models, **student), **teacher), recorded), tmp_path / "run", num_ranks=num_ranks)
    if DEVICE == "cuda" and num_ranks > 1:
        assert ("NCCL" in lines[0]) == (torch.cuda.device_count() >= num_ranks), lines[0]
    for key in ("loss", "grad_norm"):
        figure(f"run in {name}, {key} against the CPU", difference(tmp_path / "run", recorded, key), FP32_BAR)


def test_a_run_in_bf16_has_the_losses_of_the_cpu_in_fp32(figure: Callable[..., None], models: Path, recorded: Path, tmp_path: Path) -> None:
    on_ranks(run_on, changed(replaying(small_config(models), recorded), precision="bf16"), tmp_path / "run")
    figure("run in bf16, loss against the CPU in fp32", difference(tmp_path / "run", recorded, "loss"), BF16_BAR)


def test_experts_spread_over_two_ranks_have_the_losses_of_the_cpu(figure: Callable[..., None], models: Path, tmp_path: Path) -> None:
    base = dataclasses.replace(small_config(models), student=StudentConfig(hf=str(models / "qwen3_moe"), vocab_multiple=4))
    record = dataclasses.replace(base, rollout=dataclasses.replace(base.rollout, record=True))
    on_ranks(run_on, record, tmp_path / "recorded", device="cpu")
    spread = dataclasses.replace(base.student, layout=ParallelLayout(expert=2))
    on_ranks(run_on, replaying(dataclasses.replace(base, student=spread), tmp_path / "recorded"), tmp_path / "run", num_ranks=2)
    for key in ("loss", "grad_norm"):
        figure(f"run of experts in EP2, {key} against the CPU", difference(tmp_path / "run", tmp_path / "recorded", key), FP32_BAR)


def test_a_resumed_run_and_one_that_offloads_end_with_the_same_bits(models: Path, tmp_path: Path) -> None:
    """In bf16, as runs on GPUs are."""
    config = dataclasses.replace(changed(small_config(models), precision="bf16", steps=4), checkpoint=CheckpointConfig(every_steps=2))
    on_ranks(run_on, config, tmp_path / "whole")
    on_ranks(run_on, changed(config, steps=2), tmp_path / "parts")
    on_ranks(run_on, config, tmp_path / "parts")
    offloading = changed(
        dataclasses.replace(config, teacher=TeacherConfig(hf=str(models / "teacher"), micro_batch=3, placement="offloaded")), offload_optimizer=True
    )
    on_ranks(run_on, offloading, tmp_path / "offloaded")
    whole = weights_of(tmp_path / "whole")
    for other in ("parts", "offloaded"):
        found = weights_of(tmp_path / other)
        assert found.keys() == whole.keys()
        assert [name for name in whole if not torch.equal(whole[name], found[name])] == [], other
        assert [step["loss"] for step in metrics_of(tmp_path / other)] == [step["loss"] for step in metrics_of(tmp_path / "whole")]


def test_layers_of_transformer_engine_have_the_losses_of_the_local_ones(
    figure: Callable[..., None], record_property: Callable[[str, object], None], models: Path, recorded: Path, tmp_path: Path
) -> None:
    """Also keeps the median time of a step with either, of these tiny models: tools/bench_step.py has those of large ones."""
    engine = probe("transformer_engine")
    if not engine.works or DEVICE == "cpu":
        pytest.skip(f"needs Transformer Engine and a GPU: {engine}")
    for precision, bar in (("fp32", FP32_BAR), ("bf16", BF16_BAR)):
        for layers in ("te", "local"):
            run = tmp_path / f"{layers}-{precision}"
            on_ranks(run_on, changed(replaying(small_config(models), recorded), layers=layers, precision=precision), run)
            seconds = statistics.median(step["train_seconds"] for step in metrics_of(run)[1:])
            record_property("speed", json.dumps({"name": f"tiny run with {layers} layers in {precision}, seconds to train a step", "value": seconds}))
        for key in ("loss", "grad_norm"):
            found = difference(tmp_path / f"te-{precision}", tmp_path / f"local-{precision}", key)
            figure(f"run with te against local layers, {key} in {precision}", found, bar)
