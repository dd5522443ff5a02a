"""A step's samples -> the micro-batches of one student replica."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from opd_megatron.data.batch_plan import TrainingPlan
from opd_megatron.data.batches import pack_samples, pad_samples
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.teacher.teacher import TeacherRows
from opd_megatron.training.objective import MicroBatch


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """This replica's micro-batches, as this context rank sees them; each is made when it is its turn, so that teacher rows are copied for one at a time.

    `teacher` has the scored rows of every sample of the replica on the last stage; it is None on the others and without a teacher.
    """

    rollouts: Rollouts
    plan: TrainingPlan
    groups: ModelGroups
    teacher: TeacherRows | None
    device: torch.device
    # Of every response token of the step, samples in order; what weighs 0 is left out. None: all weigh 1.
    weight_N: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.plan.micro_batches[self.groups.data_rank])

    def __iter__(self) -> Iterator[MicroBatch]:
        context, plan = self.groups.cell.context, self.plan
        for chosen in plan.micro_batches[self.groups.data_rank]:
            samples = [self.rollouts.samples[index] for index in chosen]
            if plan.packed:
                lengths = [plan.lengths[index] for index in chosen]
                batch = pack_samples(samples, lengths, row_length=plan.row_length, longest=max(plan.lengths), device=self.device)
            else:
                batch = pad_samples(samples, length=plan.row_length, num_rows=plan.num_rows, device=self.device)
            batch = batch.context_window(size=self.groups.layout.context, rank=context)
            # From places in the micro-batch to places in the step.
            token_T = self._tokens_of(chosen)[batch.token_T]
            micro_batch = MicroBatch(batch=batch, token_T=token_T, teacher_hidden_TG=self.teacher.of(chosen) if self.teacher is not None else None)
            yield micro_batch if self.weight_N is None else micro_batch.weighted(self.weight_N[token_T])

    def _tokens_of(self, samples: Sequence[int]) -> torch.Tensor:
        """Return the places in the step of the response tokens of these samples."""
        first = list(itertools.accumulate(self.rollouts.num_scored, initial=0))
        spans = [torch.arange(first[index], first[index + 1]) for index in samples]
        return torch.cat([torch.empty(0, dtype=torch.long), *spans]).to(self.device)
