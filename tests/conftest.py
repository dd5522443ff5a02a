"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool import RankPool

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads it once, when anything first imports it. Where there is a GPU, kernels are compiled.
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Processes for distributed tests; see `RankPool.run`."""
    ranks = RankPool()
    yield ranks
    ranks.close()
