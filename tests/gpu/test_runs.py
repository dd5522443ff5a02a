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


def run_on(device: torch.device, *runs: tuple[RunConfig, Path]) -> str:
    """Take part in one run after another, which end without a report; return the line on who talks by what. A process takes seconds to start."""
    from megatron.core import parallel_state

    from opd_megatron.parallel.world import describe_device
    from opd_megatron.reporting import report
    from opd_megatron.training.job import run_in_world

    report.write_report = lambda _runs, out: out
    for config, run in runs:
        assert run_in_world("test", config, run, device) == "finished"
        parallel_state.destroy_model_parallel()
    return describe_device(device)


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


def of_experts(models: Path, **layout: int) -> RunConfig:
    """Return a run whose student is a mixture of experts."""
    return dataclasses.replace(small_config(models), student=StudentConfig(hf=str(models / "qwen3_moe"), layout=ParallelLayout(**layout), vocab_multiple=4))


@pytest.fixture(scope="session")
def recorded(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one rank on the CPU, in fp32, whose rollouts the others replay: of a dense student in `dense`, of a mixture in `experts`."""
    folder = tmp_path_factory.mktemp("recorded")
    configs = {"dense": small_config(models), "experts": of_experts(models)}
    recording = {name: dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, record=True)) for name, config in configs.items()}
    on_ranks(run_on, *((config, folder / name) for name, config in recording.items()), device="cpu")
    return folder


@pytest.fixture(scope="module")
def alone(models: Path, recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense run by one rank on the device, in `fp32` and `bf16`."""
    folder = tmp_path_factory.mktemp("alone")
    config = replaying(small_config(models), recorded / "dense")
    on_ranks(run_on, (config, folder / "fp32"), (changed(config, precision="bf16"), folder / "bf16"))
    return folder


def test_a_run_has_the_losses_of_the_cpu(assert_figure: Callable[..., None], recorded: Path, alone: Path) -> None:
    for key in ("loss", "grad_norm"):
        assert_figure(f"run, {key} against the CPU", difference(alone / "fp32", recorded / "dense", key), FP32_BAR)


def test_a_run_in_bf16_has_the_losses_of_the_cpu_in_fp32(assert_figure: Callable[..., None], recorded: Path, alone: Path) -> None:
    assert_figure("run in bf16, loss against the CPU in fp32", difference(alone / "bf16", recorded / "dense", "loss"), BF16_BAR)


def test_four_ranks_have_the_losses_of_the_cpu(assert_figure: Callable[..., None], models: Path, recorded: Path, tmp_path: Path) -> None:
    """Student TP2 x PP2 with sequence parallelism, teacher in two stages."""
    config = with_teacher(small_config(models, tensor=2, pipeline=2, sequence=True), pipeline=2)
    lines = on_ranks(run_on, (replaying(config, recorded / "dense"), tmp_path / "run"), num_ranks=4)
    if DEVICE == "cuda":
        assert ("NCCL" in lines[0]) == (torch.cuda.device_count() >= 4), lines[0]
    for key in ("loss", "grad_norm"):
        assert_figure(f"run in TP2xPP2+SP, teacher PP2, {key} against the CPU", difference(tmp_path / "run", recorded / "dense", key), FP32_BAR)


def test_experts_spread_over_two_ranks_have_the_losses_of_the_cpu(assert_figure: Callable[..., None], models: Path, recorded: Path, tmp_path: Path) -> None:
    on_ranks(run_on, (replaying(of_experts(models, expert=2), recorded / "experts"), tmp_path / "run"), num_ranks=2)
    for key in ("loss", "grad_norm"):
        assert_figure(f"run of experts in EP2, {key} against the CPU", difference(tmp_path / "run", recorded / "experts", key), FP32_BAR)


def test_a_resumed_run_and_one_that_offloads_end_with_the_same_bits(models: Path, tmp_path: Path) -> None:
    """In bf16, as runs on GPUs are."""
    config = dataclasses.replace(changed(small_config(models), precision="bf16", steps=4), checkpoint=CheckpointConfig(every_steps=2))
    teacher = TeacherConfig(hf=str(models / "teacher"), micro_batch=3, placement="offloaded")
    offloading = changed(dataclasses.replace(config, teacher=teacher), offload_optimizer=True)
    first_half = (changed(config, steps=2), tmp_path / "parts")
    on_ranks(run_on, (config, tmp_path / "whole"), first_half, (config, tmp_path / "parts"), (offloading, tmp_path / "offloaded"))
    whole = weights_of(tmp_path / "whole")
    for other in ("parts", "offloaded"):
        found = weights_of(tmp_path / other)
        assert found.keys() == whole.keys()
        assert [name for name in whole if not torch.equal(whole[name], found[name])] == [], other
        assert [step["loss"] for step in metrics_of(tmp_path / other)] == [step["loss"] for step in metrics_of(tmp_path / "whole")]


def test_layers_of_transformer_engine_have_the_losses_of_the_local_ones(
    assert_figure: Callable[..., None], record_property: Callable[[str, object], None], models: Path, recorded: Path, tmp_path: Path
) -> None:
    """Also keeps the median time of a step with either, of these tiny models: tools/bench_step.py has those of large ones."""
    engine = probe("transformer_engine")
    if not engine.works or DEVICE == "cpu":
        pytest.skip(f"needs Transformer Engine and a GPU: {engine}")
    config = replaying(small_config(models), recorded / "dense")
    kinds = [(layers, precision) for precision in ("fp32", "bf16") for layers in ("te", "local")]
    on_ranks(run_on, *((changed(config, layers=layers, precision=precision), tmp_path / f"{layers}-{precision}") for layers, precision in kinds))
    for layers, precision in kinds:
        seconds = statistics.median(step["train_seconds"] for step in metrics_of(tmp_path / f"{layers}-{precision}")[1:])
        record_property("speed", json.dumps({"name": f"tiny run with {layers} layers in {precision}, seconds to train a step", "value": seconds}))
    # Transformer Engine multiplies fp32 numbers in TF32, which has bf16's bar.
    for precision, bar in (("fp32", BF16_BAR), ("bf16", BF16_BAR)):
        for key in ("loss", "grad_norm"):
            found = difference(tmp_path / f"te-{precision}", tmp_path / f"local-{precision}", key)
            assert_figure(f"run with te against local layers, {key} in {precision}", found, bar)
