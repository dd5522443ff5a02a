"""Layouts that do not fit are refused with the nearest that do, and those are tried: each, typed as the message says, is accepted.

Not covered: that the refusal comes before any process group, on every rank (tests/distributed/test_faults.py).
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_megatron.config import ParallelLayout, RunConfig, apply_overrides, name_changes, nearest_layouts
from opd_megatron.models.architecture import Architecture
from opd_megatron.parallel.context import context_rank, padded_length
from opd_megatron.training.layouts import check_layouts
from opd_megatron.training.preflight import check_run
from recipes.quickstart import quickstart
from tests.model_configs import architecture_of, refusal
from tests.tiny import write_tiny_model

AXES = ("tensor", "pipeline", "context", "expert", "expert_tensor")


def naive_nearest(layout: ParallelLayout, world_size: int, architecture: Architecture) -> tuple[int, list[float]]:
    """Return, of all layouts there are, the fewest sizes to change to one that fits, and the distances of those."""
    found: dict[int, list[float]] = {}
    for sizes in itertools.product(range(1, world_size + 1), repeat=len(AXES)):
        other = ParallelLayout(**dict(zip(AXES, sizes, strict=True)))
        try:
            other.data_size(world_size)
            architecture.check_layout("student", other)
        except ValueError:
            continue
        factors = [getattr(other, axis) / getattr(layout, axis) for axis in AXES]
        found.setdefault(sum(factor != 1 for factor in factors), []).append(sum(abs(math.log2(factor)) for factor in factors))
    return min(found), sorted(found[min(found)])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.tuples(*[st.integers(1, 7)] * len(AXES)), st.sampled_from([1, 2, 4, 6]))
def test_the_layouts_that_are_named_fit_and_no_other_is_nearer(family: str, sizes: tuple[int, ...], world_size: int) -> None:
    architecture = architecture_of(family, num_hidden_layers=6)
    layout = ParallelLayout(**dict(zip(AXES, sizes, strict=True)))

    def check(other: ParallelLayout) -> None:
        other.data_size(world_size)
        architecture.check_layout("student", other)

    named = nearest_layouts(layout, world_size, check)
    changes, distances = naive_nearest(layout, world_size, architecture)
    if changes == 0:
        # It fits itself, and nobody asks.
        return
    if changes > 3:
        assert not named, "of a layout of which nearly everything is wrong, none is near"
        return
    assert len(named) == min(3, len(distances))
    for other, distance in zip(named, distances):
        check(other)
        factors = [getattr(other, axis) / getattr(layout, axis) for axis in AXES]
        assert sum(factor != 1 for factor in factors) == changes
        assert sum(abs(math.log2(factor)) for factor in factors) == pytest.approx(distance)


def test_what_a_layout_needs_for_itself_changes_with_it() -> None:
    layout = ParallelLayout(tensor=4, sequence=True)
    (other,) = nearest_layouts(layout, 3, lambda candidate: candidate.data_size(3), count=1)
    assert other == ParallelLayout(tensor=3, sequence=True)

    def one_tensor_rank(candidate: ParallelLayout) -> None:
        if candidate.tensor > 1:
            raise ValueError

    (other,) = nearest_layouts(layout, 4, one_tensor_rank)
    assert other == ParallelLayout()
    assert name_changes(layout, other, "student.layout.") == "student.layout.tensor=1 student.layout.sequence=false"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "mixture", "qwen3_moe", num_key_value_heads=4)


# The quickstart on some ranks, changed -> what the message says; the student is TP2 x PP2, both models have 2 key-value heads.
REFUSED = {
    "the product does not divide the world": (4, "student.layout.pipeline=3", "world_size=4 is not a multiple of tensor*pipeline*context=6"),
    "both sizes": (4, "student.layout.tensor=3 student.layout.pipeline=3", "world_size=4 is not a multiple of tensor*pipeline*context=9"),
    "virtual stages": (4, "student.layout.virtual=3", "virtual=3 does not divide the student's 1 layers of a stage"),
    "key-value heads": (4, "student.layout.tensor=4 student.layout.pipeline=1", "tensor=4 does not divide the student's 2 key-value heads"),
    "layers": (8, "student.layout.tensor=1 student.layout.pipeline=8", "pipeline=8 does not divide the student's 2 layers"),
    "the teacher's heads": (8, "teacher.layout.tensor=8", "tensor=8 does not divide the teacher's"),
    "more ranks than there are": (4, "teacher.layout.tensor=2 teacher.layout.context=4", "use at least 8 ranks"),
    "more than its own ranks": (
        6,
        "teacher.placement=dedicated teacher.num_ranks=2 teacher.layout.context=4",
        "teacher.layout: world_size=2 is not a multiple",
    ),
    "no rank for the student": (8, "teacher.placement=dedicated teacher.num_ranks=8", "leaves none of world_size=8 ranks to the student"),
    "context": (4, "teacher.layout.context=3", "teacher.layout: world_size=4 is not a multiple of tensor*pipeline*context=3"),
    "experts of a dense model": (4, "student.layout.expert=2", "the student is a dense qwen3 model"),
    "parts of experts of a dense model": (4, "teacher.layout.expert_tensor=2", "the teacher is a dense qwen3 model"),
    "experts": (
        16,
        "student.hf={mixture} student.layout.sequence=true student.layout.expert=16 student.layout.pipeline=1",
        "student's 8 experts",
    ),
    "columns of an expert": (
        32,
        "student.hf={mixture} student.layout.sequence=true student.layout.expert_tensor=32 student.layout.pipeline=1",
        "student's 48 columns of an expert",
    ),
    "ranks of a stage": (4, "student.hf={mixture} student.layout.sequence=true student.layout.expert=4", "does not divide the 2 ranks of a pipeline stage"),
    "the student in the teacher's place": (4, "teacher.hf={mixture} student.layout.pipeline=1 teacher.layout.tensor=4", "the student's 2 key-value heads"),
}


def _config(words: str, mixture: Path) -> RunConfig:
    return apply_overrides(quickstart(), words.format(mixture=mixture).split())


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_does_not_fit_is_refused_with_layouts_that_do(mixture: Path, name: str) -> None:
    world_size, words, reason = REFUSED[name]
    config = _config(words, mixture)
    message = refusal(check_run, config, world_size)
    assert reason in message
    named = re.search("; nearest that work: (.*)$", message)
    assert named, message
    for choice in named[1].split(", or "):
        changed = apply_overrides(config, choice.split())
        assert changed != config
        check_run(changed, world_size)


def test_without_a_number_of_ranks_that_would_do_none_is_named() -> None:
    config = apply_overrides(quickstart(), ["teacher.placement=dedicated", "teacher.num_ranks=4"])
    assert refusal(check_run, config, 4).endswith("ranks to the student; use more ranks in all")


def test_fewer_virtual_stages_are_named() -> None:
    config = apply_overrides(quickstart(), ["student.layout.virtual=6"])
    message = refusal(check_layouts, config, 4, architecture_of("qwen3", num_hidden_layers=8), None)
    assert "student.layout.virtual=6 does not divide the student's 4 layers of a stage (layout.pipeline=2); use one of [1, 2, 4]" in message
    near = "student.layout.virtual=4, or student.layout.pipeline=1 student.layout.virtual=1, or student.layout.virtual=2"
    assert message.endswith(f"nearest that work: {near}")


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(1, 5000), st.integers(1, 9), st.integers(1, 9))
def test_no_context_size_fails_to_divide_a_padded_length(longest: int, context: int, tensor: int) -> None:
    """Lengths are padded to what the layout splits, so that is never refused: context ranks hold equally much, and under sequence parallelism tensor ranks."""
    layout = ParallelLayout(context=context, tensor=tensor, sequence=tensor > 1)
    length = padded_length(longest, layout)
    assert longest <= length < longest + layout.row_multiple
    counts = torch.bincount(context_rank(torch.arange(length), length, context), minlength=context).tolist()
    assert len(set(counts)) == 1
    assert counts[0] % tensor == 0
