"""Where each rank stands: our arithmetic against Megatron-Core's own groups; errors that all ranks share.

Not covered: more than 4 ranks, Slurm's variables (tests/unit), NCCL.
"""

from __future__ import annotations

import pytest
import torch.distributed as dist

from opd_megatron.config import ParallelLayout
from opd_megatron.parallel.groups import student_groups, teacher_groups
from opd_megatron.parallel.world import agreed_by_rank_0, shared_errors
from tests.pool import RankPool

LAYOUTS = [ParallelLayout(), ParallelLayout(tensor=2), ParallelLayout(pipeline=2), ParallelLayout(tensor=2, pipeline=2), ParallelLayout(pipeline=4)]


def _check_student_grid(layout: ParallelLayout) -> None:
    from megatron.core import parallel_state

    groups = student_groups(layout, seed=1)
    assert groups.tensor_rank == parallel_state.get_tensor_model_parallel_rank()
    assert groups.data_rank == parallel_state.get_data_parallel_rank()
    assert groups.stage == parallel_state.get_pipeline_model_parallel_rank()
    assert groups.is_first_stage == parallel_state.is_pipeline_first_stage()
    assert groups.is_last_stage == parallel_state.is_pipeline_last_stage()
    assert groups.rank_of(tensor=groups.tensor_rank, data=groups.data_rank, stage=groups.stage) == dist.get_rank()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.describe())
def test_the_students_grid_is_megatrons(pool: RankPool, layout: ParallelLayout) -> None:
    pool.run(_check_student_grid, layout)


def _check_teacher_groups(layout: ParallelLayout) -> None:
    student_groups(ParallelLayout(tensor=2, pipeline=2), seed=1)
    groups = teacher_groups(layout)
    members = {name: dist.get_process_group_ranks(getattr(groups.collection, name)) for name in ("tp", "pp", "dp", "mp")}
    assert members["tp"] == [groups.rank_of(tensor=tensor, data=groups.data_rank, stage=groups.stage) for tensor in range(layout.tensor)]
    assert members["pp"] == [groups.rank_of(tensor=groups.tensor_rank, data=groups.data_rank, stage=stage) for stage in range(layout.pipeline)]
    assert members["dp"] == [groups.rank_of(tensor=groups.tensor_rank, data=data, stage=groups.stage) for data in range(groups.data_size)]
    assert sorted(members["mp"]) == sorted(
        groups.rank_of(tensor=tensor, data=groups.data_rank, stage=stage) for tensor in range(layout.tensor) for stage in range(layout.pipeline)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.describe())
def test_the_teachers_groups_are_those_of_its_grid_beside_a_student(pool: RankPool, layout: ParallelLayout) -> None:
    pool.run(_check_teacher_groups, layout)


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
