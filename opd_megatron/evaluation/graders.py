"""Is a response right? Graders by data source, and pass@k. Nothing here knows a model."""

from __future__ import annotations

import importlib.util
import logging
import math
import threading
from collections.abc import Callable, Iterable

from opd_megatron.config import DataConfig
from opd_megatron.data.prompts import Prompt
from opd_megatron.data.reasoning_tasks import is_reasoning_task, open_reasoning_task

logger = logging.getLogger(__name__)

Grader = Callable[[Prompt, str], float]

_MATH_SECONDS = 3


def make_grader(data: DataConfig) -> Grader:
    """Return the grader of `data.grader`: (prompt, response text) -> score in [0, 1], 1 for right.

    `auto` is the task's own grader for reasoning_gym: sources, which may give part of a point for part of an answer (only exactly 1 is
    right); otherwise math_verify if it is installed, else exact. A `<think>...</think>` prefix is not graded. A response that makes a
    grader fail scores 0, and the first such failure is logged. ValueError if the grader does not fit the source or is not installed; the
    returned function raises it for a prompt without a reference answer.
    """
    kind = _kind(data)
    if kind == "exact" and data.grader == "auto":
        logger.warning("math-verify is not installed: answers must match exactly, so 1/2 and 0.5 differ; pip install opd-megatron[demo]")
    if kind == "reasoning_gym":
        return _guarded(_reasoning_score(data), data)
    if kind == "math_verify" and not _has_math_verify():
        raise ValueError("data.grader=math_verify needs math-verify: pip install opd-megatron[demo], or use data.grader=exact")
    return _guarded(_math_score if kind == "math_verify" else _exact_score, data)


def check_gradable(prompts: Iterable[Prompt], data: DataConfig, way_out: str = "set data.answer_key", key: str = "data.prompts") -> None:
    """Raise ValueError for the first prompt without what its grader needs, with the key that named the source: the time to learn it is before training."""
    by_entry = _kind(data) == "reasoning_gym"
    for prompt in prompts:
        if (prompt.entry if by_entry else prompt.answer) is None:
            raise ValueError(
                f"prompt {prompt.index} of {key}={data.prompts!r} has no reference answer under data.answer_key={data.answer_key!r}, so it cannot be "
                f"graded; {way_out}"
            )


def _kind(data: DataConfig) -> str:
    """Return the grader that `auto` stands for, or the one that is named."""
    if data.grader != "auto":
        return data.grader
    return "reasoning_gym" if is_reasoning_task(data.prompts) else "math_verify" if _has_math_verify() else "exact"


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the probability that k of the samples, drawn without replacement, contain a correct one.

    Averaged over prompts it is the unbiased estimator of pass@k (Chen et al. 2021, arXiv 2107.03374, section 2.1).
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"pass@k needs 1 <= k={k} <= num_samples={num_samples} and 0 <= num_correct={num_correct} <= num_samples; take more samples or a smaller k"
        )
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def strip_thinking(response: str) -> str:
    """Return what follows the last `</think>`, without surrounding whitespace; nothing if thinking was cut off.

    Some chat templates write the opening tag into the prompt, so a closing one alone counts.
    """
    _, closing_tag, reply = response.rpartition("</think>")
    if not closing_tag and reply.lstrip().startswith("<think>"):
        return ""
    return reply.strip()


def _reasoning_score(data: DataConfig) -> Grader:
    if not is_reasoning_task(data.prompts):
        raise ValueError(f"data.grader=reasoning_gym grades only reasoning_gym: sources, and data.prompts={data.prompts!r}; use auto, math_verify or exact")
    task = open_reasoning_task(data)

    def score(prompt: Prompt, response: str) -> float:
        points = float(task.score_answer(response, prompt.entry))
        # Some tasks add up 1/n per matching character, and for a wrong answer the sum can round to just above 1.
        return points if points <= 1 else math.nextafter(1, 0)

    return score


def _exact_score(prompt: Prompt, response: str) -> float:
    assert prompt.answer is not None
    return float(response == prompt.answer.strip())


def _math_score(prompt: Prompt, response: str) -> float:
    """Return 1 for an equal text or an equal mathematical value.

    math_verify limits its time with SIGALRM, which only the main thread may use; another thread computes without a limit.
    """
    if _exact_score(prompt, response) == 1:
        return 1.0
    assert prompt.answer is not None
    from math_verify import parse, verify

    seconds = _MATH_SECONDS if threading.current_thread() is threading.main_thread() else None
    gold = parse(_math_reference(prompt.answer), parsing_timeout=seconds)
    return float(verify(gold, parse(response, parsing_timeout=seconds), timeout_seconds=seconds))


def _math_reference(answer: str) -> str:
    """Return the answer in a form whose whole is parsed: GSM8K's final line, and bare answers boxed, since `x+1` is not seen as math."""
    final = answer.rpartition("####")[2].strip()
    return final if "$" in final or "\\boxed" in final else f"\\boxed{{{final}}}"


def _guarded(score: Grader, data: DataConfig) -> Grader:
    """Return the grader fed with the stripped response, its scores kept in [0, 1], its failures counted as 0."""
    failed = False

    def grade(prompt: Prompt, response: str) -> float:
        """Return the score in [0, 1] of what follows the response's thinking; ValueError for a prompt without a reference answer."""
        nonlocal failed
        check_gradable([prompt], data)
        try:
            return min(1.0, max(0.0, score(prompt, strip_thinking(response))))
        except Exception as error:
            # The response is a model's free text and the graders are foreign code: no text may end a run.
            if not failed:
                logger.warning("grading prompt %d failed and counts 0, as further failures will: %r", prompt.index, error)
            failed = True
            return 0.0

    return grade


def _has_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None
