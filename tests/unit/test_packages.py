"""The probe of GPU packages, each time in a process of its own with packages made for it in a folder on its path.

Not covered: the real packages, which need a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT

TE = "transformer_engine"


def write_package(folder: Path, files: dict[str, str], distribution: str | None = None, version: str = "2.9.0") -> None:
    """Write modules, and what pip leaves of an installed distribution unless there is none."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    if distribution is not None:
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


WHOLE = {
    f"{TE}/__init__.py": "",
    f"{TE}/common/__init__.py": "",
    f"{TE}/common/recipe.py": "Format = Float8CurrentScaling = object",
    f"{TE}/pytorch/__init__.py": "Linear = LayerNormLinear = GroupedLinear = DotProductAttention = RMSNorm = fp8_autocast = object",
    f"{TE}/pytorch/fp8.py": "FP8GlobalStateManager = fp8_autocast = object",
    f"{TE}/pytorch/optimizers.py": "FusedAdam = FusedSGD = multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = object",
}


def answer(folder: Path, code: str) -> str:
    """Return what the code prints in a process that finds the folder's packages first, and no GPU."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def probed(folder: Path, name: str = TE) -> str:
    return answer(folder, f"from opd_megatron.packages import probe; found = probe({name!r}); print(found.works, found, sep='|')")


def test_a_package_that_is_not_there_is_not_installed(tmp_path: Path) -> None:
    assert probed(tmp_path) == "False|transformer-engine: not installed"


def test_a_whole_package_works(tmp_path: Path) -> None:
    write_package(tmp_path, WHOLE, "transformer-engine", "2.9.0+70f53666")
    assert probed(tmp_path) == "True|transformer-engine 2.9.0+70f53666"


BROKEN = {
    "raise RuntimeError('no libcudnn')": "RuntimeError: no libcudnn",
    "raise OSError('libtransformer_engine.so: undefined symbol\\nmore')": "OSError: libtransformer_engine.so: undefined symbol",
    "raise SystemExit(3)": "SystemExit: 3",
    "raise AttributeError": "AttributeError: no reason given",
    "import no_such_module": "ModuleNotFoundError: No module named 'no_such_module'",
    "import torch; torch.no_such_name": "AttributeError: module 'torch' has no attribute 'no_such_name'",
}


@pytest.mark.parametrize(("code", "problem"), BROKEN.items())
def test_whatever_an_import_raises_is_the_problem_and_later_imports_fail_as_if_it_were_absent(tmp_path: Path, code: str, problem: str) -> None:
    write_package(tmp_path, {**WHOLE, f"{TE}/pytorch/__init__.py": code}, "transformer-engine")
    later = "\ntry:\n    import transformer_engine.common\nexcept ImportError:\n    print('hidden')"
    found, hidden = answer(tmp_path, f"from opd_megatron.packages import probe; print(probe({TE!r}))" + later).splitlines()
    assert found == f"transformer-engine 2.9.0: importing {TE}.pytorch raises {problem}"
    assert hidden == "hidden"


def test_a_keyboard_interrupt_is_not_a_problem_of_the_package(tmp_path: Path) -> None:
    write_package(tmp_path, {**WHOLE, f"{TE}/__init__.py": "raise KeyboardInterrupt"}, "transformer-engine")
    code = f"from opd_megatron.packages import probe\ntry:\n    probe({TE!r})\nexcept KeyboardInterrupt:\n    print('interrupted')"
    assert answer(tmp_path, code) == "interrupted"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write_package(tmp_path, {**WHOLE, f"{TE}/pytorch/__init__.py": "Linear = RMSNorm = DotProductAttention = fp8_autocast = object"}, "transformer-engine")
    assert probed(tmp_path) == f"False|transformer-engine 2.9.0: {TE}.pytorch has no LayerNormLinear, GroupedLinear"


def test_the_core_without_its_pytorch_half_does_not_work(tmp_path: Path) -> None:
    """PyPI's transformer-engine alone is this."""
    write_package(tmp_path, {name: text for name, text in WHOLE.items() if "pytorch" not in name}, "transformer-engine")
    assert probed(tmp_path) == f"False|transformer-engine 2.9.0: importing {TE}.pytorch raises ModuleNotFoundError: No module named '{TE}.pytorch'"


@pytest.mark.parametrize("version", ["2.2.1", "1.13", "0.dev0"])
def test_an_old_one_is_not_imported(tmp_path: Path, version: str) -> None:
    write_package(tmp_path, {**WHOLE, f"{TE}/__init__.py": "raise SystemError('imported')"}, "transformer-engine", version)
    assert probed(tmp_path) == f"False|transformer-engine {version}: is older than 2.3"


def test_code_without_metadata_has_no_version(tmp_path: Path) -> None:
    write_package(tmp_path, WHOLE)
    assert probed(tmp_path) == "False|transformer-engine: is there, but has no version; reinstall it"


def test_metadata_without_code_does_not_work(tmp_path: Path) -> None:
    write_package(tmp_path, {}, "transformer-engine")
    assert probed(tmp_path) == f"False|transformer-engine 2.9.0: importing {TE} raises ModuleNotFoundError: No module named '{TE}'"


def test_the_other_apex_of_pypi_does_not_work(tmp_path: Path) -> None:
    write_package(tmp_path, {"apex/__init__.py": "", "apex/models.py": ""}, "apex", "0.9.10.dev0")
    assert probed(tmp_path, "apex") == "False|apex 0.9.10.dev0: importing apex.optimizers raises ModuleNotFoundError: No module named 'apex.optimizers'"


def test_apex_without_its_kernel_for_gradients(tmp_path: Path) -> None:
    files = {"apex/optimizers.py": "FusedAdam = object", "apex/normalization/fused_layer_norm.py": "FusedRMSNormAffineFunction = object"}
    write_package(tmp_path, {"apex/__init__.py": "", "apex/normalization/__init__.py": "", **files}, "apex", "0.1")
    assert probed(tmp_path, "apex") == "True|apex 0.1"
    missing = "fused_weight_gradient_mlp_cuda"
    assert probed(tmp_path, missing) == f"False|apex 0.1: importing {missing} raises ModuleNotFoundError: No module named '{missing}'"


CHOICE = f"""
from opd_megatron.packages import probe
found = probe({TE!r})
import opd_megatron
opd_megatron.import_megatron()
from megatron.core.models.gpt import gpt_layer_specs
from opd_megatron.config import TrainingConfig
from opd_megatron.models.layer_options import choose_layers
print(gpt_layer_specs.HAVE_TE, choose_layers(TrainingConfig(layers="auto"), has_device=True).kind)
try:
    choose_layers(TrainingConfig(layers="te"), has_device=True)
except ValueError as error:
    print(error)
"""


def test_megatron_core_does_without_a_broken_one_and_layers_are_local(tmp_path: Path) -> None:
    """Megatron-Core alone survives an ImportError and nothing else."""
    write_package(tmp_path, {**WHOLE, f"{TE}/__init__.py": "raise RuntimeError('no libcudnn')"}, "transformer-engine")
    chosen, refusal = answer(tmp_path, CHOICE).splitlines()
    assert chosen == "False local"
    assert refusal.startswith(f"training.layers=te: transformer-engine 2.9.0: importing {TE} raises RuntimeError: no libcudnn; run in a container that has a")


def test_without_a_device_none_is_used_whatever_is_installed(tmp_path: Path) -> None:
    """A fused Adam would take a CPU's parameters and fail."""
    write_package(tmp_path, {**WHOLE, f"{TE}/__init__.py": "raise RuntimeError('imported')"}, "transformer-engine")
    code = "import opd_megatron, torch; opd_megatron.import_megatron(); from megatron.core import optimizer; print(torch.cuda.is_available(), optimizer.Adam)"
    assert answer(tmp_path, code) == "False <class 'torch.optim.adamw.AdamW'>"
