"""Whether this node's GPUs can be used, and if not why, in numbers: the NVIDIA driver, torch's build, and what a GPU must be able to do.

Without it a run on a GPU node with a CPU build of torch, or with an old driver, would train on the CPU, and nobody would know for days. What is there of
NVIDIA's is read from files and nvidia-smi, so that it can be told where torch is broken; only `check_usable` asks torch. `OPD_DEVICE=cpu` asks for the CPU.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.config.checks import require

# The oldest Linux driver of each major version of CUDA: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, whose table has the
# first numbers; the whole ones are those of the release notes. A container may bring its own user-space driver (cuda-compat) and run with an older one:
# hence the numbers explain a failure, and do not forbid an attempt.
MINIMUM_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
# bf16 came with Ampere.
_BF16_CAPABILITY = (8, 0)
_SMI_SECONDS = 20.0
_WAY_OUT = "or set OPD_DEVICE=cpu to run on the CPU"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a node has: the version of the NVIDIA driver that is loaded, None without one, and how many GPUs are in sight."""

    driver: str | None
    num_gpus: int


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """A torch that is installed, and for which CUDA it was built; None for the CPU. `is_rocm`: for AMD's GPUs."""

    version: str
    cuda: str | None
    is_rocm: bool = False

    def __str__(self) -> str:
        return f"torch {self.version}, built {f'for CUDA {self.cuda}' if self.cuda else 'for ROCm' if self.is_rocm else 'for the CPU alone'}"


def find_machine(root: Path = Path("/"), smi: str = "nvidia-smi") -> Machine:
    """Return what is there below `root`, by the driver's own files; by nvidia-smi where these are not shown, as in some virtual machines.

    A container that was given no GPU sees the node's driver and none of its devices: it has no GPU.
    """
    version_file = root / "proc" / "driver" / "nvidia" / "version"
    found = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", version_file.read_text(errors="replace")) if version_file.is_file() else None
    num_gpus = len([file for file in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name)])
    if found is not None and num_gpus:
        return Machine(driver=found[1], num_gpus=num_gpus)
    listed = _listed_by(smi)
    driver = found[1] if found is not None else listed[0] if listed else None
    return Machine(driver=driver, num_gpus=num_gpus or len(listed))


def _listed_by(smi: str) -> list[str]:
    """Return the driver's version once for each GPU that nvidia-smi lists; nothing where it is not there or fails."""
    program = shutil.which(smi)
    if program is None:
        return []
    try:
        done = subprocess.run([program, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    # Where it cannot reach the driver it says so on stdout.
    return [line.strip() for line in done.stdout.splitlines() if re.fullmatch(r"\s*\d+(\.\d+)+\s*", line)] if done.returncode == 0 else []


def find_torch() -> TorchBuild | None:
    """Return what the installed torch was built for, from its version file: importing it takes seconds, and a broken one cannot be imported."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    return read_build(file.read_text()) if file is not None and file.is_file() else None


def read_build(text: str) -> TorchBuild:
    """Return what torch's version.py says."""
    values: dict[str, Any] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            values[ast.unparse(target)] = node.value.value
    cuda = values.get("cuda")
    return TorchBuild(version=str(values.get("__version__", "unknown")), cuda=None if cuda is None else str(cuda), is_rocm=values.get("hip") is not None)


def wants_cpu(environment: Mapping[str, str]) -> bool:
    """Return whether the user asked for the CPU: by OPD_DEVICE, or by hiding every GPU from CUDA."""
    device = environment.get("OPD_DEVICE", "auto")
    require(device in ("auto", "cpu"), f"environment variable OPD_DEVICE={device!r} is neither auto, for the GPUs where there are any, nor cpu")
    return device == "cpu" or environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def hide_gpus_if_asked() -> None:
    """Let CUDA, which is not started yet, find no GPU where OPD_DEVICE=cpu."""
    if wants_cpu(os.environ):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def is_for_gpus(recipe: str) -> bool:
    """Return whether a recipe's name says that it needs GPUs: <student>_from_<teacher>_<gpus>gpu_<hardware>."""
    return re.search(r"_\d+gpu_", recipe) is not None


def check_build(machine: Machine, build: TorchBuild | None) -> None:
    """Raise ValueError where GPUs are in sight and the installed torch can use none, whatever the driver is."""
    if machine.num_gpus == 0 or build is None or build.cuda is not None or build.is_rocm:
        return
    raise ValueError(
        f"this node has {_gpus(machine)}, and {build}; install a torch built for CUDA, or use the GPU container's own Python "
        f"(OPD_PYTHON under Slurm), {_WAY_OUT}"
    )


def check_present(recipe: str, machine: Machine) -> None:
    """Raise ValueError where a recipe for GPUs is to run and there is none in sight."""
    if machine.num_gpus or not is_for_gpus(recipe):
        return
    seen = "no NVIDIA driver"
    if machine.driver is not None:
        seen = f"driver {machine.driver} is loaded, but no GPU is given to this process (docker run --gpus all, apptainer --nv)"
    raise ValueError(f"recipe {recipe} is for GPUs, and none is in sight here: {seen}; run it on a GPU node, {_WAY_OUT}")


def why_unusable(machine: Machine, build: TorchBuild | None, reason: str) -> str:
    """Return why CUDA does not start where GPUs are in sight; `reason` is what torch says."""
    told = f"this node has {_gpus(machine)}, and torch cannot use them: "
    if machine.driver is None:
        return f"{told}no NVIDIA driver is loaded; load it (nvidia-smi must list the GPUs), {_WAY_OUT}"
    minimum = minimum_driver(build)
    if minimum is not None and build is not None and _numbers(machine.driver) < _numbers(minimum):
        too_old = f"driver {machine.driver} is older than {minimum}, which CUDA {build.cuda} needs ({build})"
        return f"{told}{too_old}; update it, or take a torch for an older CUDA, {_WAY_OUT}"
    return f"{told}{reason or 'it gives no reason'} ({build}, driver {machine.driver}); see that nvidia-smi lists them, {_WAY_OUT}"


def minimum_driver(build: TorchBuild | None) -> str | None:
    """Return the oldest driver for a build of torch; None where nobody knows."""
    return MINIMUM_DRIVER.get(int(build.cuda.split(".")[0])) if build is not None and build.cuda else None


def check_before_torch(recipe: str, *, runs: bool, machine: Machine | None = None, build: TorchBuild | None = None) -> None:
    """Raise ValueError for what can be known without importing torch. `runs`: here and now, and not only looked at, as by --check on a login node."""
    if wants_cpu(os.environ):
        return
    machine = machine or find_machine()
    check_build(machine, build or find_torch())
    if runs:
        check_present(recipe, machine)


def check_usable(precision: str) -> None:
    """Raise ValueError where GPUs are in sight that torch cannot use, or that cannot compute in this precision. Starts CUDA."""
    import torch

    if wants_cpu(os.environ):
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            check_precision(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), precision)
        return
    machine = find_machine()
    if machine.num_gpus:
        raise ValueError(why_unusable(machine, find_torch(), cuda_failure()))


def check_precision(name: str, capability: tuple[int, int], precision: str) -> None:
    """Raise ValueError where a GPU has no arithmetic in bf16 and a run wants it: torch would emulate it, slowly, or fail in the first product."""
    require(
        precision != "bf16" or capability >= _BF16_CAPABILITY,
        f"{name} (compute capability {capability[0]}.{capability[1]}) has no bf16, which begins with {_BF16_CAPABILITY[0]}.{_BF16_CAPABILITY[1]} (A100); "
        "set training.precision=fp32, or use a newer GPU",
    )


def cuda_failure() -> str:
    """Return the first line of what torch says when CUDA is to be started; empty where it starts."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def _gpus(machine: Machine) -> str:
    return "1 GPU" if machine.num_gpus == 1 else f"{machine.num_gpus} GPUs"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
