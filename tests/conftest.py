"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.pool import RankPool

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Processes for distributed tests; see `RankPool.run`."""
    ranks = RankPool()
    yield ranks
    ranks.close()
