"""Where a checkpoint comes from, as a record beside its weights: what wrote it, from what or in which layout, and with which versions.

For readers only: no weight is loaded differently for it, and a checkpoint without one is as good.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import opd_megatron

ORIGIN_FILE = "origin.json"


def write_origin(folder: Path, made_by: str, **facts: Any) -> None:
    """Write the record of a checkpoint that `made_by` makes into its folder, with the versions in use."""
    record = {"made_by": made_by, **facts, "versions": versions()}
    (folder / ORIGIN_FILE).write_text(json.dumps(record, indent=2) + "\n")


def read_origin(folder: Path) -> dict[str, Any] | None:
    """Return the record of a checkpoint; None where there is none: an older one, or another program's. ValueError if it is damaged."""
    file = folder / ORIGIN_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{file} is damaged: it is not a JSON object")
    return record


def versions() -> dict[str, str]:
    """Return the versions of what a checkpoint's format depends on."""
    found = {"opd-megatron": opd_megatron.__version__}
    for package in ("megatron-core", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
