"""Whether both models, and the copy that writes, fit their ranks; where one does not, the nearest layouts that do. No torch, no process group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from opd_megatron.config import ParallelLayout, RunConfig, name_changes, nearest_layouts
from opd_megatron.models.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class _Role:
    """One model's layout, its ranks, and what raises ValueError for layouts that it cannot have there."""

    name: str
    layout: ParallelLayout
    num_ranks: int
    check: Callable[[ParallelLayout], None]


def check_layouts(config: RunConfig, world_size: int, student: Architecture | None, teacher: Architecture | None) -> None:
    """Raise ValueError, with up to three layouts that would do, unless both models fit `world_size` ranks.

    An architecture that is None is not looked at.
    """
    own = config.num_teacher_ranks
    if own >= world_size:
        fits = [f"teacher.num_ranks={number}" for number in itertools.islice(_numbers_that_fit(config, world_size, student, teacher), 3)]
        raise ValueError(f"teacher.num_ranks={own} leaves none of world_size={world_size} ranks to the student{_suggestion(fits, 'use more ranks in all')}")
    for role in _roles(config, world_size, student, teacher):
        try:
            role.check(role.layout)
        except ValueError as error:
            near = nearest_layouts(role.layout, role.num_ranks, role.check)
            fits = [name_changes(role.layout, other, f"{role.name}.layout.") for other in near]
            raise ValueError(f"{error}{_suggestion(fits)}") from None


def _roles(config: RunConfig, world_size: int, student: Architecture | None, teacher: Architecture | None) -> Iterator[_Role]:
    own = config.num_teacher_ranks
    num_ranks = world_size - own
    yield _Role(name="student", layout=config.student.layout, num_ranks=num_ranks, check=partial(_check_student, config, num_ranks, student))
    if config.rollout.layout is not None:
        yield _Role(name="rollout", layout=config.rollout.layout, num_ranks=num_ranks, check=partial(_check_rollout, config, num_ranks, student))
    if config.teacher is not None:
        num_ranks = own or world_size
        yield _Role(name="teacher", layout=config.teacher.layout, num_ranks=num_ranks, check=partial(_check_teacher, config, num_ranks, student, teacher))


def _check_student(config: RunConfig, num_ranks: int, student: Architecture | None, layout: ParallelLayout) -> None:
    # What the configuration itself says about it comes first.
    replace(config, student=replace(config.student, layout=layout)).student.layout.check_ranks("student", num_ranks)
    if student is not None:
        student.check_layout("student", layout)
        student.check_training("student", layout)
        student.check_fp8("student", layout, config.training.fp8)


def _check_rollout(config: RunConfig, num_ranks: int, student: Architecture | None, layout: ParallelLayout) -> None:
    replace(config.rollout, layout=layout)
    layout.check_ranks("rollout", num_ranks)
    if student is not None:
        try:
            student.check_layout("rollout", layout)
        except ValueError as error:
            raise ValueError(str(error).replace("the rollout", "the student")) from None


def _check_teacher(config: RunConfig, num_ranks: int, student: Architecture | None, teacher: Architecture | None, layout: ParallelLayout) -> None:
    assert config.teacher is not None
    replace(config.teacher, layout=layout).layout.check_ranks("teacher", num_ranks)
    if teacher is not None:
        teacher.check_layout("teacher", layout)
        if student is not None and config.teacher.self_test:
            _check_self_test(student, layout)


def _check_self_test(student: Architecture, layout: ParallelLayout) -> None:
    """Raise ValueError unless the student's own weights can be laid out as the teacher's, to be scored in their place."""
    try:
        # A student without experts leaves those axes of the layout unused.
        student.check_layout("teacher", layout if student.experts else replace(layout, expert=1, expert_tensor=1))
    except ValueError as error:
        raise ValueError(
            f"teacher.self_test=true scores the student's weights in the teacher's layout, and there {str(error).replace('the teacher', 'the student')}; "
            "or set teacher.self_test=false"
        ) from None


def _numbers_that_fit(config: RunConfig, world_size: int, student: Architecture | None, teacher: Architecture | None) -> Iterator[int]:
    """Yield how many ranks of its own the teacher could have, the nearest number first."""
    assert config.teacher is not None
    wanted = config.num_teacher_ranks
    for number in sorted(range(1, world_size), key=lambda number: abs(math.log2(number / wanted))):
        other = replace(config, teacher=replace(config.teacher, num_ranks=number))
        try:
            for role in _roles(other, world_size, student, teacher):
                role.check(role.layout)
        except ValueError:
            continue
        yield number


def _suggestion(fits: list[str], otherwise: str = "") -> str:
    """Return the end of a message: what works, each a choice of KEY=VALUE words."""
    if not fits:
        return f"; {otherwise}" if otherwise else ""
    return f"; nearest that work: {', or '.join(fits)}"
