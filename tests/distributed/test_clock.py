"""Where a step's time goes when one rank is slow. Not covered: GPUs, whose work the clock waits for at the ends of a phase."""

from __future__ import annotations

import time

import pytest
import torch

from opd_megatron.training.clock import StepClock, StepTimes, StragglerWatch
from tests.pool import RankPool


def _steps(slow_rank: int, steps: int) -> tuple[list[StepTimes], list[str], float]:
    """Return what the clock and the watch saw of steps in which one rank writes for 0.3 seconds longer than the others."""
    rank = torch.distributed.get_rank()
    clock, told = StepClock(("rollout", "train"), torch.device("cpu")), []
    stragglers = StragglerWatch(("rollout",), window=3)
    found = []
    for _ in range(steps):
        clock.begin()
        with clock.phase("rollout"):
            time.sleep(0.1 + 0.3 * (rank == slow_rank))
        with clock.phase("train"), clock.part("forward_backward"):
            time.sleep(0.1)
        found.append(clock.finish())
        stragglers.notice(found[-1], told.append)
        with clock.between("checkpoint"):
            time.sleep(0.05)
    return found, told, clock.finish().seconds["checkpoint"]


def test_waiting_for_a_slow_rank_is_not_work_and_the_rank_is_named(pool: RankPool) -> None:
    results = pool.run(_steps, 2, 4, world_size=3)
    for steps, told, left in results:
        metrics = steps[-1].metrics()
        # Means over three ranks, of which two wait 0.3 seconds; the machine may be busy, so bounds are wide above.
        assert 0.2 <= metrics["rollout_seconds"] < 0.4
        assert 0.2 <= metrics["idle_seconds"] < 0.5
        assert metrics["rollout_slowest_rank"] == 2
        assert 0.2 < metrics["rollout_spread_seconds"] < 0.6
        assert metrics["forward_backward_seconds"] <= metrics["train_seconds"]
        inside = metrics["rollout_seconds"] + metrics["train_seconds"] + metrics["idle_seconds"]
        assert metrics["step_seconds"] == pytest.approx(inside, abs=0.05)
        assert metrics["checkpoint_seconds"] >= 0.05, "what came before the step"
        assert steps[0].metrics()["checkpoint_seconds"] == 0
        assert left >= 0.05
        assert len(told) == 1, "once"
        assert told[0].startswith("rank 2 on ")
        assert "slowest in the phase 'rollout' in 3 of the last 3 steps" in told[0]
    metrics = [steps[-1].metrics() for steps, _, _ in results]
    assert {key for one in metrics for key in one if metrics[0][key] != one[key]} <= {"step_seconds"}, "all ranks know the same"


def test_ranks_that_take_turns_are_no_stragglers(pool: RankPool) -> None:
    for _, told, _ in pool.run(_taking_turns, world_size=2):
        assert told == []


def _taking_turns() -> tuple[None, list[str], None]:
    clock, told, rank = StepClock(("rollout",), torch.device("cpu")), [], torch.distributed.get_rank()
    stragglers = StragglerWatch(("rollout",), window=4)
    for step in range(8):
        clock.begin()
        with clock.phase("rollout"):
            time.sleep(0.2 * (step % 2 == rank))
        stragglers.notice(clock.finish(), told.append)
    return None, told, None
