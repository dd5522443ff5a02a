"""What a response becomes for a teacher with another tokenizer: its tokens, and the units of text that both models are compared on.

The student's own bytes are the text. A special token within a response is a wall: the text before it and after it are tokenized apart, it stands in no
unit, and the teacher does not read it. The token that ends the response is the end for both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np

from opd_megatron.align.pieces import BytePieces, EncodedText
from opd_megatron.align.units import coarsen_to_anchors, common_boundaries, common_prefix, released_units
from opd_megatron.align.vocabulary import SharedVocabulary


@dataclass
class UnitCounts:
    """What aligning found, in sums over responses: tokens, bytes, units. `lost_bytes` stand in no unit because the two texts differ from there on."""

    responses: int = 0
    unaligned_responses: int = 0
    student_tokens: int = 0
    teacher_tokens: int = 0
    text_bytes: int = 0
    lost_bytes: int = 0
    units: int = 0
    multi_token_units: int = 0
    one_to_one_tokens: int = 0
    # Tokens of the student whose unit has a loss, and tokens of the longer side of every unit, as the released code measures alignment.
    covered_tokens: int = 0
    longer_tokens: int = 0
    longer_responses: int = 0
    special_tokens: int = 0
    cut_tokens: int = 0
    # Responses that the student ended, and those of them with a row for that.
    ended: int = 0
    ends_compared: int = 0

    def add(self, other: UnitCounts) -> None:
        for name in (entry.name for entry in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class AlignedResponse:
    """The teacher's tokens of one response, and the N units that have a loss, [student start, student stop, teacher start, teacher stop] each."""

    teacher_ids: np.ndarray
    spans_N4: np.ndarray
    has_column_N: np.ndarray
    is_end_N: np.ndarray
    counts: UnitCounts


class _Units(NamedTuple):
    """Stops of consecutive units of one stretch of text, the bytes that both tokenizations write, and whether they agree to the end."""

    student_stops: np.ndarray
    teacher_stops: np.ndarray
    num_common_bytes: int
    agrees: bool


@dataclass(frozen=True, kw_only=True)
class ResponseAligner:
    """Two tokenizers, what they share, and which units count: the options of `AlignmentConfig`.

    `student_ends` are the ids with which the student's responses end; the teacher reads `vocabulary.teacher_eos_id` for any of them.
    """

    student: BytePieces
    teacher: BytePieces
    vocabulary: SharedVocabulary
    student_ends: frozenset[int]
    kind: Literal["strict", "simct", "uld"]
    units: Literal["minimal", "released"] = "minimal"
    tail: Literal["keep", "drop"] = "keep"
    boundaries: Literal["bytes", "decoded_text"] = "bytes"
    oov_unit: Literal["column", "none"] = "column"

    def align(self, responses: Sequence[np.ndarray], finished: Sequence[bool], rooms: Sequence[int]) -> list[AlignedResponse]:
        """Return each response [R] as the teacher reads it, in at most `rooms` tokens; all texts are tokenized in one call."""
        bodies = [ids[: len(ids) - self._ends(ids, done)] for ids, done in zip(responses, finished)]
        stretches = [self._stretches(body) for body in bodies]
        texts = [self.student.join(body[first:stop].tolist()) for body, parts in zip(bodies, stretches) for first, stop in parts]
        encoded = iter(zip(texts, self.teacher.encode_many([text.decode("utf-8", "replace") for text in texts])))
        return [
            self._one(ids, body, [(span, *next(encoded)) for span in parts], room)
            for ids, body, parts, room in zip(responses, bodies, stretches, rooms, strict=True)
        ]

    def _ends(self, ids: np.ndarray, finished: bool) -> bool:
        return bool(finished and len(ids) and int(ids[-1]) in self.student_ends)

    def _stretches(self, body: np.ndarray) -> list[tuple[int, int]]:
        """Return the stretches of text between special tokens, without empty ones."""
        walls = [-1, *np.flatnonzero(self.student.lengths[body] == 0).tolist(), len(body)]
        return [(before + 1, wall) for before, wall in itertools.pairwise(walls) if wall > before + 1]

    def _one(self, ids: np.ndarray, body: np.ndarray, parts: list[tuple[tuple[int, int], bytes, EncodedText]], room: int) -> AlignedResponse:
        counts = UnitCounts(responses=1, student_tokens=len(ids), special_tokens=len(body) - sum(stop - first for (first, stop), _, _ in parts))
        teacher_ids: list[int] = []
        spans: list[np.ndarray] = [np.zeros((0, 4), np.int64)]
        for (first, stop), text, encoded in parts:
            found = self._units(body[first:stop], text, encoded)
            offset = [first, first, len(teacher_ids), len(teacher_ids)]
            spans.append(_between(found) + offset)
            teacher_ids += encoded.ids
            counts.text_bytes += len(text)
            counts.lost_bytes += len(text) - found.num_common_bytes
        spans_N4 = np.concatenate(spans)
        if len(body) < len(ids):
            counts.ended = 1
            # Where the last unit ends; the released aligner folds what is behind it into the end.
            start: tuple[int, int] | None = (len(body), len(teacher_ids))
            if self.units == "released" and parts and parts[-1][0][1] == len(body):
                start = (first + max(found.student_stops, default=0), offset[2] + max(found.teacher_stops, default=0))
                start = start if found.agrees else None
            spans_N4 = self._with_end(spans_N4, ids, teacher_ids, start)
        if self.kind == "uld":
            places = np.arange(min(len(ids), len(teacher_ids)))
            spans_N4 = np.stack([places, places + 1, places, places + 1], 1)
        return self._rows(ids, np.array(teacher_ids, np.int64), spans_N4, room, counts)

    def _units(self, ids: np.ndarray, text: bytes, encoded: EncodedText) -> _Units:
        """Return the units of one stretch of text."""
        teacher_text = self.teacher.text_bytes(encoded)
        num_common = common_prefix(text, teacher_text)
        if self.boundaries == "decoded_text":
            ours, theirs = _decoded(self.student, ids.tolist()), _decoded(self.teacher, encoded.ids)
            stops = _stops_of(released_units(ours, theirs, student_eos=False, teacher_eos=False, tail=self.tail))
            return _Units(*stops, num_common, "".join(ours) == "".join(theirs))
        stops = common_boundaries(self.student.lengths[ids], encoded.lengths, num_common)
        if self.units == "released":
            stops = coarsen_to_anchors(*stops, self.tail)
        return _Units(*stops, num_common, text == teacher_text)

    def _with_end(self, spans_N4: np.ndarray, ids: np.ndarray, teacher_ids: list[int], start: tuple[int, int] | None) -> np.ndarray:
        """Let the teacher read the end of the response, and return the units with one for it from `start` on, unless ends are not compared."""
        end, skipped = self.vocabulary.teacher_eos_id, self.vocabulary.eos == "skip"
        if skipped or end is None:
            return spans_N4
        teacher_ids.append(end)
        known = self.vocabulary.eos == "bridge" or bool(self.vocabulary.is_pair(ids[-1:], np.array([end]))[0])
        if not known or start is None:
            return spans_N4
        return np.concatenate([spans_N4, [[start[0], len(ids), start[1], len(teacher_ids)]]])

    def _rows(self, ids: np.ndarray, teacher_ids: np.ndarray, spans_N4: np.ndarray, room: int, counts: UnitCounts) -> AlignedResponse:
        """Keep the units that the kind compares and the teacher has room for, and count."""
        counts.teacher_tokens, counts.cut_tokens = len(teacher_ids), max(0, len(teacher_ids) - room)
        teacher_ids = teacher_ids[:room]
        spans_N4 = spans_N4[spans_N4[:, 3] <= len(teacher_ids)]
        lengths_N, teacher_lengths_N = spans_N4[:, 1] - spans_N4[:, 0], spans_N4[:, 3] - spans_N4[:, 2]
        single_N = (lengths_N == 1) & (teacher_lengths_N == 1)
        ends_N = single_N & (spans_N4[:, 1] == (len(ids) if counts.ended else -1))
        pair_N = single_N & self.vocabulary.is_pair(ids[spans_N4[:, 0]], teacher_ids[spans_N4[:, 2]])
        counts.units, counts.multi_token_units = len(spans_N4), int((~single_N).sum())
        counts.one_to_one_tokens = int(pair_N.sum())
        counts.longer_tokens, counts.longer_responses = int(np.maximum(lengths_N, teacher_lengths_N).sum()), max(len(ids), len(teacher_ids))
        rows_N = pair_N | (ends_N if self.vocabulary.eos == "bridge" else False) if self.kind == "strict" else np.ones(len(spans_N4), bool)
        has_column_N = ~pair_N & ~ends_N & (~single_N | (self.oov_unit == "column")) if self.kind == "simct" else np.zeros(len(spans_N4), bool)
        counts.covered_tokens = int(lengths_N[rows_N].sum())
        counts.ends_compared = int(counts.ended and (spans_N4[rows_N, 1] == len(ids)).any())
        counts.unaligned_responses = int(not rows_N.any())
        return AlignedResponse(teacher_ids, spans_N4[rows_N], has_column_N[rows_N], ends_N[rows_N], counts)


def _between(units: _Units) -> np.ndarray:
    """Return [N, 4] starts and stops of consecutive units."""
    student, teacher = units.student_stops, units.teacher_stops
    return np.stack([np.concatenate([[0], student])[:-1], student, np.concatenate([[0], teacher])[:-1], teacher], 1)


def _stops_of(units: Sequence[tuple[int, int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(units, np.int64).reshape(-1, 4)
    return table[:, 1], table[:, 3]


def _decoded(pieces: BytePieces, ids: Sequence[int]) -> list[str]:
    """Return what each token decodes to on its own, as the released code has it: parts of a character become U+FFFD."""
    return [pieces.tokenizer.decode([token]) for token in ids]
