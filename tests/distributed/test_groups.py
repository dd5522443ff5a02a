"""Where each rank stands: our arithmetic against Megatron-Core's own groups; errors that all ranks share.

Not covered: more than 4 ranks, Slurm's variables (tests/unit), NCCL.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from opd_megatron.config import ParallelLayout
from opd_megatron.parallel.groups import student_groups, teacher_groups
from opd_megatron.parallel.layout import Cell
from opd_megatron.parallel.world import agreed_by_rank_0, shared_errors
from tests.pool import RankPool

LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2),
    ParallelLayout(pipeline=2),
    ParallelLayout(tensor=2, pipeline=2),
    ParallelLayout(pipeline=4),
    ParallelLayout(context=2),
    ParallelLayout(context=2, tensor=2),
    ParallelLayout(context=2, pipeline=2),
    ParallelLayout(expert=2),
    ParallelLayout(expert=2, tensor=2, context=2),
    ParallelLayout(expert=2, expert_tensor=2, tensor=2),
]
NAMES = ("tp", "cp", "dp", "pp", "dp_cp", "tp_cp", "tp_dp_cp", "mp", "ep", "expt_tp", "expt_dp", "tp_ep", "tp_ep_pp")


def _members(collection: ProcessGroupCollection) -> dict[str, list[int]]:
    return {name: dist.get_process_group_ranks(getattr(collection, name)) for name in NAMES}


def _both(layout: ParallelLayout) -> tuple[dict[str, list[int]], dict[str, list[int]], Cell, Cell]:
    student, teacher = student_groups(layout, seed=1), teacher_groups(layout)
    megatron = Cell(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        context=parallel_state.get_context_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        stage=parallel_state.get_pipeline_model_parallel_rank(),
    )
    assert student.is_first_stage == parallel_state.is_pipeline_first_stage()
    assert student.is_last_stage == parallel_state.is_pipeline_last_stage()
    assert student.grid.rank_of(**dataclasses.asdict(student.cell)) == dist.get_rank()
    assert dist.get_group_rank(student.collection.dp_cp, dist.get_rank()) == student.writer
    return _members(student.collection), _members(teacher.collection), student.cell, megatron


def _draw_without_a_student(layout: ParallelLayout) -> float:
    """Return a number drawn as Megatron-Core draws a weight on a GPU, on a rank whose only model is a teacher."""
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    teacher_groups(layout)
    with tracker.fork():
        return float(torch.rand(()))


def test_a_rank_of_the_teachers_own_can_draw_weights_as_a_gpu_does(pool: RankPool) -> None:
    """Before a teacher's weights are read they are drawn, on a GPU through this tracker, apart on every tensor rank."""
    drawn = pool.run(_draw_without_a_student, ParallelLayout(tensor=2))
    assert drawn[0] == drawn[2] != drawn[1] == drawn[3]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.describe())
def test_our_grid_and_its_groups_are_megatrons(pool: RankPool, layout: ParallelLayout) -> None:
    """The student's groups are Megatron-Core's own; the teacher's are made from our grid."""
    for student, teacher, ours, megatron in pool.run(_both, layout):
        assert ours == megatron
        assert teacher == student


def _picture() -> str:
    return student_groups(ParallelLayout(tensor=2, pipeline=2), seed=1).picture("student")


def test_the_picture_shows_stages_in_order(pool: RankPool) -> None:
    assert pool.run(_picture)[0] == "student: TP2xPP2 x DP1\n  replica 0: [0 1] -> [2 3]"


def _fail_on(rank: int) -> str:
    try:
        with shared_errors():
            if dist.get_rank() == rank:
                raise ValueError("shard 7 is cut")
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_on_one_rank_is_raised_on_all(pool: RankPool, rank: int) -> None:
    messages = pool.run(_fail_on, rank)
    assert all("shard 7 is cut" in message for message in messages)


def test_no_error_passes(pool: RankPool) -> None:
    assert pool.run(_fail_on, 99) == [""] * 4


def _rank_0_decides() -> int:
    return agreed_by_rank_0(dist.get_rank() + 40)


def test_what_rank_0_sees_counts(pool: RankPool) -> None:
    assert pool.run(_rank_0_decides) == [40] * 4
