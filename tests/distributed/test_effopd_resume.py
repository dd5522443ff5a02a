"""Runs with EffOPD that stop, resume and die: between searches and within one, in their own layout and in another. Not covered: GPUs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.config import RunConfig
from opd_megatron.training.effopd import EffOPD
from opd_megatron.training.search_scores import Scored
from tests.pool import RankPool
from tests.runs import run_job, run_until_step, weights_of
from tests.searches import REAL, config_of, without_seconds


@pytest.mark.parametrize(("layout", "stops"), [("PP2", (3,)), *(pytest.param("TP2xPP2", stops, marks=pytest.mark.slow) for stops in ((1,), (3, 4), (6,)))])
def test_a_run_that_stops_between_searches_ends_with_the_same_bits(models: Path, pool: RankPool, tmp_path: Path, layout: str, stops: tuple[int, ...]) -> None:
    """At a search's step, between two, after one; the score is real, and accepts and refuses."""
    config, world_size = config_of(models, layout, *REAL)
    pool.run(run_job, config, tmp_path / "whole", world_size=world_size)
    for stop in stops:
        pool.run(run_until_step, config, tmp_path / "parts", stop, world_size=world_size)
    pool.run(run_job, config, tmp_path / "parts", world_size=world_size)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    searches = [without_seconds(run) for run in (tmp_path / "whole", tmp_path / "parts")]
    assert searches[0] == searches[1]
    assert [search["step"] for search in searches[0]] == [1, 2, 4]
    assert max(search["accepted_k"] for search in searches[0]) > 0
    progress = json.loads((tmp_path / "parts" / "checkpoints" / "step_7" / "progress.json").read_text())
    assert [search["step"] for search in progress["searches"]] == [1, 2, 4]


@pytest.mark.slow
def test_a_run_resumes_its_anchor_in_another_layout(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config, world_size = config_of(models, "TP2xPP2", *REAL)
    pool.run(run_job, config, tmp_path / "whole", world_size=world_size)
    pool.run(run_until_step, config, tmp_path / "parts", 3, world_size=world_size)
    other, world_size = config_of(models, "DP2", *REAL)
    pool.run(run_job, other, tmp_path / "parts", world_size=world_size)
    for one, two in zip(without_seconds(tmp_path / "whole"), without_seconds(tmp_path / "parts"), strict=True):
        assert two["accepted_k"] == one["accepted_k"]
        # Sums in another order; the norm of an update of 1e-3 a number.
        assert two["update_norm"] == pytest.approx(one["update_norm"], rel=1e-3)
        assert two["score"] == pytest.approx(one["score"], rel=1e-3)


def _signalled_in_a_search(config: RunConfig, run: Path, number: int, rank: int, at_step: int, k: int) -> str:
    """Send one rank a signal while candidate k of the search after one step is in the weights."""
    judge = EffOPD._judge

    def signalled(self: EffOPD, candidate: int, scored: Scored, best: Scored) -> Any:
        if len(self.history) == at_step.bit_length() - 1 and candidate == k and dist.get_rank() == rank:
            os.kill(os.getpid(), number)
        return judge(self, candidate, scored, best)

    EffOPD._judge = signalled  # type: ignore[method-assign]
    try:
        return run_job(config, run)
    finally:
        EffOPD._judge = judge  # type: ignore[method-assign]


@pytest.mark.parametrize("at_step", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_stop_within_a_search_leaves_it_for_the_resumed_run(models: Path, pool: RankPool, tmp_path: Path, at_step: int) -> None:
    """At the last step as well, after which there is only the search left."""
    config, world_size = config_of(models, "PP2", *REAL, "training.steps=4", "effopd.accept=ge", "effopd.spacing=0.1")
    pool.run(run_job, config, tmp_path / "whole", world_size=world_size)
    assert pool.run(_signalled_in_a_search, config, tmp_path / "parts", signal.SIGTERM, 0, at_step, 1, world_size=world_size) == ["interrupted"] * 2
    assert [search["step"] for search in without_seconds(tmp_path / "parts")] == [step for step in (1, 2, 4) if step < at_step]
    assert pool.run(run_job, config, tmp_path / "parts", world_size=world_size) == ["finished"] * world_size
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert without_seconds(tmp_path / "whole") == without_seconds(tmp_path / "parts")


@pytest.mark.slow
def test_a_rank_that_dies_in_a_search_leaves_the_last_accepted_weights(models: Path, pool: RankPool, tmp_path: Path) -> None:
    """They are in the checkpoint before it, from which the run goes on as if nothing had been."""
    config, world_size = config_of(models, "PP2", *REAL, "training.steps=5", "effopd.accept=ge", "effopd.spacing=0.1", "checkpoint.every_steps=1")
    pool.run(run_job, config, tmp_path / "whole", world_size=world_size)
    with pytest.raises(AssertionError):
        pool.run(_signalled_in_a_search, config, tmp_path / "parts", signal.SIGKILL, 1, 4, 2, world_size=world_size, timeout=20)
    assert [search["step"] for search in without_seconds(tmp_path / "parts")] == [1, 2]
    pool.run(run_job, config, tmp_path / "parts", world_size=world_size)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert without_seconds(tmp_path / "whole") == without_seconds(tmp_path / "parts")
