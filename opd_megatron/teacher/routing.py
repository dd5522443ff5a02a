"""From the teacher's ranks, which have hidden states, to the student's, which need them.

Each model cuts a step's samples its own way: over its replicas, and within a sequence over its context ranks. Where both cuts meet lies one piece.
Every rank computes the same pieces from the lengths of the samples, which all ranks know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.data.batch_plan import Place, TrainingBatches, plan_scoring
from opd_megatron.data.batches import Sample
from opd_megatron.parallel.context import context_rank
from opd_megatron.parallel.layout import RankGrid
from opd_megatron.parallel.payload import Channel, PayloadPlan, deliver, plan_payload
from opd_megatron.parallel.world import Bridge
from opd_megatron.rollout.rollouts import Rollouts


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive scored rows of one sample that lie on one context rank of the teacher and on one of the student."""

    sample: int
    num_rows: int
    holders: tuple[int, ...]
    needers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Route:
    """One step's pieces and who sends them to whom."""

    pieces: tuple[Piece, ...]
    plan: PayloadPlan


@dataclass(frozen=True, kw_only=True)
class Router:
    """The two grids, in the ranks of the whole job, and what the rows are. Every rank of the job calls `deliver` with what it has."""

    teacher: RankGrid
    student: RankGrid
    teacher_micro_batch: int
    student_batches: TrainingBatches
    width: int
    dtype: torch.dtype
    bridge: Bridge

    def route(self, rollouts: Rollouts) -> Route:
        """Return what travels for these samples."""
        read = rollouts.as_teacher_reads()
        scoring = plan_scoring(read.num_tokens, self.teacher.layout, self.teacher.data_size, self.teacher_micro_batch)
        training = self.student_batches.plan(rollouts.num_tokens)
        pieces = cut_into_pieces(rollouts.samples, self.teacher, scoring.places(), self.student, training.places())
        plan = plan_payload([piece.holders for piece in pieces], [piece.needers for piece in pieces], [piece.num_rows for piece in pieces])
        return Route(pieces=tuple(pieces), plan=plan)

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def deliver(
        self, route: Route, rows: Mapping[int, torch.Tensor], device: torch.device, *, tp_group: dist.ProcessGroup | None = None
    ) -> dict[int, torch.Tensor]:
        """Return {sample: its rows [R, G] in this rank's context window of the student} for the samples that have some there.

        `rows` are {sample: the rows in this rank's context window of the teacher}; `tp_group` is the student's, on its ranks.
        """
        rank, pieces = self.bridge.rank, route.pieces
        held: dict[int, torch.Tensor] = {}
        taken = dict.fromkeys(rows, 0)
        for index, piece in enumerate(pieces):
            # The pieces on this rank follow each other in every sample.
            if piece.sample in rows and rank in piece.holders:
                first = taken[piece.sample]
                held[index] = rows[piece.sample][first : first + piece.num_rows]
                taken[piece.sample] = first + piece.num_rows
        needed = [index for index, piece in enumerate(pieces) if rank in piece.needers]
        parts: dict[int, list[torch.Tensor]] = {}
        channel = Channel(width=self.width, dtype=self.dtype, device=device, group=self.bridge.group, tp_group=tp_group)
        for index, rows_RG in zip(needed, deliver(route.plan, held, needed, channel), strict=True):
            parts.setdefault(pieces[index].sample, []).append(rows_RG)
        return {sample: torch.cat(rows) for sample, rows in parts.items()}


def cut_into_pieces(
    samples: Sequence[Sample], teacher: RankGrid, teacher_places: Sequence[Place], student: RankGrid, student_places: Sequence[Place]
) -> list[Piece]:
    """Return the pieces of all samples, sample after sample, rows in order; a sample without scored rows has one piece of none."""
    pieces = []
    for index, (sample, theirs, ours) in enumerate(zip(samples, teacher_places, student_places, strict=True)):
        # The same token may have another place after the teacher's prompt.
        read = sample.as_teacher_reads()
        response_R = torch.arange(read.num_scored) + len(read.prompt_ids) - 1
        holder_R = context_rank(response_R, theirs.length, teacher.layout.context)
        owners, counts = torch.unique_consecutive(torch.stack([holder_R, _needer(sample, ours, student)], -1), dim=0, return_counts=True)
        for (teacher_context, student_context), num_rows in zip(owners.tolist() or [(0, 0)], counts.tolist() or [0], strict=True):
            holders = teacher.last_stage_ranks(theirs.replica, teacher_context)
            needers = student.last_stage_ranks(ours.replica, student_context) if student_context >= 0 else ()
            pieces.append(Piece(sample=index, num_rows=num_rows, holders=tuple(holders), needers=tuple(needers)))
    return pieces


def _needer(sample: Sample, place: Place, student: RankGrid) -> torch.Tensor:
    """Return the student's context rank [R] that needs each of the teacher's rows, -1 for none: that of the token, or of its unit's first token."""
    first, size = len(sample.prompt_ids) - 1, student.layout.context
    if sample.units is None:
        return context_rank(torch.arange(sample.num_scored) + first, place.length, size)
    unit_R = sample.units.of_teacher(sample.as_teacher_reads().num_scored)
    owner_N = context_rank(sample.units.student_start_N + first, place.length, size)
    return torch.cat([owner_N, owner_N.new_full((1,), -1)])[unit_R]
