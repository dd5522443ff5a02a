"""Fixtures of all tests."""

from __future__ import annotations

import os
import re
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


# Variants of tests of which `make test` runs others, to stay under fifteen minutes: `make test-slow` runs these.
_SLOW_VARIANTS = re.compile(
    r"test_conversion.*(logits_equal_transformers\[(?!qwen3-).*teacher|round_trip_in_one_process\[(?!qwen3-).*divisible)"
    r"|test_experts.*(elsewhere\[(?!EP2-)|same_first_rollouts|alike\[(CP2, ETP4|TP2\+SP, EP2xETP2))"
    r"|test_faults.*leave_nothing\[(other data recorded|every prompt too long|empty data)"
    r"|test_plans.*(exits_2.*\[words([0-57]|8|10|13|14)-|can_be_planned\[(.*_from_rl_|.*_from_235b_|.*h200)|as_its_weights\[Qwen3-30B-A3B)"
    r"|test_quickstart.*stays_finished"
    r"|test_tools.*(experts_are\[(EP2xPP2|TP2)|says_the_same_wherever)"
    r"|test_resume.*(changes_nothing\[fp32|uninterrupted_one\[(TP2|DP2)\])"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _SLOW_VARIANTS.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
