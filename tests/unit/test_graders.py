"""Graders of responses and pass@k.

Not covered: every reasoning-gym task's own grader, and math_verify's judgement beyond a few forms.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from opd_megatron.config import DataConfig
from opd_megatron.data import Prompt
from opd_megatron.data.sources import read_rows
from opd_megatron.evaluation.graders import check_gradable, make_grader, pass_at_k, strip_thinking

pytest.importorskip("math_verify", reason="needs the demo extra: math-verify")

FILE = DataConfig(prompts="a.jsonl")
MATH = DataConfig(prompts="a.jsonl", grader="math_verify")
EXACT = DataConfig(prompts="a.jsonl", grader="exact")
TASK = DataConfig(prompts="reasoning_gym:spell_backward", task_size=20)


def prompt(answer: str | None) -> Prompt:
    return Prompt(index=7, messages=({"role": "user", "content": "?"},), ids=(1,), answer=answer, target=answer)


def test_exact_compares_stripped_text():
    grade = make_grader(EXACT)
    assert [grade(prompt(" a b\n"), text) for text in ("a b", "  a b  ", "a  b", "A b", "")] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("response", "graded"),
    [
        ("<think>5 or 6?</think>\n5 ", "5"),
        ("\n<think>\n</think>\n\n5", "5"),
        ("so it is 6</think>5", "5"),
        ("<think>a</think>b</think>5", "5"),
        ("<think>never closed 5", ""),
        ("5", "5"),
    ],
)
def test_only_what_follows_the_thinking_is_graded(response, graded):
    assert strip_thinking(response) == graded
    assert make_grader(EXACT)(prompt("5"), response) == float(graded == "5")


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("42", "The answer is 42.", 1),
        ("42", "\\boxed{42}", 1),
        ("42", "The answer is 43.", 0),
        ("1/2", "$0.5$", 1),
        ("\\frac{1}{2}", "so it is \\boxed{\\tfrac12}", 1),
        ("x+1", "$1 + x$", 1),
        ("$x+1$", "$x + 2$", 0),
        ("(1,2)", "$(1, 2)$", 1),
        ("5 + 7 = 12, then halve it.\n#### 6", "It is 6", 1),
        ("Paris", "Paris", 1),
        ("Paris", "London", 0),
        ("42", "", 0),
    ],
)
def test_math_answers_count_by_value(answer, response, score):
    assert make_grader(MATH)(prompt(answer), response) == score


GARBAGE = ["\x00\ud800", "\\frac{{{", "(" * 5000, "9" * 10000, "\\boxed{" * 500, "$" + "x+" * 300 + "$", "}{][\\", "\\int\\sum\\lim", "1" + "/0" * 50]


def garbage_scores() -> list[float]:
    grade = make_grader(MATH)
    return [grade(prompt("42"), text) for text in GARBAGE] + [grade(prompt("42"), "42.0")]


def test_garbage_scores_zero_on_the_main_thread_in_another_and_in_a_process():
    expected = [0.0] * len(GARBAGE) + [1.0]
    assert garbage_scores() == expected
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.extend(garbage_scores()))
    thread.start()
    thread.join()
    assert scores == expected
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(garbage_scores).result() == expected


def test_an_expression_too_large_to_evaluate_ends_in_time():
    assert make_grader(MATH)(prompt("42"), "$9^{9^{9}}$") == 0


def test_a_reasoning_task_grades_with_its_own_score():
    pytest.importorskip("reasoning_gym", reason="needs the demo extra: reasoning-gym")
    grade = make_grader(TASK)
    for row in read_rows(TASK):
        entry_prompt = Prompt(index=row.index, messages=row.messages, ids=(1,), answer=row.answer, target=row.target, entry=row.entry)
        assert grade(entry_prompt, f"<think>?</think> {row.answer}\n") == 1
        assert 0 <= grade(entry_prompt, f"{row.answer}!") < 1
        assert grade(entry_prompt, "") == 0


def test_a_failing_grader_counts_zero_and_is_logged_once(caplog):
    pytest.importorskip("reasoning_gym", reason="needs the demo extra: reasoning-gym")
    grade = make_grader(TASK)
    broken = dataclasses.replace(prompt("abc"), entry="not what the task made")
    assert [grade(broken, "abc") for _ in range(3)] == [0, 0, 0]
    assert caplog.text.count("grading prompt 7 failed and counts 0") == 1


def test_a_prompt_without_an_answer_cannot_be_graded():
    for refuse in (lambda: make_grader(FILE)(prompt(None), "a"), lambda: check_gradable([prompt("a"), prompt(None)], FILE)):
        with pytest.raises(ValueError, match=r"prompt 7 .* no reference answer under data.answer_key='answer'"):
            refuse()
    check_gradable([prompt("a")], FILE)


def test_a_task_grades_by_its_entry_and_nothing_else():
    with pytest.raises(ValueError, match="cannot be graded"):
        check_gradable([prompt("a")], TASK)


def test_a_grader_that_does_not_fit_the_source_is_refused():
    with pytest.raises(ValueError, match="grades only reasoning_gym: sources"):
        make_grader(DataConfig(prompts="a.jsonl", grader="reasoning_gym"))


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (5, 2, 4), (6, 1, 6), (6, 0, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(num_samples, num_correct, k):
    subsets = list(itertools.combinations([index < num_correct for index in range(num_samples)], k))
    # Exact integers on both sides: only the last division rounds.
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_refuses_impossible_counts(num_samples, num_correct, k):
    with pytest.raises(ValueError, match=r"pass@k needs 1 <= k"):
        pass_at_k(num_samples, num_correct, k)
