"""What EffOPD's searches do to weights, masters and moments in several layouts, and what goes wrong on the way.

Scores are scripted where a decision is to be forced. What a search does is compared with a plain reading of the paper on this rank's whole slices. Runs that
stop, resume and die are in test_effopd_resume.py. Not covered: GPUs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.config import RunConfig, apply_overrides
from opd_megatron.training.effopd import EffOPD, Search
from opd_megatron.training.masters import MasterShard, host_copy
from opd_megatron.training.search_scores import AnswerScore, Scored
from tests.pool import RankPool
from tests.runs import metrics_of, run_job, run_until_step, small_config, weights_of
from tests.searches import (
    ACCEPTED,
    SCRIPT,
    Seen,
    check_searches,
    config_of,
    moved_names,
    scripted_run,
    start_of,
    watched,
    without_seconds,
)
from tests.tiny import write_tiny_model

CASES = [
    ("TP2xPP2", ()),
    pytest.param("DP2xPP2, teacher TP2", ("training.precision=bf16",), marks=pytest.mark.slow),
    pytest.param("TP2+SP", ("effopd.modules=all", "training.offload_optimizer=true", "training.precision=bf16"), marks=pytest.mark.slow),
    pytest.param("PP2xVPP2", ("effopd.modules=released",), marks=pytest.mark.slow),
    pytest.param("CP2xPP2, teacher CP2", (), marks=pytest.mark.slow),
    pytest.param("TP2, TP2 of the teacher's own", ("teacher.staleness=1",), marks=pytest.mark.slow),
    pytest.param(
        "TP2xDP2, teacher TP2xPP2", ("modules.train=layers.2.mlp,layers.3.attention,embedding", "effopd.modules=mlp,embedding"), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("layout", "overrides"), CASES)
def test_weights_and_masters_follow_the_decisions_bit_for_bit(models: Path, pool: RankPool, tmp_path: Path, layout: str, overrides: tuple[str, ...]) -> None:
    config, world_size = config_of(models, layout, "training.steps=9", *overrides)
    starts = pool.run(start_of, config, world_size=config.world_size if world_size == 1 else world_size - config.num_teacher_ranks)
    moved = moved_names(config, config.effopd.modules) & moved_names(config, config.modules.train)
    precision = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    for rank, seen in enumerate(pool.run(scripted_run, config, tmp_path / "run", SCRIPT, world_size=world_size)):
        if rank < len(starts):
            check_searches(seen, starts[rank], ACCEPTED, moved, precision=precision)
            assert all(torch.equal(before[name], after[name]) for before, after in seen.moments for name in before)
    lines = [json.loads(line) for line in (tmp_path / "run" / "effopd.jsonl").read_text().splitlines()]
    assert [(line["step"], line["accepted_k"], len(line["candidates"])) for line in lines] == [(1, 5, 5), (2, 2, 3), (4, 0, 1), (8, 1, 2)]
    assert [step["step"] for step in metrics_of(tmp_path / "run") if "effopd_accepted_k" in step] == [1, 2, 4, 8]
    assert all(step["probe_seconds"] >= 0 for step in metrics_of(tmp_path / "run"))


def test_a_jump_stays_when_the_next_step_has_no_gradient(models: Path, pool: RankPool, tmp_path: Path) -> None:
    """Were the weights moved and not their masters, the next update would take the jump back. A learning rate of next to nothing moves no weight."""
    config, _ = config_of(
        models,
        "TP2",
        "training.steps=2",
        "training.precision=bf16",
        "training.lr_schedule=linear",
        "effopd.trigger_steps=[1]",
        "effopd.modules=all",
        "training.adam_beta1=0",
    )
    final = {}
    for script in ({1: [0.1, 0.2, 0.3, 0.1]}, {1: [0.1, 0.0]}):
        (seen, _) = pool.run(scripted_run, config, tmp_path / str(len(final)), script, world_size=2)
        assert len(seen.after) == 1
        final[len(final)] = weights_of(tmp_path / str(len(final)))
    jumped, plain = final.values()
    changed = [name for name in jumped if not torch.equal(jumped[name], plain[name])]
    assert len(changed) > len(jumped) / 2


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("mixture") / "hf", "qwen3_moe", tied=True, vocab_size=263, seed=3, scale=0.3)


EXPERTS = [({"expert": 2, "pipeline": 2}, "paper", "all"), ({"tensor": 2, "sequence": True, "expert": 2}, "router,mlp", "*.mlp.experts.*,router")]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "moved", "train"), EXPERTS)
def test_experts_follow_the_decisions_wherever_they_are(
    models: Path, mixture: Path, pool: RankPool, tmp_path: Path, layout: dict[str, Any], moved: str, train: str
) -> None:
    """Once with nothing but experts and routers that train; stopped and resumed after the second search."""
    config = apply_overrides(
        small_config(models, **layout),
        [f"student.hf={mixture}", "effopd.enabled=true", "effopd.prompts=6", "training.steps=4", f"effopd.modules={moved}", f"modules.train={train}"],
    )
    starts = pool.run(start_of, config, world_size=4)
    names = moved_names(config, moved) & moved_names(config, train)
    script = {1: SCRIPT[1], 2: SCRIPT[2], 4: SCRIPT[4]}
    for start, seen in zip(starts, pool.run(scripted_run, config, tmp_path / "run", script, world_size=4), strict=True):
        check_searches(seen, start, [5, 2, 0], names)
    real = apply_overrides(config, ["effopd.score=divergence", "effopd.spacing=0.5", "training.learning_rate=3e-4"])
    pool.run(run_job, real, tmp_path / "whole", world_size=4)
    pool.run(run_until_step, real, tmp_path / "parts", 2, world_size=4)
    pool.run(run_job, real, tmp_path / "parts", world_size=4)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert without_seconds(tmp_path / "whole") == without_seconds(tmp_path / "parts")


def _noisy_run(config: RunConfig, run: Path) -> list[int]:
    """Let rank 1 see other scores: it would refuse what rank 0 accepts, and the other way round."""
    seen, script = Seen(), {1: [0.1, 0.2, 0.1], 2: [0.3, 0.2]}
    with watched(seen, lambda step: iter([score if dist.get_rank() == 0 else -score for score in script[step]])):
        run_job(config, run)
    return [search.accepted_k for search in seen.searches if search is not None]


def test_one_rank_that_scores_otherwise_splits_no_decision(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config, world_size = config_of(models, "DP2", "training.steps=2")
    assert pool.run(_noisy_run, config, tmp_path / "noisy", world_size=world_size) == [[1, 0], [1, 0]]


def _failing_run(config: RunConfig, run: Path) -> tuple[str, Seen]:
    """Let the score of the third candidate of the first search fail, on all ranks."""
    seen = Seen()

    def scores(step: int) -> Iterator[float]:
        yield from (0.1, 0.2, 0.3)
        raise ValueError("the grader broke")

    message = ""
    with watched(seen, scores):
        try:
            run_job(config, run)
        except ValueError as error:
            message = str(error)
    return message, seen


def test_a_score_that_fails_leaves_the_weights_of_before(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config, world_size = config_of(models, "TP2xPP2", "training.steps=2")
    for message, seen in pool.run(_failing_run, config, tmp_path / "run", world_size=world_size):
        assert "the grader broke" in message
        assert all(torch.equal(seen.after[0][name], weight) for name, weight in seen.before[0].items())
        assert all(torch.equal(seen.masters[0][name], weight) for name, weight in seen.before[0].items())


def _raised_alone(config: RunConfig, run: Path) -> float:
    """Let one rank alone raise within a search; return after how many seconds it was out of it."""
    judge, began = EffOPD._judge, [0.0]

    def failing(self: EffOPD, k: int, scored: Scored, best: Scored) -> Any:
        began[0] = time.monotonic()
        if dist.get_rank() == 1:
            raise RuntimeError("one rank alone")
        return judge(self, k, scored, best)

    EffOPD._judge = failing  # type: ignore[method-assign]
    try:
        run_job(config, run)
    except RuntimeError as error:
        if str(error) == "one rank alone":
            return time.monotonic() - began[0]
        raise
    finally:
        EffOPD._judge = judge  # type: ignore[method-assign]
    raise AssertionError("no error")


def test_a_rank_that_fails_alone_waits_for_nobody(models: Path, pool: RankPool, tmp_path: Path) -> None:
    """It is out of the search at once, in no collective that would restore weights: so it ends, and with it the job."""
    config, world_size = config_of(models, "DP2", "training.steps=1")
    with pytest.raises(AssertionError) as caught:
        pool.run(_fails_alone_quickly, config, tmp_path / "run", world_size=world_size, timeout=60)
    assert "out of the search after" in str(caught.value)


def _fails_alone_quickly(config: RunConfig, run: Path) -> None:
    seconds = _raised_alone(config, run)
    assert seconds > 10, f"out of the search after {seconds:.1f} seconds"


@pytest.mark.parametrize("layout", ["TP2xPP2", pytest.param("DP2xPP2, teacher TP2", marks=pytest.mark.slow)])
def test_a_search_that_refuses_everything_is_plain_distillation(models: Path, pool: RankPool, tmp_path: Path, layout: str) -> None:
    """Bit for bit: it takes no random number and no prompt of the training."""
    config, world_size = config_of(models, layout, "training.steps=5")
    pool.run(scripted_run, config, tmp_path / "refused", {step: [0.5, 0.4] for step in (1, 2, 4)}, world_size=world_size)
    plain = apply_overrides(config, ["effopd.enabled=false"])
    pool.run(run_job, plain, tmp_path / "plain", world_size=world_size)
    refused, reference = weights_of(tmp_path / "refused"), weights_of(tmp_path / "plain")
    assert all(torch.equal(refused[name], reference[name]) for name in reference)
    assert [step["loss"] for step in metrics_of(tmp_path / "refused")] == [step["loss"] for step in metrics_of(tmp_path / "plain")]


def _spoiled_run(config: RunConfig, run: Path, kind: str) -> list[str | None]:
    """Spoil what a search measures, and return why each was skipped."""
    seen, norm = Seen(), EffOPD._norm

    def spoiled(self: EffOPD, shards: list[MasterShard]) -> float:
        if kind == "update" and shards:
            shards[0].master.detach()[0] = float("nan")
        if kind == "nothing":
            self.anchor = host_copy(shards)
        return norm(self, shards)

    EffOPD._norm = spoiled  # type: ignore[method-assign]
    script = iter([float("nan")]) if kind == "score" else iter([0.0])
    try:
        with watched(seen, lambda step: script):
            run_job(config, run)
    finally:
        EffOPD._norm = norm  # type: ignore[method-assign]
    return [search.skipped if search is not None else None for search in seen.searches]


@pytest.mark.parametrize(
    ("kind", "why"),
    [("update", "not finite"), ("nothing", "no weight has moved"), ("score", "the weights before it score nan")],
    ids=["update", "nothing", "score"],
)
def test_what_cannot_be_extrapolated_is_skipped_and_said(models: Path, pool: RankPool, tmp_path: Path, kind: str, why: str) -> None:
    config, world_size = config_of(models, "DP2", "training.steps=1", "data.grader=exact")
    if kind == "update":
        # A spoiled weight cannot be exported; the run says so, after the search was skipped.
        with pytest.raises(AssertionError, match="not finite"):
            pool.run(_spoiled_run, config, tmp_path / "run", kind, world_size=world_size)
        record = json.loads((tmp_path / "run" / "effopd.jsonl").read_text())
        assert why in record["skipped"]
        return
    for skipped in pool.run(_spoiled_run, config, tmp_path / "run", kind, world_size=world_size):
        assert len(skipped) == 1
        assert why in str(skipped[0])


def _marks(config: RunConfig) -> list[tuple[float, list[float], list[str]]]:
    """Score the same weights twice by each of two scores, with a grader of our own that gives parts of a mark."""
    from opd_megatron.data.prompts import load_prompts
    from opd_megatron.data.tokenizer import load_tokenizer
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.groups import student_groups
    from opd_megatron.rollout.engine import Sampler
    from opd_megatron.training.student import Student

    source = open_weights(hf=config.student.hf)
    student = Student(config, source, student_groups(config.student.layout, 1), torch.device("cpu"))
    tokenizer = load_tokenizer(source.assets)
    sampler = Sampler(student.model, student.groups, vocab_size=262, eos_ids=[258], batch_sequences=8)
    prompts = load_prompts(config.data, tokenizer, part="all", limit=5)
    found = []
    for score in ("accuracy", "points"):
        asked: list[str] = []

        def grade(prompt: Any, text: str, asked: list[str] = asked) -> float:
            asked.append(f"{prompt.index} {text}")
            return len(text.encode()) % 3 / 2

        settings = apply_overrides(config, [f"effopd.score={score}"])
        answers = AnswerScore(config=settings, sampler=sampler, prompts=prompts, tokenizer=tokenizer, grader=grade)
        for step in (4, 4, 8):
            scored = answers.begin(step)()
            found.append((scored.score, list(scored.marks), list(asked)))
            asked.clear()
    return found


@pytest.mark.parametrize("layout", [None, "TP2xPP2"])
def test_answers_are_sampled_alike_for_each_candidate_and_their_marks_averaged_by_prompt(models: Path, pool: RankPool, layout: str | None) -> None:
    config, world_size = config_of(models, layout, "effopd.temperature=1", "effopd.samples_per_prompt=3", "rollout.max_response_tokens=6")
    by_rank = pool.run(_marks, config, world_size=world_size)
    assert [[(score, marks) for score, marks, _ in rank] for rank in by_rank] == [[(score, marks) for score, marks, _ in by_rank[0]]] * world_size
    (accuracy, accuracies, texts), again, other, (points, parts, same_texts), *_ = by_rank[0]
    assert again == (accuracy, accuracies, texts), "the same numbers are drawn for each candidate of a search"
    assert other[2] != texts, "and others in another search"
    assert same_texts == texts
    assert len(texts) == 15
    assert len(set(texts)) > 10
    lengths = [len(text.partition(" ")[2].encode()) for text in texts]
    assert parts == pytest.approx([sum(length % 3 / 2 for length in lengths[first : first + 3]) / 3 for first in range(0, 15, 3)])
    assert accuracies == pytest.approx([sum(length % 3 == 2 for length in lengths[first : first + 3]) / 3 for first in range(0, 15, 3)])
    assert (accuracy, points) == pytest.approx((sum(accuracies) / 5, sum(parts) / 5))
    assert accuracy != points


def _skips_and_refusals(config: RunConfig, run: Path) -> tuple[list[Search | None], Seen]:
    seen = Seen()
    with watched(seen):
        run_job(config, run)
    return seen.searches, seen


def test_where_nothing_is_right_nothing_is_worse_and_nothing_is_moved(models: Path, pool: RankPool, tmp_path: Path) -> None:
    """With `ge` a score of 0 would let every candidate pass, however far away; the answers of a random model are all wrong."""
    config, world_size = config_of(models, "DP2", "training.steps=2", "effopd.accept=ge")
    for searches, seen in pool.run(_skips_and_refusals, config, tmp_path / "run", world_size=world_size):
        assert ["no answer is right" in str(search.skipped) for search in searches if search is not None] == [True, True]
        assert all(torch.equal(seen.after[0][name], weight) for name, weight in seen.before[0].items())


def test_a_candidate_whose_weights_are_not_finite_is_refused_unasked(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config, world_size = config_of(models, "TP2xPP2", "training.steps=1", "effopd.spacing=1e39")
    for seen in pool.run(scripted_run, config, tmp_path / "run", {1: [0.1, 0.9, 0.9]}, world_size=world_size):
        (search,) = seen.searches
        assert search is not None
        assert (search.accepted_k, len(search.candidates)) == (0, 1)
        assert math.isnan(search.candidates[0].score)
        assert all(bool(weight.isfinite().all()) for weight in seen.after[0].values())


def test_moments_begin_anew_on_request(models: Path, pool: RankPool, tmp_path: Path) -> None:
    config, world_size = config_of(models, "TP2xPP2", "training.steps=2", "effopd.reset_moments=true")
    for seen in pool.run(scripted_run, config, tmp_path / "run", {1: [0.1, 0.2, 0.1], 2: [0.3, 0.1]}, world_size=world_size):
        (before, after), (_, refused) = seen.moments
        assert any(bool(moment.any()) for moment in before.values())
        assert not any(bool(moment.any()) for moment in after.values())
        assert any(bool(moment.any()) for moment in refused.values())
