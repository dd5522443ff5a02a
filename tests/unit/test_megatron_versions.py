"""The adapter of Megatron-Core's versions: every difference it knows is used, and says since which version it is and when it can go.

Not covered: whether an answer is right. That is tests/distributed/test_megatron_versions.py, and the whole suite with another version (`make test-newest`).
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path

import pytest

import opd_megatron

opd_megatron.import_megatron()

from opd_megatron.parallel import megatron  # noqa: E402

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "opd_megatron" / "parallel" / "megatron.py"
FUNCTIONS = {node.name: node for node in ast.parse(ADAPTER.read_text()).body if isinstance(node, ast.FunctionDef)}
PUBLIC = [name for name in FUNCTIONS if not name.startswith("_")]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_difference_is_used_outside_of_the_adapter(name: str) -> None:
    """One that nobody asks for any more is to be deleted."""
    others = [file for folder in ("opd_megatron", "tests/distributed") for file in (ROOT / folder).rglob("*.py") if file != ADAPTER]
    assert any(re.search(rf"\b{name}\(", file.read_text()) for file in others)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "quiet_advice"])
def test_a_difference_names_its_version(name: str) -> None:
    assert re.search(r"\b0\.1[6-9]\b", ast.get_docstring(FUNCTIONS[name]) or "")


def test_no_other_file_asks_which_version_runs() -> None:
    """Neither by number, nor by what a class or function of Megatron-Core happens to have."""
    asked = re.compile(r"megatron\.core\.__version__|is_mcore_min_version|get_mcore_version|hasattr\((moe_utils|serialization|inference_utils)\b")
    files = [file for folder in ("opd_megatron", "recipes", "tools") for file in (ROOT / folder).rglob("*.py") if file != ADAPTER]
    assert not [str(file.relative_to(ROOT)) for file in files if asked.search(file.read_text())]
    assert asked.search(ADAPTER.read_text())


def test_advice_alone_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    megatron.quiet_advice()
    megatron.quiet_advice()
    for name, beginning in megatron._ADVICE.items():
        logger = logging.getLogger(name)
        with caplog.at_level(logging.WARNING, logger=name):
            logger.warning("%s, and so on", beginning)
            logger.warning("the disk is full")
    assert [record.getMessage() for record in caplog.records] == ["the disk is full"] * len(megatron._ADVICE)
