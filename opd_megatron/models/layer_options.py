"""How layers compute what their architecture says: whose modules, in which precision, and what of them is computed again in the backward.

Nothing of it changes a tensor's name or shape, in a model or in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from opd_megatron.config import ParallelLayout, TrainingConfig
from opd_megatron.models.architecture import Architecture, present_modules
from opd_megatron.packages import Package, probe

# The first and last compute capability on which Transformer Engine has a scaling's products: of one scale a tensor since Ada, of one for 128 numbers since
# Hopper, of scales that the hardware applies (MX) on Blackwell of data centres.
# https://github.com/NVIDIA/TransformerEngine/blob/release_v2.9/transformer_engine/pytorch/quantization.py
_FP8_CAPABILITY: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "tensorwise": ((8, 9), (99, 0)),
    "blockwise": ((9, 0), (99, 0)),
    "mxfp8": ((10, 0), (11, 9)),
}


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """What a model's layers are made with; the defaults run everywhere."""

    kind: Literal["te", "local"] = "local"
    # The rest is for a model that trains.
    fp8: Literal["tensorwise", "blockwise", "mxfp8"] | None = None
    fused_gradients: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: tuple[str, ...] = ()

    @property
    def frozen(self) -> LayerOptions:
        """The same for a model that only computes."""
        return LayerOptions(kind=self.kind)

    @property
    def recomputes_from_inputs(self) -> bool:
        """Whether modules with weights are computed again as functions of their input: where that needs no gradient, their weights would get none."""
        return self.recompute == "full" or not {"layernorm", "mlp", "moe"}.isdisjoint(self.recompute_modules)

    def transformer_settings(self, *, has_experts: bool) -> dict[str, Any]:
        """Return what Megatron-Core's TransformerConfig is told of it."""
        settings: dict[str, Any] = {}
        if self.fp8 is not None:
            # E4M3 forward, E5M2 for gradients. Delayed scaling, Megatron's default, remembers largest values from step to step, which a resumed run would need.
            settings |= {"fp8": "hybrid", "fp8_recipe": self.fp8}
        if self.recompute == "full":
            settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        elif self.recompute == "selective":
            settings |= {"recompute_granularity": "selective", "recompute_modules": present_modules(self.recompute_modules, has_experts=has_experts)}
        return settings


def choose_layers(
    training: TrainingConfig, *, has_device: bool, capability: tuple[int, int] | None = None, package: Callable[[str], Package] = probe
) -> LayerOptions:
    """Return the student's layers on this machine; ValueError, with what the probe said, for what was asked for and is not there.

    `capability` is the GPU's compute capability.
    """
    kind = _kind(training, has_device, package)
    if training.fp8 is not None:
        _check_fp8(training.fp8, kind, capability)
    beyond = [module for module in training.recomputed_modules if module in ("layernorm", "moe_act")]
    if beyond and kind != "te":
        raise ValueError(f"training.recompute_modules has {beyond[0]}, which needs Transformer Engine's layers, and these are local ones; leave it out")
    return LayerOptions(
        kind=kind,
        fp8=training.fp8,
        fused_gradients=_fuses_gradients(training, kind, has_device, package),
        recompute=training.recompute,
        recompute_modules=training.recomputed_modules,
    )


def layers_here(training: TrainingConfig) -> LayerOptions:
    """Return the student's layers in this process."""
    has_device = torch.cuda.is_available()
    return choose_layers(training, has_device=has_device, capability=torch.cuda.get_device_capability() if has_device else None)


def _kind(training: TrainingConfig, has_device: bool, package: Callable[[str], Package]) -> Literal["te", "local"]:
    # Transformer Engine multiplies fp32 numbers in TF32, whatever torch was told.
    if training.layers == "local" or (training.layers == "auto" and (not has_device or training.precision == "fp32")):
        return "local"
    if not has_device:
        raise ValueError("training.layers=te needs a CUDA device, and there is none; set training.layers=local, or auto")
    found = package("transformer_engine")
    if found.works:
        return "te"
    if training.layers == "te":
        raise ValueError(f"training.layers=te: {found}; run in a container that has a working one, or set training.layers=local, or auto")
    return "local"


def _check_fp8(scaling: str, kind: str, capability: tuple[int, int] | None) -> None:
    if kind != "te":
        raise ValueError(f"training.fp8={scaling} needs Transformer Engine's layers, and these are local ones (training.layers); set training.fp8=null")
    first, last = _FP8_CAPABILITY[scaling]
    if capability is None or not first <= capability <= last:
        found = "unknown" if capability is None else ".".join(map(str, capability))
        others = [name for name, (low, high) in _FP8_CAPABILITY.items() if capability is not None and low <= capability <= high]
        raise ValueError(
            f"training.fp8={scaling} has no kernels on a GPU of compute capability {found}; set training.fp8={' or '.join(others) if others else 'null'}"
        )


def _fuses_gradients(training: TrainingConfig, kind: str, has_device: bool, package: Callable[[str], Package]) -> bool:
    wanted = training.gradient_accumulation_fusion
    if wanted == "off":
        return False
    if kind == "te":
        return True
    if not has_device:
        problem = "there is no CUDA device"
    else:
        kernel = package("fused_weight_gradient_mlp_cuda")
        if kernel.works:
            return True
        problem = str(kernel)
    if wanted == "on":
        raise ValueError(f"training.gradient_accumulation_fusion=on needs Apex's kernel with local layers: {problem}; set it to auto")
    return False


def own_attention_reason(architecture: Architecture, layout: ParallelLayout, precision: Literal["bf16", "fp32"]) -> str | None:
    """Return why Transformer Engine's attention does not compute this model, so that ours does between its layers; None where it does."""
    if architecture.attention_softcap is not None:
        return "it caps no scores"
    if precision == "fp32":
        return "it has no fp32 kernels for packed sequences or context ranks"
    sizes = {window for window in architecture.windows if window is not None}
    if len(sizes) > 1:
        return f"it takes one window size, not {sorted(sizes)}"
    if sizes and layout.context > 1:
        # Of its ways over context ranks, the default has no windows, and those that have them do not take packed sequences.
        return "it has no windows over context ranks"
    return None
