"""The teacher's hidden states in rounds beside its computation: the numbers of one transfer at the end, bit for bit, in every kind of layout.

Not covered: CUDA streams, NCCL, and what the overlap saves (tools/bench_payload.py).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.config import AlignmentConfig, LossConfig, ParallelLayout, PrivilegedConfig, RunConfig, TeacherConfig, apply_overrides
from opd_megatron.data.batch_plan import plan_scoring
from opd_megatron.parallel.delivery import Channel, Delivery
from opd_megatron.parallel.payload import plan_payload
from recipes.run import find_recipe
from tests.distributed.test_faults import _command
from tests.distributed.test_faults import models as faults_models
from tests.planned import config_of
from tests.pool import RankPool
from tests.programs import run_program
from tests.runs import metrics_of, run_job, small_config, weights_of, with_teacher
from tests.tiny import write_tiny_model
from tests.tokenizers_made import byte_level_bpe

__all__ = ["faults_models"]

ROUNDS = 3


@pytest.mark.parametrize("num_rounds", [1, 2, 3, 5, 40])
def test_every_micro_batch_is_in_one_round_and_the_last_round_has_the_shortest(num_rounds: int) -> None:
    # 11 samples over 2 replicas, one at a time: 5 and 6 micro-batches.
    plan = plan_scoring(list(range(20, 31)), ParallelLayout(), 2, 1)
    rounds = plan.rounds(num_rounds)
    assert len(rounds) == min(num_rounds, 6)
    for replica, whole in enumerate(plan.micro_batches):
        assert sorted(micro_batch for of_round in rounds for micro_batch in of_round[replica]) == sorted(whole)
    sizes = [max(map(len, of_round)) for of_round in rounds]
    assert max(sizes) - min(sizes) <= 1
    if num_rounds == 1:
        assert rounds == [plan.micro_batches]
    else:
        assert [micro_batches[0] for micro_batches in rounds[-1]] == [(0,), (5,)]


# --- messages of several rounds under way -----------------------------------------------------------------------------------------------


def _cross(num_rounds: int) -> list[torch.Tensor]:
    """Send 0 to 4 rows from every rank to the next in every round; begin all rounds before any of them ends."""
    rank, size = dist.get_rank(), dist.get_world_size()
    channel = Channel(width=2, dtype=torch.float32, device=torch.device("cpu"))
    under_way = []
    for number in range(num_rounds):
        rows = [(number + holder) % 5 for holder in range(size)]
        plan = plan_payload([[holder] for holder in range(size)], [[(holder + 1) % size] for holder in range(size)], rows)
        held = {rank: torch.full((rows[rank], 2), 100.0 * number + rank)}
        under_way.append(Delivery(plan, held, [(rank - 1) % size], channel, tag=number))
    return [rows for delivery in under_way for rows in delivery.arrive()]


def test_rounds_under_way_at_once_are_not_taken_for_one_another(pool: RankPool) -> None:
    for rank, arrived in enumerate(pool.run(_cross, 7)):
        source = (rank - 1) % 4
        for number, rows in enumerate(arrived):
            assert torch.equal(rows, torch.full(((number + source) % 5, 2), 100.0 * number + source))


# --- whole runs -------------------------------------------------------------------------------------------------------------------------


def _changed(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def _laid_out(student: dict[str, Any], teacher: dict[str, Any], *, prompts: int = 8, staleness: int = 0) -> Callable[[Path], RunConfig]:
    def config(models: Path) -> RunConfig:
        laid_out = _changed(with_teacher(small_config(models, **student), **teacher), "data", batch_prompts=prompts)
        return _changed(laid_out, "teacher", staleness=staleness)

    return config


def _experts(models: Path) -> RunConfig:
    """Two replicas of three samples: in the second round one has nothing of its own, and lends its experts."""
    config = with_teacher(_laid_out({}, {}, prompts=3)(models), expert=2)
    return _changed(config, "teacher", hf=str(models / "experts"))


def _privileged(models: Path) -> RunConfig:
    template = models / "teacher.jinja"
    template.write_text("{{ problem }}, and it is {{ answer }} {{ answer }}")
    teacher = TeacherConfig(weights="live", layout=ParallelLayout(tensor=2))
    return dataclasses.replace(small_config(models), teacher=teacher, privileged=PrivilegedConfig(template=str(template)))


def _other_tokenizer(models: Path) -> RunConfig:
    config = with_teacher(small_config(models, tensor=2), own=1)
    config = dataclasses.replace(config, alignment=AlignmentConfig(kind="strict"), loss=LossConfig(temperature=1.1))
    return _changed(_changed(config, "teacher", hf=str(models / "merged")), "rollout", max_response_tokens=24)


# A configuration, and on how many ranks.
CASES: dict[str, tuple[Callable[[Path], RunConfig], int]] = {
    "DP4, teacher TP2": (_laid_out({}, {"tensor": 2}), 4),
    "TP2xDP2, teacher TP2xPP2": (_laid_out({"tensor": 2}, {"tensor": 2, "pipeline": 2}), 4),
    "CP2xTP2+SP, teacher PP2": (_laid_out({"context": 2, "tensor": 2, "sequence": True}, {"pipeline": 2}), 4),
    "TP2, teacher CP4": (_laid_out({"tensor": 2}, {"context": 4}), 4),
    # One of the teacher's ranks has no sample, and the student's first stage needs none.
    "PP2, teacher DP4, 3 samples": (_laid_out({"pipeline": 2}, {}, prompts=3), 4),
    "DP2, PP2 of the teacher's own": (_laid_out({}, {"pipeline": 2, "own": 2}), 4),
    "TP2, 2 ranks of the teacher's own, one batch ahead": (_laid_out({"tensor": 2}, {"own": 2}, staleness=1), 4),
    "teacher EP2, 3 samples": (_experts, 2),
    "the student as it is, privileged, TP2": (_privileged, 2),
    "another tokenizer, TP2, a rank of the teacher's own": (_other_tokenizer, 3),
}
SLOW = ("TP2xDP2, teacher TP2xPP2", "CP2xTP2+SP, teacher PP2", "TP2, teacher CP4", "DP2, PP2 of the teacher's own")


@pytest.fixture(scope="module")
def more_models(models: Path) -> Path:
    """Beside the usual ones a teacher with experts, and one with another tokenizer."""
    write_tiny_model(models / "experts", "qwen3_moe", vocab_size=263, seed=2, scale=0.5, hidden_size=96)
    write_tiny_model(models / "merged", seed=2, scale=0.5, hidden_size=96, vocab_size=520)
    byte_level_bpe(512).save_pretrained(models / "merged")
    return models


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES])
def test_rounds_change_no_bit(more_models: Path, pool: RankPool, tmp_path: Path, name: str) -> None:
    make, world_size = CASES[name]
    config = _changed(_changed(make(more_models), "training", steps=2), "teacher", micro_batch=1)
    for num_rounds in (1, ROUNDS):
        pool.run(run_job, _changed(config, "teacher", transfer_rounds=num_rounds), tmp_path / str(num_rounds), world_size=world_size)
    at_once, in_rounds = (metrics_of(tmp_path / str(num_rounds)) for num_rounds in (1, ROUNDS))
    for ours, reference in zip(in_rounds, at_once, strict=True):
        for key in ("loss", "divergence", "grad_norm", "payload_bytes_per_token"):
            assert ours[key] == reference[key], key
        # Shares of every round are filled up to one size: less than a row a rank of the tensor group and round.
        ranks = config.student.layout.tensor
        more = (ours["payload_gathered_bytes_per_token"] - reference["payload_gathered_bytes_per_token"]) * ours["response_tokens"] / (4 * 96)
        assert abs(more) <= ROUNDS * world_size * ranks * (ranks - 1)
    exact, weights = weights_of(tmp_path / "1"), weights_of(tmp_path / str(ROUNDS))
    assert all(torch.equal(exact[key], weights[key]) for key in exact)


# --- plans ------------------------------------------------------------------------------------------------------------------------------

PLANNED = ["TP2+SPxDP2, teacher TP2xPP2", "CP2xTP2, teacher CP2xPP2", "EP2xPP2, teacher EP4"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in PLANNED])
def test_rounds_are_planned(planned_models: Path, pool: RankPool, planner: Callable[..., Any], name: str) -> None:
    from tests.distributed.test_planned_memory import held_bytes, planned_bytes
    from tests.distributed.test_planned_messages import check_messages

    config = apply_overrides(config_of(planned_models, name), ["teacher.transfer_rounds=2", "teacher.micro_batch=1"])
    check_messages(config, pool, planner)
    planned = planner(planned_bytes, config)
    for rank, held in enumerate(pool.run(held_bytes, config)):
        for kind in ("scores received", "payload bytes", "gathered bytes"):
            assert planned[rank][kind] == held[kind], (rank, kind)


@pytest.mark.parametrize("name", ["qwen3_1p7b_from_8b_8gpu_h100", "qwen3_1p7b_from_8b_16gpu_h100_pipelined", "llama3_8b_from_70b_32gpu_h100"])
@pytest.mark.parametrize("apart", [False, True], ids=["beside the student", "on ranks of its own"])
def test_rounds_take_at_most_one_round_more_memory_than_one_transfer(name: str, apart: bool) -> None:
    from opd_megatron.planning.payload import step_payload

    config = find_recipe(name)()
    if apart:
        assert config.teacher is not None
        config = apply_overrides(config, ["teacher.placement=dedicated", f"teacher.num_ranks={config.world_size // 2}"])
    at_once, in_rounds = (step_payload(apply_overrides(config, [f"teacher.transfer_rounds={num_rounds}"])) for num_rounds in (1, 4))
    assert (len(at_once.routes), len(in_rounds.routes)) == (1, 4)
    assert at_once.all_sent_rows() == in_rounds.all_sent_rows()
    for rank in range(config.world_size):
        receives = not apart or rank < config.world_size // 2
        before, after = (payload.scored_rows(rank) + payload.buffered_rows(rank, receives=receives) for payload in (at_once, in_rounds))
        # Shares are made even once a round.
        assert after <= before + at_once.held_rows(rank) / 4 + 4 * config.student.layout.tensor
        assert in_rounds.needed_rows(rank) == at_once.needed_rows(rank)


# --- failures ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2], ids=["a student's rank", "the teacher's rank"])
def test_a_rank_that_fails_between_rounds_ends_the_job_with_its_cause(faults_models: Path, tmp_path: Path, rank: int) -> None:
    layout = ("world_size=3", "student.layout.pipeline=2", "teacher.placement=dedicated", "teacher.num_ranks=1")
    words = _command(faults_models, tmp_path / "run", *layout, "training.steps=500", "teacher.micro_batch=1", "teacher.transfer_rounds=4", ranks=3)
    # The command line of one rank: without the interpreter, the module, and the number of ranks to start.
    started = time.monotonic()
    job = run_program("tests.failing", str(rank), "between rounds", *words[3:4], *words[6:], ranks=3)
    assert job.returncode == 1
    assert time.monotonic() - started < 60
    assert "RuntimeError: no more rounds" in job.stderr
    assert (tmp_path / "run" / "status").read_text().strip() == "crashed"
