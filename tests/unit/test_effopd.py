"""EffOPD's schedule, candidates and decisions, without a model. Whole searches are in tests/distributed/test_effopd.py."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from opd_megatron.config import DataConfig, EffOPDConfig
from opd_megatron.data.prompts import Prompt, PromptSet
from opd_megatron.training import effopd as module
from opd_megatron.training.effopd import Candidate, EffOPD, Search, _paired_error, extrapolation_candidates
from opd_megatron.training.search_scores import Scored, drawn_prompts


def released_recursion(weights: torch.Tensor, anchor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The released code's candidates, one from the other: factor 2, then f / (1 + f)."""
    factor = 2.0
    for _ in range(5):
        weights = weights + factor * (weights - anchor)
        factor = factor / (1 + factor)
        yield weights


def test_candidates_are_those_of_the_paper_and_of_the_released_recursion() -> None:
    generator = torch.Generator().manual_seed(1)
    weights, anchor = torch.randn(2, 50, 30, generator=generator, dtype=torch.float64)
    candidates = list(extrapolation_candidates(weights, anchor))
    assert [k for k, _ in candidates] == [1, 2, 3, 4, 5]
    for (k, candidate), released in zip(candidates, released_recursion(weights, anchor), strict=True):
        assert torch.equal(candidate, weights + 2 * k * (weights - anchor))
        # Rounding of fp64, up to ten times as far from the anchor.
        torch.testing.assert_close(candidate, released, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(candidate, anchor + (1 + 2 * k) * (weights - anchor), rtol=1e-12, atol=1e-12)


def test_a_mapping_gives_each_of_its_tensors_and_keeps_what_it_was_given() -> None:
    weights, anchor = {"a": torch.ones(2), "b": torch.tensor([3.0])}, {"a": torch.zeros(2), "b": torch.tensor([1.0])}
    found = list(extrapolation_candidates(weights, anchor, max_k=2))
    assert [(k, one["a"].tolist(), one["b"].tolist()) for k, one in found] == [(1, [3.0, 3.0], [7.0]), (2, [5.0, 5.0], [11.0])]
    assert weights["a"].tolist() == [1.0, 1.0]
    assert [one.tolist() for _, one in extrapolation_candidates(torch.tensor([2.0]), torch.tensor([1.0]), max_k=3, spacing=0.5)] == [[2.5], [3.0], [3.5]]


def test_searches_follow_the_powers_of_two_or_the_steps_that_are_named() -> None:
    assert [step for step in range(40) if EffOPDConfig(enabled=True).is_due(step)] == [1, 2, 4, 8, 16, 32]
    assert not any(EffOPDConfig().is_due(step) for step in range(40))
    assert [step for step in range(40) if EffOPDConfig(enabled=True, trigger_steps=(3, 10)).is_due(step)] == [3, 10]


def judge(settings: EffOPDConfig, score: float, best: float, monkeypatch: pytest.MonkeyPatch, marks: tuple[Any, Any] = ((), ())) -> Candidate:
    monkeypatch.setattr(module, "agreed_by_rank_0", lambda value: value)
    search = EffOPD.__new__(EffOPD)
    search.settings = settings
    return search._judge(1, Scored(score, marks[0]), Scored(best, marks[1]))


@pytest.mark.parametrize(
    ("changes", "score", "accepted"),
    [
        ({}, 0.5, False),
        ({}, 0.51, True),
        ({}, 0.49, False),
        ({"accept": "ge"}, 0.5, True),
        ({"accept": "ge"}, 0.49, False),
        ({"min_gain": 0.1}, 0.55, False),
        ({"min_gain": 0.1}, 0.65, True),
        ({"min_gain": 0.25, "accept": "ge"}, 0.75, True),
        ({"accept": "ge"}, math.nan, False),
        ({}, math.inf, False),
    ],
)
def test_a_candidate_must_be_better_or_not_worse(changes: dict[str, Any], score: float, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(EffOPDConfig(enabled=True, **changes), score, 0.5, monkeypatch).accepted is accepted


def test_a_candidate_that_changes_nothing_passes_about_half_the_time_and_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spec of the noise: two independent sets of 50 coin flips; ties are refused."""
    flips, accepted, errors = random.Random(7), 0, []
    for _ in range(2000):
        marks = [tuple(float(flips.random() < 0.5) for _ in range(50)) for _ in range(2)]
        found = judge(EffOPDConfig(enabled=True), sum(marks[0]) / 50, sum(marks[1]) / 50, monkeypatch, (marks[0], marks[1]))
        accepted += found.accepted
        errors.append(found.standard_error)
    # 46 % in theory: half of all but the ties, which are 8 %. Four standard errors of 2000 draws are 4.5 %.
    assert 0.415 < accepted / 2000 < 0.505
    assert sum(errors) / 2000 == pytest.approx(math.sqrt(2 * 0.25 / 50), rel=0.02)


def test_the_error_of_a_gain_is_paired() -> None:
    assert _paired_error((1.0, 0.0, 1.0, 0.0), (1.0, 0.0, 1.0, 0.0)) == 0
    differences = torch.tensor([1.0, 0.0, 1.0, -1.0])
    assert _paired_error((1.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0)) == pytest.approx(float(differences.std() / 2))
    assert _paired_error((), ()) is None
    assert _paired_error((1.0,), (0.0,)) is None


def test_a_search_survives_its_json() -> None:
    candidates = (
        Candidate(k=1, score=0.5, gain=0.1, standard_error=None, accepted=True),
        Candidate(k=2, score=0.4, gain=-0.1, standard_error=0.02, accepted=False),
    )
    search = Search(step=4, update_norm=1.5, score=0.4, candidates=candidates, num_responses=150, seconds=2.0)
    assert Search.from_json(search.to_json()) == search
    assert search.accepted_k == 1
    assert search.to_json()["accepted_k"] == 1
    assert search.metrics()["effopd_score_after"] == 0.5
    assert "k=1 accepted" in search.summary()
    skipped = Search(step=1, update_norm=0.0, skipped="no weight has moved")
    assert Search.from_json(skipped.to_json()) == skipped
    assert skipped.summary() == "no extrapolation after step 1: no weight has moved"


DATA = DataConfig(prompts="train.jsonl")


def prompt_set(texts: list[str]) -> PromptSet:
    return PromptSet(
        prompts=[Prompt(index=i, messages=({"role": "user", "content": text},), ids=(1, 2), answer="a", target=None) for i, text in enumerate(texts)]
    )


def test_prompts_are_drawn_once_and_for_all_and_held_out_on_request() -> None:
    prompts, settings = prompt_set([f"prompt {i}" for i in range(200)]), EffOPDConfig(enabled=True, prompts=20)
    drawn, left = drawn_prompts(prompts, settings, DATA, seed=1)
    assert left is prompts
    assert len(drawn) == len({prompt.index for prompt in drawn.prompts}) == 20
    assert drawn_prompts(prompts, settings, DATA, seed=1)[0].fingerprint == drawn.fingerprint
    assert drawn_prompts(prompts, settings, DATA, seed=2)[0].fingerprint != drawn.fingerprint
    held, left = drawn_prompts(prompts, replace(settings, hold_out=True), DATA, seed=1)
    assert held.fingerprint == drawn.fingerprint
    assert {prompt.index for prompt in left.prompts} == {prompt.index for prompt in prompts.prompts} - {prompt.index for prompt in held.prompts}


def test_a_prompt_that_stands_twice_is_held_out_twice() -> None:
    prompts = prompt_set([f"prompt {i % 30}" for i in range(60)])
    held, left = drawn_prompts(prompts, EffOPDConfig(enabled=True, prompts=10, hold_out=True), DATA, seed=1)
    asked = {prompt.messages[0]["content"] for prompt in held.prompts}
    assert not asked & {prompt.messages[0]["content"] for prompt in left.prompts}


@pytest.mark.parametrize(
    ("num", "changes", "message"), [(5, {}, "effopd.prompts=6 are more than the 5 training"), (6, {"hold_out": True}, "leave one to train on")]
)
def test_fewer_prompts_than_the_sample_are_refused(num: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn_prompts(prompt_set([f"prompt {i}" for i in range(num)]), EffOPDConfig(enabled=True, prompts=6, **changes), DATA, seed=1)


def test_holding_out_every_repeated_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="all repeat"):
        drawn_prompts(prompt_set(["the same"] * 9), EffOPDConfig(enabled=True, prompts=6, hold_out=True), DATA, seed=1)
