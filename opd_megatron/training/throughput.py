"""How fast a step was: tokens and operations per second and GPU, and the share of what the GPU could do (model FLOP utilization, MFU)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.flops import forward_flops, head_flops
from opd_megatron.rollout.rollouts import Rollouts

# Dense bf16 teraflops per second of NVIDIA's data sheets, by a word of the device's name; the first that fits counts.
_PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
}


def peak_tflops(device: torch.device, given: float | None) -> float | None:
    """Return what one device can do in bf16, `given` first; None where nobody knows, as for a CPU."""
    if given is not None or device.type != "cuda":
        return given
    return known_peak_tflops(torch.cuda.get_device_name(device))


def known_peak_tflops(name: str) -> float | None:
    """Return what a data sheet says of the GPU of this name."""
    return next((peak for word, peak in _PEAK_TFLOPS.items() if re.search(rf"\b{word}\b", name)), None)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Rates of one run's steps. `num_ranks` are all GPUs of the job, `student_ranks` those that train.

    `writes` says whether the student wrote the responses in the step, `weighs` whether every token is measured before some are chosen. What is computed a
    second time (`training.recompute`) is not counted, and a frozen module is counted as one that trains.
    """

    student: Architecture
    teacher: Architecture | None
    num_ranks: int
    student_ranks: int
    weighs: bool
    writes: bool
    peak_tflops: float | None

    def metrics(self, rollouts: Rollouts, num_trained: float, seconds: Mapping[str, float], step_seconds: float) -> dict[str, float]:
        """Return the rates of a step in which `num_trained` response tokens had a loss, from what it took by phase."""
        tokens = sum(rollouts.num_tokens)
        training, whole = self._tera_operations(rollouts, num_trained)
        rates = {
            "tokens_per_second": tokens / step_seconds,
            "tokens_per_second_per_gpu": tokens / step_seconds / self.num_ranks,
            "tflops_per_gpu": whole / step_seconds / self.num_ranks,
            "train_tflops_per_gpu": training / seconds["forward_backward"] / self.student_ranks,
        }
        if self.peak_tflops is not None:
            rates["model_flop_utilization"] = rates["tflops_per_gpu"] / self.peak_tflops
            rates["train_model_flop_utilization"] = rates["train_tflops_per_gpu"] / self.peak_tflops
        return rates

    def _tera_operations(self, rollouts: Rollouts, num_trained: float) -> tuple[float, float]:
        """Return the operations of forward and backward, and of the whole step but a search, in units of 1e12."""
        layers, written = forward_flops(self.student, rollouts.num_tokens, 0), rollouts.num_response_tokens
        training = 3 * (layers + head_flops(self.student, num_trained))
        before = (self.writes + self.weighs) * (layers + head_flops(self.student, written))
        if self.teacher is not None:
            # Its head is applied where the loss is.
            training += head_flops(self.teacher, num_trained)
            before += forward_flops(self.teacher, rollouts.as_teacher_reads().num_tokens, 0) + self.weighs * head_flops(self.teacher, written)
        return training / 1e12, (training + before) / 1e12
