"""From the teacher's ranks, which have hidden states, to the student's, which need them.

Each model cuts a step's samples its own way: over its replicas, and within a sequence over its context ranks. Where both cuts meet lies one piece.
Every rank computes the same pieces from the lengths of the samples, which all ranks know.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist

from opd_megatron.data.batch_plan import BatchPlan, Place, TrainingBatches, plan_scoring
from opd_megatron.data.batches import Sample
from opd_megatron.parallel.context import context_rank
from opd_megatron.parallel.delivery import Channel, Delivery
from opd_megatron.parallel.layout import RankGrid
from opd_megatron.parallel.payload import PayloadPlan, plan_payload
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
    """The pieces that travel in one round, and who sends them to whom."""

    pieces: tuple[Piece, ...]
    plan: PayloadPlan


def plan_routes(
    samples: Sequence[Sample], teacher: RankGrid, scoring: BatchPlan, student: RankGrid, training: BatchPlan, num_rounds: int = 1
) -> tuple[Route, ...]:
    """Return what travels in each round of one step: the samples that the teacher scores in it, `BatchPlan.rounds`."""
    pieces = cut_into_pieces(samples, teacher, scoring.places(), student, training.places())
    round_of = {
        index: number
        for number, of_replicas in enumerate(scoring.rounds(num_rounds))
        for micro_batches in of_replicas
        for micro_batch in micro_batches
        for index in micro_batch
    }
    by_round: list[list[Piece]] = [[] for _ in scoring.rounds(num_rounds)]
    for piece in pieces:
        by_round[round_of[piece.sample]].append(piece)
    # A round is one step: with more, a rank that ends no round before it has scored all would send those that follow later than its receivers wait for them,
    # and NCCL pairs messages by their order.
    bounds = {} if len(by_round) == 1 else {"max_rows": sys.maxsize}
    return tuple(_route(of_round, **bounds) for of_round in by_round)


def _route(pieces: Sequence[Piece], **bounds: int) -> Route:
    plan = plan_payload([piece.holders for piece in pieces], [piece.needers for piece in pieces], [piece.num_rows for piece in pieces], **bounds)
    return Route(pieces=tuple(pieces), plan=plan)


@dataclass(frozen=True, kw_only=True)
class Router:
    """The two grids, in the ranks of the whole job, and what the rows are. Every rank of the job makes a `Courier` of it for every batch."""

    teacher: RankGrid
    student: RankGrid
    teacher_micro_batch: int
    student_batches: TrainingBatches
    num_rounds: int
    width: int
    dtype: torch.dtype
    bridge: Bridge

    def routes(self, rollouts: Rollouts) -> tuple[Route, ...]:
        """Return what travels for these samples, round by round."""
        read = rollouts.as_teacher_reads()
        scoring = plan_scoring(read.num_tokens, self.teacher.layout, self.teacher.data_size, self.teacher_micro_batch)
        return plan_routes(rollouts.samples, self.teacher, scoring, self.student, self.student_batches.plan(rollouts.num_tokens), self.num_rounds)

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


class Courier:
    """One rank's end of the way of one batch: `send` lets what it scored in a round leave, `finish` returns what it needs. Every rank sends once a round.

    No rank waits for ever. All of them take the rounds in one order: a rank of the student computes what it has of round k of the teacher, ends round k - 1,
    begins round k. To end round k - 1 it needs what others began after their part of round k - 1, and gathers where they end it as well: never what comes
    later. So the ranks that are furthest behind can always go on. A rank that holds the teacher alone ends nothing before it has scored everything: a student
    that still trains on the batch before must not stop it.
    """

    def __init__(self, router: Router, routes: Sequence[Route], device: torch.device, *, tp_group: dist.ProcessGroup | None = None) -> None:
        """`tp_group` is the student's, on its ranks."""
        self._rank = router.bridge.rank
        self._receives = self._rank in router.student.ranks
        # In one round nothing is computed beside it.
        stream = _side_stream(device) if device.type == "cuda" and len(routes) > 1 else None
        self._channel = Channel(width=router.width, dtype=router.dtype, device=device, group=router.bridge.group, tp_group=tp_group, stream=stream)
        self._routes = deque(enumerate(routes))
        self._under_way: deque[tuple[list[int], Delivery]] = deque()
        self._arrived: dict[int, torch.Tensor] = {}

    def send(self, rows: Mapping[int, torch.Tensor]) -> None:
        """Begin the next round: {sample: the rows [R, G] in this rank's context window of the teacher}."""
        if self._receives:
            self._end_rounds()
        number, route = self._routes.popleft()
        held: dict[int, torch.Tensor] = {}
        taken = dict.fromkeys(rows, 0)
        for index, piece in enumerate(route.pieces):
            # The pieces on this rank follow each other in every sample.
            if piece.sample in rows and self._rank in piece.holders:
                first = taken[piece.sample]
                held[index] = rows[piece.sample][first : first + piece.num_rows]
                taken[piece.sample] = first + piece.num_rows
        needed = [index for index, piece in enumerate(route.pieces) if self._rank in piece.needers]
        delivery = Delivery(route.plan, held, needed, self._channel, tag=number)
        self._under_way.append(([route.pieces[index].sample for index in needed], delivery))

    def finish(self) -> dict[int, torch.Tensor]:
        """Return {sample: its rows [R, G] in this rank's context window of the student} for the samples that have some there."""
        # A rank that scores nothing has sent nothing.
        while self._routes:
            self.send({})
        self._end_rounds()
        self._channel.hand_over(list(self._arrived.values()))
        return self._arrived

    def _end_rounds(self) -> None:
        """Wait for the rounds that are under way, and join their rows by sample."""
        while self._under_way:
            samples, delivery = self._under_way.popleft()
            parts: dict[int, list[torch.Tensor]] = {}
            for sample, rows_RG in zip(samples, delivery.arrive(), strict=True):
                parts.setdefault(sample, []).append(rows_RG)
            with self._channel.beside():
                self._arrived.update({sample: torch.cat(rows) for sample, rows in parts.items()})


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of this process for deliveries: memory that was allocated on a stream is used again on it alone."""
    return torch.cuda.Stream(device)


def cut_into_pieces(
    samples: Sequence[Sample], teacher: RankGrid, teacher_places: Sequence[Place], student: RankGrid, student_places: Sequence[Place]
) -> list[Piece]:
    """Return the pieces of all samples, sample after sample, rows in order; a sample without scored rows has one piece of none."""
    pieces = []
    for index, (sample, theirs, ours) in enumerate(zip(samples, teacher_places, student_places, strict=True)):
        for (teacher_context, student_context), num_rows in _owners(sample, theirs.length, teacher.layout.context, ours, student):
            holders = teacher.last_stage_ranks(theirs.replica, teacher_context)
            needers = student.last_stage_ranks(ours.replica, student_context) if student_context >= 0 else ()
            pieces.append(Piece(sample=index, num_rows=num_rows, holders=tuple(holders), needers=tuple(needers)))
    return pieces


def _owners(sample: Sample, length: int, size: int, ours: Place, student: RankGrid) -> list[tuple[tuple[int, int], int]]:
    """Return the context ranks (teacher's, student's) that consecutive rows of a sample lie on, and how many rows; the teacher pads it to `length`."""
    # The same token may have another place after the teacher's prompt.
    read = sample.as_teacher_reads()
    if read.num_scored == 0 or (sample.units is None and size == student.layout.context == 1):
        # Nothing is cut: a step of a large batch has thousands of these.
        return [((0, 0), read.num_scored)]
    holder_R = context_rank(torch.arange(read.num_scored) + len(read.prompt_ids) - 1, length, size)
    owners, counts = torch.unique_consecutive(torch.stack([holder_R, _needer(sample, ours, student)], -1), dim=0, return_counts=True)
    return [((holder, needer), count) for (holder, needer), count in zip(owners.tolist(), counts.tolist(), strict=True)]


def _needer(sample: Sample, place: Place, student: RankGrid) -> torch.Tensor:
    """Return the student's context rank [R] that needs each of the teacher's rows, -1 for none: that of the token, or of its unit's first token."""
    first, size = len(sample.prompt_ids) - 1, student.layout.context
    if sample.units is None:
        return context_rank(torch.arange(sample.num_scored) + first, place.length, size)
    unit_R = sample.units.of_teacher(sample.as_teacher_reads().num_scored)
    owner_N = context_rank(sample.units.student_start_N + first, place.length, size)
    return torch.cat([owner_N, owner_N.new_full((1,), -1)])[unit_R]
