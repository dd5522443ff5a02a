"""The rollouts of one optimizer step: every sample on every rank, so that all plans made from them agree. Records and replays of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.data.batches import Sample
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.layout import replica_share
from opd_megatron.rollout.engine import RolloutEngine
from opd_megatron.rollout.sampling import SamplingSettings


@dataclass(frozen=True)
class Rollouts:
    """All samples of a step, in one order on every rank, and the number of updates the policy that wrote them had seen.

    `notes` are what is recorded of the step besides.
    """

    samples: tuple[Sample, ...]
    policy_version: int
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of every sample, prompt and response."""
        return [sample.num_tokens for sample in self.samples]

    def as_teacher_reads(self) -> Rollouts:
        """Return the samples with the teacher's prompts."""
        return replace(self, samples=tuple(sample.as_teacher_reads() for sample in self.samples))

    @property
    def num_scored(self) -> list[int]:
        """Response tokens of every sample."""
        return [sample.num_scored for sample in self.samples]

    @property
    def num_response_tokens(self) -> int:
        return sum(self.num_scored)


@dataclass(frozen=True)
class WriterPrompt:
    """What a sampler is given of a prompt; `teacher_ids`, which the teacher reads instead, only go along."""

    index: int
    ids: Sequence[int]
    teacher_ids: Sequence[int] | None = None


def sample_rollouts(
    sampler: RolloutEngine,
    groups: ModelGroups,
    prompts: Sequence[WriterPrompt],
    settings: SamplingSettings,
    *,
    samples_per_prompt: int,
    key: tuple[int | str, ...],
    policy_version: int,
) -> Rollouts:
    """Return `samples_per_prompt` samples of every prompt: each replica writes its share, then all exchange them.

    The random numbers of a sample depend on `key` and on its place in the batch only: any layout writes the same text.
    """
    wanted = [(place, prompt, sample) for place, prompt in enumerate(prompts) for sample in range(samples_per_prompt)]
    mine = [wanted[index] for index in replica_share(len(wanted), groups.writer, groups.num_writers)]
    responses = sampler.generate([prompt.ids for _, prompt, _ in mine], [(*key, place, sample) for place, _, sample in mine], settings)
    written = [
        Sample(prompt.index, sample, torch.tensor(prompt.ids), response.ids, response.logp, response.finished, _tensor(prompt.teacher_ids))
        for (_, prompt, sample), response in zip(mine, responses, strict=True)
    ]
    gathered: list[list[Sample]] = [[] for _ in range(groups.num_writers)]
    dist.all_gather_object(gathered, written, group=groups.collection.dp_cp)
    return Rollouts(tuple(sample for replica in gathered for sample in replica), policy_version)


def record_rollouts(rollouts: Rollouts, file: Path) -> None:
    """Write one JSON object per sample, whole or not at all; floats keep every bit of their fp32 value."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("w") as stream:
        for sample in rollouts.samples:
            record = {
                "prompt_index": sample.prompt_index,
                "sample_index": sample.sample_index,
                "prompt_ids": sample.prompt_ids.tolist(),
                "response_ids": sample.response_ids.tolist(),
                "sampled_logp": None if sample.sampled_logp is None else sample.sampled_logp.tolist(),
                "finished": sample.finished,
                **({} if sample.teacher_prompt_ids is None else {"teacher_prompt_ids": sample.teacher_prompt_ids.tolist()}),
                "policy_version": rollouts.policy_version,
            }
            stream.write(json.dumps(record) + "\n")
    partial.rename(file)


def replay_rollouts(file: Path) -> Rollouts:
    """Return the rollouts another run recorded; ValueError if the file is missing or not such a record."""
    if not file.is_file():
        raise ValueError(f"{file} is missing: rollout.replay needs a run that was made with rollout.record=true and has this step")
    samples, versions = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            samples.append(_sample_from(record))
            versions.append(int(record["policy_version"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number} is not a recorded rollout: {error!r}") from None
    if not samples:
        raise ValueError(f"{file} is empty; record the run again")
    return Rollouts(tuple(samples), versions[0])


def _sample_from(record: dict[str, Any]) -> Sample:
    """Return a recorded sample; ValueError, KeyError or TypeError if it is none."""
    prompt_ids, response_ids, logp, teacher_ids = record["prompt_ids"], record["response_ids"], record["sampled_logp"], record.get("teacher_prompt_ids")
    if not all(type(token) is int for token in [*prompt_ids, *response_ids, *(teacher_ids or [])]) or not prompt_ids or teacher_ids == []:
        raise ValueError("prompt_ids, response_ids and teacher_prompt_ids must be lists of integers")
    if logp is not None and len(logp) != len(response_ids):
        raise ValueError(f"{len(logp)} log-probabilities for {len(response_ids)} response tokens")
    return Sample(
        int(record["prompt_index"]),
        int(record["sample_index"]),
        torch.tensor(prompt_ids, dtype=torch.long),
        torch.tensor(response_ids, dtype=torch.long),
        None if logp is None else torch.tensor(logp, dtype=torch.float32),
        bool(record["finished"]),
        _tensor(teacher_ids),
    )


def _tensor(ids: Sequence[int] | None) -> torch.Tensor | None:
    return None if ids is None else torch.tensor(ids, dtype=torch.long)
