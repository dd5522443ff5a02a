"""EffOPD in whole runs: weights, masters and anchor after searches in several layouts, their checkpoints, and what goes wrong on the way.

Scores are scripted where a decision is to be forced; runs that resume score for real, by the loss to the teacher. What a search does is compared with a plain
reading of the paper on this rank's whole slices. Not covered: GPUs.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.config import RunConfig, apply_overrides
from opd_megatron.models.modules import chosen_rows
from opd_megatron.models.weight_map import weight_map
from opd_megatron.models.weights import named_global_parameters
from opd_megatron.training.effopd import EffOPD, Search
from opd_megatron.training.masters import MasterShard, host_copy
from opd_megatron.training.search_scores import AnswerScore, Scored
from tests.pool import RankPool
from tests.runs import LAYOUTS, metrics_of, run_job, run_until_step, small_config, weights_of, with_teacher
from tests.tiny import write_tiny_model

Tensors = dict[str, torch.Tensor]


def config_of(models: Path, layout: str | None, *overrides: str) -> tuple[RunConfig, int]:
    student, teacher, world_size = LAYOUTS[layout] if layout is not None else ({}, {}, 1)
    own = dict(teacher)
    config = with_teacher(small_config(models, **student), own.pop("own", None), **own)
    return apply_overrides(config, ["effopd.enabled=true", "effopd.prompts=6", *overrides]), world_size


@dataclass
class Seen:
    """What a rank held before and after each search, and what it decided."""

    before: list[Tensors] = field(default_factory=list)
    after: list[Tensors] = field(default_factory=list)
    masters: list[Tensors] = field(default_factory=list)
    moments: list[tuple[Tensors, Tensors]] = field(default_factory=list)
    searches: list[Search | None] = field(default_factory=list)


def whole_masters(search: EffOPD, key: str) -> Tensors:
    """Return fp32 numbers of the optimizer in whole slices: read straight from Megatron-Core, and added up over the replicas."""
    found = {}
    of = {}
    for part in search.student.optimizer.chained_optimizers:
        for parameter in part.model_param_group_index_map:
            of[parameter] = part._get_main_param_and_optimizer_states(parameter).get(key), part._get_model_param_range_map(parameter)["param"]
    for name, parameter in named_global_parameters(search.student.model, search.student.architecture):
        if not parameter.requires_grad:
            found[name] = parameter.detach().float().clone()
            continue
        flat = torch.zeros(parameter.numel())
        if parameter in of and of[parameter][0] is not None:
            numbers, owned = of[parameter]
            flat[owned.start : owned.end] = numbers.detach()
        expert = not getattr(parameter, "allreduce", True)
        dist.all_reduce(flat, group=search.student.groups.collection.expt_dp if expert else search.student.groups.collection.dp_cp)
        found[name] = flat.reshape(parameter.shape)
    return found


@contextmanager
def watched(seen: Seen, script: Callable[[int], Iterator[float]] | None = None) -> Iterator[None]:
    """Keep what each search does; with a script, the scores after a step are its numbers."""
    probe, begin = EffOPD.maybe_probe, AnswerScore.begin

    def parameters(search: EffOPD) -> Tensors:
        named = named_global_parameters(search.student.model, search.student.architecture)
        return {name: parameter.detach().clone() for name, parameter in named}

    def watch(self: EffOPD, step: int, should_stop: Callable[[], bool]) -> Search | None:
        if not self.is_pending(step):
            return probe(self, step, should_stop)
        with self.student.optimizer_on_device():
            before, moments = whole_masters(self, "param"), whole_masters(self, "exp_avg")
        seen.before.append(before)
        try:
            seen.searches.append(probe(self, step, should_stop))
        finally:
            with self.student.optimizer_on_device():
                seen.after.append(parameters(self))
                seen.masters.append(whole_masters(self, "param"))
                seen.moments.append((moments, whole_masters(self, "exp_avg")))
        return seen.searches[-1]

    def scripted(self: AnswerScore, step: int) -> Callable[[], Scored]:
        assert script is not None
        numbers = script(step)
        return lambda: Scored(next(numbers))

    EffOPD.maybe_probe = watch  # type: ignore[method-assign]
    if script is not None:
        AnswerScore.begin = scripted  # type: ignore[method-assign]
    try:
        yield
    finally:
        EffOPD.maybe_probe, AnswerScore.begin = probe, begin  # type: ignore[method-assign]


# Scores after steps 1, 2, 4 and 8, the first of each that of the weights before the search; and what is accepted.
SCRIPT = {1: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 2: [0.1, 0.2, 0.3, 0.3], 4: [0.5, 0.4], 8: [0.2, 0.3, 0.3]}
# An accepted one after an accepted one, and after a refused one: the anchor of either is used.
ACCEPTED = [5, 2, 0, 1]


def scripted_run(config: RunConfig, run: Path, script: dict[int, list[float]]) -> Seen:
    seen = Seen()
    with watched(seen, lambda step: iter(script[step])):
        run_job(config, run)
    return seen


def check_searches(seen: Seen, start: Tensors, accepted: list[int], moved: set[str], *, precision: torch.dtype = torch.float32) -> None:
    """Compare with the paper's rule on whole slices, bit for bit."""
    anchor = start
    assert [search.accepted_k for search in seen.searches if search is not None] == accepted
    for before, after, masters, k in zip(seen.before, seen.after, seen.masters, accepted, strict=True):
        for name, weight in before.items():
            expected = weight + 2 * k * (weight - anchor[name]) if k and name in moved else weight
            assert torch.equal(masters[name], expected), name
            assert torch.equal(after[name], expected.to(precision)), name
        anchor = masters


def start_of(config: RunConfig) -> Tensors:
    """Return this rank's weights of step 0, as its masters begin."""
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.groups import student_groups
    from opd_megatron.training.student import Student

    student = Student(config, open_weights(hf=config.student.hf), student_groups(config.student.layout, 1), torch.device("cpu"))
    return {name: parameter.detach().float().clone() for name, parameter in named_global_parameters(student.model, student.architecture)}


def moved_names(config: RunConfig, choice: str) -> set[str]:
    from opd_megatron.models.weights import open_weights

    return {row.name for row in chosen_rows(choice, weight_map(open_weights(hf=config.student.hf).architecture))}


CASES = [
    ("TP2xPP2", ()),
    ("DP2xPP2, teacher TP2", ("training.precision=bf16",)),
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


REAL = ("effopd.score=divergence", "training.learning_rate=3e-4", "training.steps=7", "effopd.spacing=0.5")


@pytest.mark.parametrize("stops", [(3, 4), pytest.param((1,), marks=pytest.mark.slow), pytest.param((6,), marks=pytest.mark.slow)])
def test_a_run_that_stops_between_searches_ends_with_the_same_bits(models: Path, pool: RankPool, tmp_path: Path, stops: tuple[int, ...]) -> None:
    """At a search's step, between two, after one; the score is real, and accepts and refuses."""
    config, world_size = config_of(models, "TP2xPP2", *REAL)
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


def without_seconds(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "effopd.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


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


def _stopped_in_a_search(config: RunConfig, run: Path, at_step: int) -> str:
    """Ask for a stop while the candidates of one step are scored."""
    judge = EffOPD._judge

    def stopped(self: EffOPD, k: int, scored: Scored, best: Scored) -> Any:
        if len(self.history) == at_step.bit_length() - 1 and k == 1 and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(self, k, scored, best)

    EffOPD._judge = stopped  # type: ignore[method-assign]
    try:
        return run_job(config, run)
    finally:
        EffOPD._judge = judge  # type: ignore[method-assign]


@pytest.mark.parametrize("at_step", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_stop_within_a_search_leaves_it_for_the_resumed_run(models: Path, pool: RankPool, tmp_path: Path, at_step: int) -> None:
    """At the last step as well, after which there is only the search left."""
    config, world_size = config_of(models, "PP2", *REAL, "training.steps=4", "effopd.accept=ge", "effopd.spacing=0.1")
    pool.run(run_job, config, tmp_path / "whole", world_size=world_size)
    assert pool.run(_stopped_in_a_search, config, tmp_path / "parts", at_step, world_size=world_size) == ["interrupted"] * world_size
    assert [search["step"] for search in without_seconds(tmp_path / "parts")] == [step for step in (1, 2, 4) if step < at_step]
    assert pool.run(run_job, config, tmp_path / "parts", world_size=world_size) == ["finished"] * world_size
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert without_seconds(tmp_path / "whole") == without_seconds(tmp_path / "parts")


def _killed_in_a_search(config: RunConfig, run: Path, kill_at: int) -> str:
    """Let the last rank die while the second candidate of one search is in the weights."""
    judge = EffOPD._judge

    def dying(self: EffOPD, k: int, scored: Scored, best: Scored) -> Any:
        if len(self.history) == kill_at.bit_length() - 1 and k == 2 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return judge(self, k, scored, best)

    EffOPD._judge = dying  # type: ignore[method-assign]
    try:
        return run_job(config, run)
    finally:
        EffOPD._judge = judge  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_rank_that_dies_in_a_search_leaves_the_last_accepted_weights(models: Path, pool: RankPool, tmp_path: Path) -> None:
    """They are in the checkpoint before it, from which the run goes on as if nothing had been."""
    config, world_size = config_of(models, "PP2", *REAL, "training.steps=5", "effopd.accept=ge", "effopd.spacing=0.1", "checkpoint.every_steps=1")
    pool.run(run_job, config, tmp_path / "whole", world_size=world_size)
    with pytest.raises(AssertionError):
        pool.run(_killed_in_a_search, config, tmp_path / "parts", 4, world_size=world_size, timeout=20)
    assert [search["step"] for search in without_seconds(tmp_path / "parts")] == [1, 2]
    pool.run(run_job, config, tmp_path / "parts", world_size=world_size)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert without_seconds(tmp_path / "whole") == without_seconds(tmp_path / "parts")


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
