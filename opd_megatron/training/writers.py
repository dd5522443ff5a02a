"""Who writes a step's samples: the student, a record of another run, or the reference answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.config import RunConfig
from opd_megatron.data.batches import Sample
from opd_megatron.data.prompts import Prompt, response_ids
from opd_megatron.parallel.world import shared_errors
from opd_megatron.reporting.run_directory import RunDirectory
from opd_megatron.rollout.engine import RolloutEngine
from opd_megatron.rollout.rollouts import Rollouts, WriterPrompt, record_rollouts, replay_rollouts, sample_rollouts
from opd_megatron.rollout.sampling import SamplingSettings

# (step, its prompts, updates that the weights have seen) -> its samples, the same on every rank; every rank calls it.
Writer = Callable[[int, list[Prompt], int], Rollouts]


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """The student's current weights write; `record_to` keeps what they wrote."""

    sampler: RolloutEngine
    settings: SamplingSettings
    samples_per_prompt: int
    seed: int
    record_to: Path | None

    def __call__(self, step: int, prompts: list[Prompt], policy_version: int) -> Rollouts:
        rollouts = sample_rollouts(
            self.sampler,
            self.sampler.groups,
            [WriterPrompt(prompt.index, prompt.ids, prompt.teacher_ids) for prompt in prompts],
            self.settings,
            samples_per_prompt=self.samples_per_prompt,
            key=(self.seed, step),
            policy_version=policy_version,
        )
        if self.record_to is not None and dist.get_rank() == 0:
            record_rollouts(rollouts, RunDirectory(self.record_to).rollout_file(step))
        return rollouts


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What another run recorded: the way to compare layouts, debug and bisect."""

    run: Path
    num_sequences: int
    vocab_size: int
    privileged: bool
    # With another tokenizer the teacher reads this run's prompts, not those of the record: other tokenizers made other ids of them.
    same_tokenizer: bool

    def __call__(self, step: int, prompts: list[Prompt], policy_version: int) -> Rollouts:
        with shared_errors():
            rollouts = replay_rollouts(RunDirectory(self.run).rollout_file(step))
            if len(rollouts.samples) != self.num_sequences:
                raise ValueError(f"{self.run} recorded {len(rollouts.samples)} samples for step {step}, this run takes {self.num_sequences}")
            if not self.same_tokenizer:
                rollouts = replace(rollouts, samples=tuple(self._as_this_teacher_reads(sample, prompts, step) for sample in rollouts.samples))
            elif {sample.teacher_prompt_ids is not None for sample in rollouts.samples} != {self.privileged}:
                raise ValueError(f"{self.run} was recorded {'without' if self.privileged else 'with'} privileged.template; replay it as it was recorded")
            read = [ids for sample in rollouts.samples for ids in (sample.prompt_ids, sample.response_ids)]
            if self.same_tokenizer:
                read += [sample.teacher_prompt_ids for sample in rollouts.samples if sample.teacher_prompt_ids is not None]
            largest = int(torch.cat(read).max())
            if largest >= self.vocab_size:
                raise ValueError(
                    f"{self.run} recorded token {largest} in step {step}, and the vocabulary has {self.vocab_size}; replay a run with this tokenizer"
                )
        return rollouts

    def _as_this_teacher_reads(self, sample: Sample, prompts: list[Prompt], step: int) -> Sample:
        """Return the sample with what this run's teacher reads before the response."""
        for prompt in prompts:
            if prompt.index == sample.prompt_index and prompt.teacher_ids is not None:
                return replace(sample, teacher_prompt_ids=torch.tensor(prompt.teacher_ids))
        raise ValueError(f"{self.run} recorded prompt {sample.prompt_index} in step {step}, which this run does not ask then; replay with its data and seed")


@dataclass(frozen=True, kw_only=True)
class ReferenceAnswers:
    """The data's own answers, for supervised fine-tuning."""

    tokenizer: Any

    def __call__(self, step: int, prompts: list[Prompt], policy_version: int) -> Rollouts:
        samples = [Sample(prompt.index, 0, torch.tensor(prompt.ids), torch.tensor(response_ids(prompt, self.tokenizer)), None, True) for prompt in prompts]
        return Rollouts(tuple(samples), policy_version)


def make_writer(config: RunConfig, run_dir: Path, sampler: RolloutEngine, tokenizer: Any) -> Writer:
    """Return what the configuration asks for."""
    rollout = config.rollout
    if config.training.objective == "sft":
        return ReferenceAnswers(tokenizer=tokenizer)
    if rollout.replay:
        return Replayed(
            run=Path(rollout.replay),
            num_sequences=config.num_sequences,
            vocab_size=sampler.vocab_size,
            privileged=config.privileged.template is not None,
            same_tokenizer=config.alignment.is_identity,
        )
    return OnPolicy(
        sampler=sampler,
        settings=SamplingSettings(max_response_tokens=rollout.max_response_tokens, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k),
        samples_per_prompt=rollout.samples_per_prompt,
        seed=config.seed,
        record_to=run_dir if rollout.record else None,
    )
