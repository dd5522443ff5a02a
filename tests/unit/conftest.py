"""Fixtures of several files: a Hugging Face folder, to be read or to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Imported here, so that files without models do not wait for transformers.
    from tests.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("whole"), "qwen3", num_hidden_layers=2)


@pytest.fixture
def folder(whole_folder: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole_folder, tmp_path / "folder"))
