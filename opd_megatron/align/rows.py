"""What a loss over aligned units is given: the rows, one for each unit, and how the two vocabularies lie on one rank of the student's tensor group.

Shapes: N units, T positions of the student, U positions of the teacher, K shared pairs on this rank, W and C this rank's rows of the two heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from opd_megatron.align.vocabulary import SharedVocabulary


@dataclass(frozen=True, kw_only=True)
class UnitRows:
    """N aligned units, one after another: unit n is positions [stops[n - 1], stops[n]) of the student and of the teacher, both at least one.

    `student_ids_T` and `teacher_ids_U` are the tokens that stand there. `has_column_N` marks units that are a column of their own in their row: spans, and
    single tokens that are no shared pair; `is_end_N` those that are the end of a response. The stops are on the host.
    """

    student_stops: torch.Tensor
    teacher_stops: torch.Tensor
    student_ids_T: torch.Tensor
    teacher_ids_U: torch.Tensor
    has_column_N: torch.Tensor
    is_end_N: torch.Tensor

    def __len__(self) -> int:
        return len(self.student_stops)

    @cached_property
    def student_lengths(self) -> torch.Tensor:
        return _lengths(self.student_stops)

    @cached_property
    def teacher_lengths(self) -> torch.Tensor:
        return _lengths(self.teacher_stops)

    @cached_property
    def unit_of_T(self) -> torch.Tensor:
        return _unit_of(self.student_lengths, self.student_ids_T.device)

    @cached_property
    def unit_of_U(self) -> torch.Tensor:
        return _unit_of(self.teacher_lengths, self.teacher_ids_U.device)

    @cached_property
    def student_first_N(self) -> torch.Tensor:
        """The first position of each unit, from whose logits the unit's row is made."""
        return (self.student_stops - self.student_lengths).to(self.student_ids_T.device)

    @cached_property
    def teacher_first_N(self) -> torch.Tensor:
        return (self.teacher_stops - self.teacher_lengths).to(self.teacher_ids_U.device)


def _lengths(stops: torch.Tensor) -> torch.Tensor:
    return torch.diff(stops, prepend=stops.new_zeros(1))


def _unit_of(lengths: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.arange(len(lengths)).repeat_interleave(lengths).to(device)


@dataclass(frozen=True, kw_only=True)
class PairedShard:
    """One rank's part of two vocabularies: the student's columns as Megatron cuts them, and of the teacher's those that are paired with them, then others.

    So both columns of a pair are on one rank, which compares them without a message. The teacher's other rows only count in its normaliser: they are
    spread so that ranks have equally many rows as far as that goes. `teacher_ids_C` are the ids of the teacher's rows on this rank.
    """

    student_columns_K: torch.Tensor
    teacher_ids_C: torch.Tensor
    # For every id of the teacher its row on this rank, or -1.
    teacher_column_V: torch.Tensor
    # Columns on this rank of the ids that end a text, where these are one common column (`eos=bridge`).
    student_eos_E: torch.Tensor
    teacher_eos_E: torch.Tensor
    bridges_eos: bool
    # The place of this rank's first pair among all, and the most rows that any rank has of either head.
    first_pair: int
    most_columns: int
    student_size: int

    @property
    def num_pairs(self) -> int:
        return len(self.student_columns_K)

    def to(self, device: torch.device) -> PairedShard:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return PairedShard(**{**vars(self), **tensors})


def paired_shard(vocabulary: SharedVocabulary, *, rank: int, num_ranks: int, student_columns: int) -> PairedShard:
    """Return the part of one of `num_ranks` ranks, each of which holds `student_columns` rows of the student's padded head."""
    owner_K = vocabulary.student_ids_K // student_columns
    counts = torch.bincount(owner_K, minlength=num_ranks)
    own_K = owner_K == rank
    alone = torch.ones(vocabulary.teacher_size, dtype=torch.bool)
    alone[vocabulary.teacher_ids_K] = False
    level = -(-vocabulary.teacher_size // num_ranks)
    # Rows to fill up to the level. Where one rank has more pairs than that, the others have the less to take.
    room = (level - counts).clamp(min=0).cumsum(0)
    others = alone.nonzero().squeeze(1)[(room[rank - 1] if rank else 0) : room[rank]]
    teacher_ids_C = torch.cat([vocabulary.teacher_ids_K[own_K], others])
    column_V = torch.full((vocabulary.teacher_size,), -1)
    column_V[teacher_ids_C] = torch.arange(len(teacher_ids_C))
    bridges = vocabulary.eos == "bridge"
    student_eos, teacher_eos = (torch.tensor(ids if bridges else (), dtype=torch.long) for ids in (vocabulary.student_eos, vocabulary.teacher_eos))
    return PairedShard(
        student_columns_K=vocabulary.student_ids_K[own_K] - rank * student_columns,
        teacher_ids_C=teacher_ids_C,
        teacher_column_V=column_V,
        student_eos_E=student_eos[student_eos // student_columns == rank] - rank * student_columns,
        teacher_eos_E=column_V[teacher_eos][column_V[teacher_eos] >= 0],
        bridges_eos=bridges,
        first_pair=int(counts[:rank].sum()),
        most_columns=max(level, int(counts.max()), student_columns),
        student_size=vocabulary.student_size,
    )
