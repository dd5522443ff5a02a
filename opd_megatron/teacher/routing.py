"""Which rows of which sample the teacher's ranks have, and which the student's ranks need.

Each model cuts a step's samples its own way: over its replicas, and within a sequence over its context ranks. Where both cuts meet lies one piece.
Every rank computes the same pieces from the lengths of the samples, which all ranks know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opd_megatron.data.batches import Sample
from opd_megatron.parallel.context import context_rank
from opd_megatron.parallel.layout import RankGrid


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one model has a sample: in which replica, padded to which length."""

    replica: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive scored rows of one sample that lie on one context rank of the teacher and on one of the student."""

    sample: int
    num_rows: int
    holders: tuple[int, ...]
    needers: tuple[int, ...]


def cut_into_pieces(
    samples: Sequence[Sample], teacher: RankGrid, teacher_places: Sequence[Place], student: RankGrid, student_places: Sequence[Place]
) -> list[Piece]:
    """Return the pieces of all samples, sample after sample, rows in order; a sample without scored rows has one piece of none."""
    pieces = []
    for index, (sample, theirs, ours) in enumerate(zip(samples, teacher_places, student_places, strict=True)):
        position_R = torch.arange(sample.num_scored) + len(sample.prompt_ids) - 1
        owner_R2 = torch.stack(
            [context_rank(position_R, theirs.length, teacher.layout.context), context_rank(position_R, ours.length, student.layout.context)], dim=-1
        )
        owners, counts = torch.unique_consecutive(owner_R2, dim=0, return_counts=True)
        for (teacher_context, student_context), num_rows in zip(owners.tolist() or [(0, 0)], counts.tolist() or [0], strict=True):
            pieces.append(
                Piece(
                    sample=index,
                    num_rows=num_rows,
                    holders=tuple(teacher.last_stage_ranks(theirs.replica, teacher_context)),
                    needers=tuple(student.last_stage_ranks(ours.replica, student_context)),
                )
            )
    return pieces
