"""A step's samples -> the micro-batches of one student replica."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from opd_megatron.align.rows import UnitRows
from opd_megatron.data.batch_plan import TrainingPlan
from opd_megatron.data.batches import Sample, TokenBatch, on_device, pack_samples, pad_samples, spans
from opd_megatron.parallel.context import context_rank
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.teacher.teacher import TeacherRows
from opd_megatron.training.objective import MicroBatch


@dataclass(frozen=True, kw_only=True)
class _UnitTokens:
    """The N units of one sample that are on this context rank; `token_T` are their tokens' places among the response tokens of the micro-batch."""

    token_T: torch.Tensor
    student_ids_T: torch.Tensor
    teacher_ids_U: torch.Tensor
    student_length_N: torch.Tensor
    teacher_length_N: torch.Tensor
    has_column_N: torch.Tensor
    is_end_N: torch.Tensor

    @classmethod
    def of(cls, sample: Sample, first: int, own_N: torch.Tensor) -> _UnitTokens:
        """Return the units chosen by `own_N` of a sample whose response tokens count from `first` on."""
        assert sample.units is not None
        assert sample.teacher_response_ids is not None
        student_start_N, student_stop_N, teacher_start_N, teacher_stop_N = (stop_N[own_N] for stop_N in sample.units.places())
        place_T, _ = spans(student_start_N, student_stop_N)
        place_U, _ = spans(teacher_start_N, teacher_stop_N)
        return cls(
            token_T=place_T + first,
            student_ids_T=sample.response_ids[place_T],
            teacher_ids_U=sample.teacher_response_ids[place_U],
            student_length_N=student_stop_N - student_start_N,
            teacher_length_N=teacher_stop_N - teacher_start_N,
            has_column_N=sample.units.has_column_N[own_N],
            is_end_N=sample.units.is_end_N[own_N],
        )


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
                batch = pack_samples(samples, lengths, row_length=plan.row_length, longest=max(plan.lengths))
            else:
                batch = pad_samples(samples, length=plan.row_length, num_rows=plan.num_rows)
            window = batch.context_window(size=self.groups.layout.context, rank=context)
            teacher_hidden_TG = self.teacher.of(chosen) if self.teacher is not None else None
            if self._has_units:
                micro_batch = self._of_units(chosen, batch, window, teacher_hidden_TG)
            else:
                # From places in the micro-batch to places in the step.
                token_T = on_device(self._tokens_of(chosen)[window.token_T], self.device)
                micro_batch = MicroBatch(batch=window.to(self.device), token_T=token_T, teacher_hidden_TG=teacher_hidden_TG)
            yield micro_batch if self.weight_N is None else micro_batch.weighted(self.weight_N[micro_batch.token_T])

    def _of_units(self, chosen: Sequence[int], batch: TokenBatch, window: TokenBatch, teacher_hidden_UG: torch.Tensor | None) -> MicroBatch:
        """Return this context rank's units: those whose first token it holds, with all their positions, wherever these are."""
        size, rank = self.groups.layout.context, self.groups.cell.context
        rows, first = [], 0
        for index in chosen:
            sample = self.rollouts.samples[index]
            assert sample.units is not None, "all samples of a step are aligned"
            start_N = sample.units.student_start_N + len(sample.prompt_ids) - 1
            rows.append(_UnitTokens.of(sample, first, context_rank(start_N, self.plan.lengths[index], size) == rank))
            first += sample.num_scored
        units = UnitRows(
            student_stops=_joined(row.student_length_N for row in rows).cumsum(0),
            teacher_stops=_joined(row.teacher_length_N for row in rows).cumsum(0),
            student_ids_T=on_device(_joined(row.student_ids_T for row in rows), self.device),
            teacher_ids_U=on_device(_joined(row.teacher_ids_U for row in rows), self.device),
            has_column_N=on_device(_joined(row.has_column_N for row in rows).bool(), self.device),
            is_end_N=on_device(_joined(row.is_end_N for row in rows).bool(), self.device),
        )
        scored = batch.scored_only(_joined(row.token_T for row in rows))
        placed = replace(scored, tokens_BS=window.tokens_BS, scored_T=batch.gathered_places(size)[scored.scored_T])
        token_T = on_device(self._tokens_of(chosen)[placed.token_T], self.device)
        return MicroBatch(batch=placed.to(self.device), token_T=token_T, teacher_hidden_TG=teacher_hidden_UG, units=units, num_tokens=len(window.token_T))

    @property
    def _has_units(self) -> bool:
        return any(sample.units is not None for sample in self.rollouts.samples)

    def _tokens_of(self, samples: Sequence[int]) -> torch.Tensor:
        """Return the places in the step of the response tokens of these samples."""
        first = list(itertools.accumulate(self.rollouts.num_scored, initial=0))
        return _joined(torch.arange(first[index], first[index + 1]) for index in samples)


def _joined(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return whole numbers one part after another, of no parts none."""
    return torch.cat([torch.empty(0, dtype=torch.long), *parts])
