"""`python -m opd_megatron.launch` in the environment that has nemo-run and no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT

LAUNCH_PYTHON = ROOT / ".venv-launch" / "bin" / "python"

needs_nemo = pytest.mark.skipif(not LAUNCH_PYTHON.is_file(), reason="needs nemo-run: make .venv-launch/.installed")


def launch(*words: object, environment: dict[str, str] | None = None, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
    """Return what a launch printed and its exit code. Its steps run with this interpreter."""
    command = [str(LAUNCH_PYTHON), "-m", "opd_megatron.launch", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=launch_environment(environment, **variables), capture_output=True, text=True, timeout=timeout)


def launch_environment(environment: dict[str, str] | None = None, **variables: str) -> dict[str, str]:
    """Return the variables of a launch: those of this process, or `environment`, without what would choose folders or images for it."""
    given = {name: value for name, value in (environment or os.environ).items() if name != "NEMORUN_HOME" and not name.startswith("OPD_")}
    return {**given, "OPD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}


def files_under(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]
