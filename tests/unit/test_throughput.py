"""Counted operations against what torch counts in transformers' own models, and rates made of them. Not covered: what a GPU reaches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from opd_megatron.data.batches import Sample
from opd_megatron.models.flops import forward_flops, head_flops
from opd_megatron.models.hf_folder import read_architecture
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.training.throughput import Throughput, known_peak_tflops, peak_tflops
from tests.tiny import write_tiny_model

LENGTH = 24


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "phi3"])
def test_a_forward_pass_takes_what_torch_counts(tmp_path: Path, family: str) -> None:
    folder = write_tiny_model(tmp_path / "model", family, num_hidden_layers=2)
    architecture = read_architecture(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    if family == "qwen3_moe":
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, architecture.vocab_size, (1, LENGTH)))
    # Eager attention multiplies what the causal mask, or a window, then hides.
    visible = sum(min(position + 1, window or LENGTH) for window in architecture.windows or (None, None) for position in range(LENGTH))
    hidden = 4 * (2 * LENGTH**2 - visible) * architecture.num_heads * architecture.head_dim
    assert forward_flops(architecture, [LENGTH], LENGTH) + hidden == counter.get_total_flops()


def test_sequences_add_up_and_the_head_is_where_it_is_asked_for(tmp_path: Path) -> None:
    architecture = read_architecture(write_tiny_model(tmp_path / "model"))
    apart = sum(forward_flops(architecture, [length], 3) for length in (5, 9))
    assert forward_flops(architecture, [5, 9], 6) == apart
    assert forward_flops(architecture, [5, 9], 6) - forward_flops(architecture, [5, 9], 0) == head_flops(architecture, 6)


def sample(prompt: int, response: int) -> Sample:
    return Sample(0, 0, torch.zeros(prompt, dtype=torch.long), torch.zeros(response, dtype=torch.long), None, True)


def test_rates_are_of_all_gpus_and_utilization_is_of_the_peak(tmp_path: Path) -> None:
    student = read_architecture(write_tiny_model(tmp_path / "student"))
    teacher = read_architecture(write_tiny_model(tmp_path / "teacher", num_hidden_layers=3))
    rollouts = Rollouts((sample(4, 6), sample(3, 7)), 0)
    rates = Throughput(student=student, teacher=teacher, num_ranks=4, student_ranks=2, weighs=True, writes=True, peak_tflops=1e-6)
    found = rates.metrics(rollouts, 5, {"forward_backward": 2.0}, 8.0)
    training = 3 * forward_flops(student, [10, 10], 5) + head_flops(teacher, 5)
    before = 2 * forward_flops(student, [10, 10], 13) + forward_flops(teacher, [10, 10], 13)
    assert found["tokens_per_second"] == 20 / 8
    assert found["tokens_per_second_per_gpu"] == 20 / 8 / 4
    assert found["train_tflops_per_gpu"] == pytest.approx(training / 2.0 / 2 / 1e12)
    assert found["tflops_per_gpu"] == pytest.approx((training + before) / 8.0 / 4 / 1e12)
    assert found["train_model_flop_utilization"] == pytest.approx(found["train_tflops_per_gpu"] / 1e-6)
    assert found["model_flop_utilization"] == pytest.approx(found["tflops_per_gpu"] / 1e-6)


def test_nobody_knows_the_peak_of_a_cpu(tmp_path: Path) -> None:
    student = read_architecture(write_tiny_model(tmp_path / "student"))
    assert peak_tflops(torch.device("cpu"), None) is None
    assert peak_tflops(torch.device("cpu"), 2.0) == 2.0
    rates = Throughput(student=student, teacher=None, num_ranks=1, student_ranks=1, weighs=False, writes=False, peak_tflops=None)
    found = rates.metrics(Rollouts((sample(4, 6),), 0), 6, {"forward_backward": 1.0}, 1.0)
    assert found["tflops_per_gpu"] == found["train_tflops_per_gpu"]
    assert not any("utilization" in key for key in found)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A10G", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, peak: float | None) -> None:
    assert known_peak_tflops(name) == peak
