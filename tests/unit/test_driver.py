"""What is said of NVIDIA's driver, torch's build and a GPU, from files and programs as they are found on nodes.

Not covered: a real driver, and what torch itself says where CUDA does not start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_megatron import driver
from opd_megatron.driver import Machine, TorchBuild
from tests.programs import ROOT

# As the two kernel modules of NVIDIA's write /proc/driver/nvidia/version.
PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version:  gcc version 11.4.0 (Ubuntu 11.4.0)\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)  Sun Jul 27 07:12:06 UTC 2025\n"
CPU_BUILD = TorchBuild(version="2.13.0+cpu", cuda=None)
CUDA_12, CUDA_13 = TorchBuild(version="2.8.0+cu128", cuda="12.8"), TorchBuild(version="2.13.0+cu130", cuda="13.0")


def node(folder: Path, version: str | None = None, devices: tuple[str, ...] = ()) -> Path:
    """Return the root of a file system with these of NVIDIA's files."""
    (folder / "dev").mkdir(parents=True)
    for name in devices:
        (folder / "dev" / name).touch()
    if version is not None:
        (folder / "proc" / "driver" / "nvidia").mkdir(parents=True)
        (folder / "proc" / "driver" / "nvidia" / "version").write_text(version)
    return folder


def program(folder: Path, prints: str, code: int = 0) -> str:
    """Return a program in the place of nvidia-smi."""
    file = folder / "smi"
    file.write_text(f"#!/bin/sh\nprintf '%s' '{prints}'\nexit {code}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(("text", "version"), [(PROPRIETARY, "535.129.03"), (OPEN, "580.65.06")], ids=["proprietary", "open"])
def test_the_driver_and_its_gpus_are_read_from_its_files(tmp_path: Path, text: str, version: str) -> None:
    # What is not a GPU: the control device, its memory manager, and a folder of capabilities.
    root = node(tmp_path / "root", text, ("nvidia0", "nvidia1", "nvidia11", "nvidiactl", "nvidia-uvm", "nvidia-caps"))
    assert driver.find_machine(root, smi="no such program") == Machine(driver=version, num_gpus=3)


def test_where_files_do_not_show_it_nvidia_smi_is_asked(tmp_path: Path) -> None:
    smi = program(tmp_path, "550.54.15\n550.54.15\n")
    assert driver.find_machine(node(tmp_path / "root"), smi) == Machine(driver="550.54.15", num_gpus=2)


@pytest.mark.parametrize(("prints", "code"), [("NVIDIA-SMI has failed because it could not communicate with the driver.\n", 9), ("No devices were found\n", 0)])
def test_an_nvidia_smi_that_fails_lists_nothing(tmp_path: Path, prints: str, code: int) -> None:
    assert driver.find_machine(node(tmp_path / "root"), program(tmp_path, prints, code)) == Machine(driver=None, num_gpus=0)


def test_a_container_without_gpus_sees_the_driver_of_its_node_and_has_none(tmp_path: Path) -> None:
    assert driver.find_machine(node(tmp_path / "root", OPEN), smi="no such program") == Machine(driver="580.65.06", num_gpus=0)


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("__version__ = '2.13.0+cpu'\nfrom typing import Optional\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", CPU_BUILD),
        ("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", CUDA_13),
        # Before the annotations.
        ("__version__ = '2.8.0+cu128'\ncuda = '12.8'\nhip = None\n", CUDA_12),
        ("__version__ = '2.8.0+rocm6.4'\ncuda = None\nhip = '6.4.43482'\n", TorchBuild(version="2.8.0+rocm6.4", cuda=None, is_rocm=True)),
    ],
    ids=["cpu", "cuda 13", "cuda 12", "rocm"],
)
def test_the_build_of_torch_is_read_from_its_version_file(text: str, build: TorchBuild) -> None:
    assert driver.read_build(text) == build


def test_the_installed_torch_is_found_without_importing_it() -> None:
    code = "import sys; from opd_megatron import driver; found = driver.find_torch(); assert 'torch' not in sys.modules; print(found.version)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    import torch

    assert found == torch.__version__


def test_a_cpu_build_beside_gpus_is_refused_and_nothing_else() -> None:
    with pytest.raises(ValueError, match=r"this node has 8 GPUs, and torch 2\.13\.0\+cpu, built for the CPU alone.*OPD_DEVICE=cpu"):
        driver.check_build(Machine(driver="580.65.06", num_gpus=8), CPU_BUILD)
    driver.check_build(Machine(driver="580.65.06", num_gpus=8), CUDA_12)
    driver.check_build(Machine(driver="580.65.06", num_gpus=0), CPU_BUILD)
    driver.check_build(Machine(driver=None, num_gpus=1), TorchBuild(version="2.8.0+rocm6.4", cuda=None, is_rocm=True))
    driver.check_build(Machine(driver="580.65.06", num_gpus=8), None)


@pytest.mark.parametrize(
    ("version", "build", "says"),
    [
        ("525.60.12", CUDA_12, "driver 525.60.12 is older than 525.60.13, which CUDA 12.8 needs (torch 2.8.0+cu128, built for CUDA 12.8)"),
        ("525.60.13", CUDA_12, "out of memory (torch 2.8.0+cu128, built for CUDA 12.8, driver 525.60.13)"),
        # Numbers, not letters: 99 is less than 525.
        ("99.1", CUDA_12, "driver 99.1 is older than 525.60.13"),
        ("550.54.15", CUDA_13, "driver 550.54.15 is older than 580.65.06, which CUDA 13.0 needs"),
        ("580.65.06", CUDA_13, "out of memory"),
        (None, CUDA_13, "no NVIDIA driver is loaded"),
        ("525.60.13", TorchBuild(version="3.0", cuda="14.0"), "out of memory"),
    ],
)
def test_the_reason_is_told_in_numbers(version: str | None, build: TorchBuild, says: str) -> None:
    told = driver.why_unusable(Machine(driver=version, num_gpus=1), build, "out of memory")
    assert told.startswith("this node has 1 GPU, and torch cannot use them: ")
    assert says in told
    assert "OPD_DEVICE=cpu" in told


@pytest.mark.parametrize(("recipe", "needs"), [("qwen3_1p7b_from_8b_8gpu_h100", True), ("qwen3_4b_pw_opsd_4gpu_h100", True), ("quickstart", False)])
def test_recipes_for_gpus_are_known_by_their_names(recipe: str, needs: bool) -> None:
    without = Machine(driver=None, num_gpus=0)
    assert driver.is_for_gpus(recipe) == needs
    driver.check_present(recipe, Machine(driver="580.65.06", num_gpus=8))
    if needs:
        with pytest.raises(ValueError, match="is for GPUs, and none is in sight here: no NVIDIA driver"):
            driver.check_present(recipe, without)
        with pytest.raises(ValueError, match=r"driver 580.65.06 is loaded, but no GPU is given to this process"):
            driver.check_present(recipe, Machine(driver="580.65.06", num_gpus=0))
    else:
        driver.check_present(recipe, without)


@pytest.mark.parametrize(
    ("environment", "cpu"),
    [({}, False), ({"OPD_DEVICE": "auto"}, False), ({"OPD_DEVICE": "cpu"}, True), ({"CUDA_VISIBLE_DEVICES": ""}, True), ({"CUDA_VISIBLE_DEVICES": "0"}, False)],
)
def test_the_cpu_is_asked_for(environment: dict[str, str], cpu: bool) -> None:
    assert driver.wants_cpu(environment) == cpu


def test_asked_for_the_cpu_cuda_finds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, visible in (("auto", "0,1"), ("cpu", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        monkeypatch.setenv("OPD_DEVICE", device)
        driver.hide_gpus_if_asked()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_a_gpu_without_bf16_runs_fp32_only() -> None:
    with pytest.raises(ValueError, match=r"Tesla T4 \(compute capability 7\.5\) has no bf16.*training\.precision=fp32"):
        driver.check_precision("Tesla T4", (7, 5), "bf16")
    driver.check_precision("Tesla T4", (7, 5), "fp32")
    driver.check_precision("NVIDIA H100 80GB HBM3", (9, 0), "bf16")


def test_a_gpu_that_torch_cannot_use_ends_a_run_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own answer is that of this machine; the GPUs are made up."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OPD_DEVICE", raising=False)
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a usable GPU")
    monkeypatch.setattr(driver, "find_machine", lambda: Machine(driver="470.57.02", num_gpus=4))
    monkeypatch.setattr(driver, "find_torch", lambda: CUDA_12)
    with pytest.raises(ValueError, match=r"this node has 4 GPUs, and torch cannot use them: driver 470\.57\.02 is older than 525\.60\.13"):
        driver.check_usable("bf16")
    monkeypatch.setenv("OPD_DEVICE", "cpu")
    driver.check_usable("bf16")


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name not in ("OPD_DEVICE", "CUDA_VISIBLE_DEVICES")}
    return subprocess.run([sys.executable, "-m", "recipes.run", *words], cwd=ROOT, env={**given, **variables}, capture_output=True, text=True, timeout=120)


RECIPE = "qwen3_1p7b_from_8b_8gpu_h100"
TINY = (
    *("student.hf=recipes/assets/tiny_student", "teacher.hf=recipes/assets/tiny_teacher", "student.layout.tensor=1", "student.layout.sequence=false"),
    *("teacher.layout.tensor=1", "data.prompts=reasoning_gym:spell_backward", "evaluation.prompts=0", "rollout.max_response_tokens=12"),
    *("data.max_prompt_tokens=64", "data.chat_template_kwargs={}"),
)


def test_the_runner_refuses_a_recipe_for_gpus_where_there_is_none(tmp_path: Path) -> None:
    if driver.find_machine().num_gpus:
        pytest.skip("needs a machine without a GPU")
    refused = run(RECIPE, "--nproc-per-node", "1", "--run-dir", str(tmp_path / "run"), *TINY)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.startswith(f"error: recipe {RECIPE} is for GPUs, and none is in sight here"), refused.stderr
    assert not (tmp_path / "run").exists()
    # To look at it needs none.
    assert run(RECIPE, "--check", *TINY).returncode == 0


def test_the_runner_refuses_a_device_that_there_is_not() -> None:
    refused = run("quickstart", "--check", OPD_DEVICE="tpu")
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: environment variable OPD_DEVICE='tpu' is neither auto, for the GPUs where there are any, nor cpu\n",
    )
