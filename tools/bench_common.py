"""What the benches share: versions and hardware, for the record. They import it as their neighbour: Python puts a script's folder on its path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Return versions and hardware, without importing any of the packages."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    versions = {name: version(name) for name in packages}
    threads = os.environ.get("OMP_NUM_THREADS")
    return {"python": platform.python_version(), "cpu": cpu, "cores": os.cpu_count(), "threads": threads, "versions": versions}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
