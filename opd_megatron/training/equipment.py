"""What this run computes with, and what each missing piece costs: refused where it was asked for, said once where it was not.

The probe of packages is `opd_megatron.packages`, the choice of layers `models.layer_options`; nothing here chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Literal

import torch

from opd_megatron.config import ParallelLayout, RunConfig
from opd_megatron.losses.triton_divergence import HAS_TRITON
from opd_megatron.models.architecture import Architecture, present_modules
from opd_megatron.models.layer_options import LayerOptions, layers_here, own_attention_reason
from opd_megatron.packages import probe, probe_all
from opd_megatron.parallel.world import agreed_by_rank_0, shared_errors

# What a run does without where a package does not work.
_COSTS = {
    "transformer_engine": "norms and projections are kernels of their own, experts run one after another, and there is no training.fp8",
    "apex": "without Transformer Engine, Adam and norms of gradients are many small kernels",
    "fused_weight_gradient_mlp_cuda": "with local layers, gradients of weights are added to their buffer in a pass of their own",
    "flash_attn": "no rollouts from a paged cache, whose sequences come and go while others are written",
}
_NAMES = {"te": "Transformer Engine's", "local": "Megatron-Core's local ones"}


def check_equipment(config: RunConfig) -> None:
    """Raise ValueError, the same on every rank, where what was asked for is not there, or where ranks would compute with different packages."""
    with shared_errors():
        layers_here(config.training)
    if not torch.cuda.is_available():
        return
    own = [str(package) for package in probe_all()]
    theirs = agreed_by_rank_0(own)
    with shared_errors():
        for found, first in zip(own, theirs, strict=True):
            if found != first:
                raise ValueError(f"found {found}, and on rank 0 {first}: layers would differ between ranks; use the same container on every node")


def describe_equipment(config: RunConfig, student: Architecture, teacher: Architecture | None) -> str:
    """Return a few lines for the log of rank 0, as short on a CPU as there is little to choose."""
    options = layers_here(config.training)
    versions = f"torch {torch.__version__}, megatron-core {version('megatron-core')}"
    if not torch.cuda.is_available():
        return f"equipment: CPU, {versions}\n" + _line("layers", f"{_NAMES[options.kind]}{_again(options, student)}; attention, Adam and loss are PyTorch's")
    device = torch.cuda.get_device_name()
    models = {"student": (student, config.student.layout)}
    if teacher is not None and config.scoring_teacher is not None:
        models["teacher"] = (teacher, config.scoring_teacher.layout)
    lines = [f"equipment: {device}, CUDA {torch.version.cuda}, {versions}"]
    lines += [_line(name, text) for name, text in _choices(config, options, models)]
    return "\n".join([*lines, *_missing(options)])


def _choices(config: RunConfig, options: LayerOptions, models: dict[str, tuple[Architecture, ParallelLayout]]) -> Iterator[tuple[str, str]]:
    why = f"training.layers={config.training.layers}"
    version = f" {probe('transformer_engine').version}" if options.kind == "te" else ""
    yield "layers", f"{_NAMES[options.kind]}{version} ({why}){_again(options, models['student'][0])}"
    yield "norms", "fused into the projections behind them" if options.kind == "te" else "PyTorch's kernels"
    yield "attention", "; ".join(f"{name}: {_attention(options, config.training.precision, *model)}" for name, model in models.items())
    yield "8-bit", "off" if options.fp8 is None else f"{options.fp8} scaling in the student's training; writing and scoring in {config.training.precision}"
    fused = next((name for name in ("transformer_engine", "apex") if probe(name).works), None)
    yield "Adam", "PyTorch's" if fused is None else f"fused, of {probe(fused)}"
    yield "gradients", "added by the products themselves" if options.fused_gradients else "added in a pass of their own"
    yield "loss", "Triton kernels" if HAS_TRITON else "PyTorch's operations: triton is not installed, so more passes over a chunk's logits"


def _attention(options: LayerOptions, precision: Literal["bf16", "fp32"], architecture: Architecture, layout: ParallelLayout) -> str:
    reason = own_attention_reason(architecture, layout, precision)
    if options.kind == "te" and reason is None:
        return "Transformer Engine's"
    ours = "ours in chunks" if architecture.attention_softcap is not None else "ours by PyTorch's kernels"
    return ours if options.kind == "local" else f"{ours}, as to Transformer Engine's: {reason}"


def _again(options: LayerOptions, student: Architecture) -> str:
    modules = present_modules(options.recompute_modules, has_experts=student.experts is not None)
    return {"none": "", "full": ", computed again in the backward", "selective": f", of which {' and '.join(modules)} again in the backward"}[options.recompute]


def _missing(options: LayerOptions) -> list[str]:
    """Return one line for every package that does not work and would be of use."""
    packages = {package.name: package for package in probe_all()}
    if options.kind == "te":
        # Its layers and its Adam do what these are for.
        packages = {name: package for name, package in packages.items() if name not in ("apex", "fused_weight_gradient_mlp_cuda")}
    return [_line("missing", f"{package}: {_COSTS[name]}") for name, package in packages.items() if not package.works]


def _line(name: str, text: str) -> str:
    return f"  {name:<10} {text}"
