"""Which of the GPU packages that a container may bring work here: Transformer Engine, Apex, flash-attn. The only place that imports them.

Megatron-Core imports each of them by itself and survives an ImportError alone. A package that is half installed raises anything: RuntimeError without its GPU
library, OSError for a shared object, AttributeError, SystemExit. So each is tried here first, and one that does not work is hidden from Megatron-Core.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """What must be there for a package to be of use."""

    # As pip calls it, where that is not what is imported.
    distribution: str
    # The oldest version whose parts Megatron-Core 0.16.1 uses as we have it use them.
    minimum: tuple[int, ...]
    # Modules, and what each must have.
    parts: Mapping[str, tuple[str, ...]]


REQUIREMENTS: Mapping[str, Requirement] = {
    "transformer_engine": Requirement(
        distribution="transformer-engine",
        minimum=(2, 3),
        parts={
            "transformer_engine": (),
            "transformer_engine.common.recipe": ("Format", "Float8CurrentScaling"),
            "transformer_engine.pytorch": ("Linear", "LayerNormLinear", "GroupedLinear", "DotProductAttention", "RMSNorm", "fp8_autocast"),
            "transformer_engine.pytorch.fp8": ("FP8GlobalStateManager", "fp8_autocast"),
            "transformer_engine.pytorch.optimizers": ("FusedAdam", "FusedSGD", "multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale"),
        },
    ),
    # PyPI's apex is another package, without any of these.
    "apex": Requirement(
        distribution="apex",
        minimum=(0, 1),
        parts={"apex.optimizers": ("FusedAdam",), "apex.normalization.fused_layer_norm": ("FusedRMSNormAffineFunction",)},
    ),
    # A kernel that Apex builds where it is told to: a product that adds a weight's gradient to a buffer.
    "fused_weight_gradient_mlp_cuda": Requirement(
        distribution="apex", minimum=(0, 1), parts={"fused_weight_gradient_mlp_cuda": ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16")}
    ),
    "flash_attn": Requirement(distribution="flash-attn", minimum=(2, 6), parts={"flash_attn": ("flash_attn_varlen_func", "flash_attn_with_kvcache")}),
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """What the probe found. `version` is None where nothing is installed; `problem` says why it is of no use, None that it works."""

    name: str
    version: str | None
    problem: str | None

    @property
    def works(self) -> bool:
        return self.problem is None

    def __str__(self) -> str:
        name = REQUIREMENTS[self.name].distribution
        found = name if self.version is None else f"{name} {self.version}"
        return found if self.problem is None else f"{found}: {self.problem}"


@cache
def probe(name: str) -> Package:
    """Return whether a package of REQUIREMENTS works; it is imported, once a process, and whatever it raises is caught and becomes the `problem`."""
    required = REQUIREMENTS[name]
    try:
        version = importlib.metadata.version(required.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = None
    problem = _problem(name, version, required)
    if problem is not None:
        _hide(name)
    return Package(name=name, version=version, problem=problem)


def probe_all() -> tuple[Package, ...]:
    """Return what is there of every package, in the order of REQUIREMENTS. Called before Megatron-Core is imported, which then sees only those that work."""
    return tuple(map(probe, REQUIREMENTS))


def hide_all() -> None:
    """Let Megatron-Core find none of the packages: on a machine without a GPU, where one may be installed, its modules and its Adam would be taken and fail."""
    for name in REQUIREMENTS:
        _hide(name)


def _problem(name: str, version: str | None, required: Requirement) -> str | None:
    if version is None:
        # Left in the path without its metadata: Megatron-Core asks for its version, and would fail on that.
        return "not installed" if _not_found(name) else "is there, but has no version; reinstall it"
    if _release(version) < required.minimum:
        return f"is older than {'.'.join(map(str, required.minimum))}"
    for module, names in required.parts.items():
        try:
            found = importlib.import_module(module)
            missing = [one for one in names if not hasattr(found, one)]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            first_line = (str(error) or "no reason given").splitlines()[0]
            return f"importing {module} raises {type(error).__name__}: {first_line}"
        if missing:
            return f"{module} has no {', '.join(missing)}"
    return None


def _not_found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except (ImportError, ValueError):
        return True


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: 2.9.0+70f53666 -> (2, 9, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _hide(name: str) -> None:
    """Let every later import of the package, and of what was loaded of it, fail with ImportError."""
    for module in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
        del sys.modules[module]
    sys.modules[name] = None  # type: ignore[assignment]
