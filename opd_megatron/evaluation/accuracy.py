"""Accuracy of a model on held-out prompts, by its own generation and a grader."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from opd_megatron.data.prompts import Prompt
from opd_megatron.evaluation.graders import pass_at_k
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.world import shared_errors
from opd_megatron.rollout.engine import RolloutEngine
from opd_megatron.rollout.rollouts import Rollouts, WriterPrompt, sample_rollouts
from opd_megatron.rollout.sampling import SamplingSettings

NUM_EXAMPLES = 32


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model answered, all samples of a prompt one after another: the samples, their texts, and their marks in [0, 1]."""

    rollouts: Rollouts
    texts: list[str]
    marks: list[float]


def answer(
    sampler: RolloutEngine,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    grader: Callable[[Prompt, str], float],
    settings: SamplingSettings,
    *,
    samples_per_prompt: int,
    key: tuple[int | str, ...],
) -> Answers | None:
    """Return graded answers on rank 0, None elsewhere; every rank calls it. `key` seeds what is sampled.

    A grader that raises on rank 0 raises on every rank: none waits for it.
    """
    numbered = [WriterPrompt(place, prompt.ids) for place, prompt in enumerate(prompts)]
    rollouts = sample_rollouts(sampler, sampler.groups, numbered, settings, samples_per_prompt=samples_per_prompt, key=key, policy_version=0)
    answers = None
    with shared_errors():
        if dist.get_rank() == 0:
            texts = [tokenizer.decode(sample.response_ids, skip_special_tokens=True) for sample in rollouts.samples]
            marks = [grader(prompts[sample.prompt_index], text) for sample, text in zip(rollouts.samples, texts, strict=True)]
            answers = Answers(rollouts=rollouts, texts=texts, marks=marks)
    return answers


def evaluate(
    sampler: RolloutEngine,
    groups: ModelGroups,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    grader: Callable[[Prompt, str], float],
    settings: SamplingSettings,
    *,
    samples_per_prompt: int,
    seed: int,
) -> dict[str, Any] | None:
    """Return accuracy, mean score, pass@k and examples on rank 0, None elsewhere; every rank calls it.

    A response is correct when the grader gives it full marks; `score` also counts partial credit.
    """
    started = time.perf_counter()
    answers = answer(sampler, prompts, tokenizer, grader, settings, samples_per_prompt=samples_per_prompt, key=(seed, "evaluation"))
    if answers is None:
        return None
    rollouts, texts, scores = answers.rollouts, answers.texts, answers.marks
    correct = _correct_per_prompt(rollouts, scores, len(prompts))
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples_per_prompt]
    return {
        "accuracy": sum(correct) / len(scores),
        "score": sum(scores) / len(scores),
        "prompts": len(prompts),
        "samples_per_prompt": samples_per_prompt,
        "temperature": settings.temperature,
        "pass_at_k": {str(k): sum(pass_at_k(samples_per_prompt, count, k) for count in correct) / len(correct) for k in ks},
        "finished_fraction": sum(sample.finished for sample in rollouts.samples) / len(scores),
        "response_tokens_mean": rollouts.num_response_tokens / len(scores),
        "seconds": time.perf_counter() - started,
        "examples": [_example(prompts[i], texts[i * samples_per_prompt], scores[i * samples_per_prompt]) for i in range(min(NUM_EXAMPLES, len(prompts)))],
    }


def _correct_per_prompt(rollouts: Rollouts, scores: Sequence[float], num_prompts: int) -> list[int]:
    correct = [0] * num_prompts
    for sample, score in zip(rollouts.samples, scores, strict=True):
        correct[sample.prompt_index] += score >= 1.0
    return correct


def _example(prompt: Prompt, response: str, score: float) -> dict[str, Any]:
    return {"prompt": prompt.messages[-1]["content"], "response": response, "answer": prompt.answer, "score": score}
