"""What a response becomes for a teacher with another tokenizer: its tokens, and the units of text that both models are compared on.

The student's own bytes are the text. A special token within a response is a wall: the text before it and after it are tokenized apart, it stands in no
unit, and the teacher does not read it. The token that ends the response is the end for both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

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

    def __add__(self, other: UnitCounts) -> UnitCounts:
        return UnitCounts(**{entry.name: getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)})


@dataclass(frozen=True)
class AlignedResponses:
    """The teacher's tokens of B responses, one response after another, and the N units that have a loss.

    `spans_N4` are [student start, student stop, teacher start, teacher stop] within the response; `num_teacher_tokens_B` and `num_units_B` say what is whose.
    """

    teacher_ids: np.ndarray
    num_teacher_tokens_B: np.ndarray
    spans_N4: np.ndarray
    has_column_N: np.ndarray
    is_end_N: np.ndarray
    num_units_B: np.ndarray
    counts: UnitCounts


@dataclass(frozen=True)
class _Stretch:
    """Text of one response between special tokens: tokens [first, stop), its bytes, the teacher's tokens of it, and how many of its tokens come before."""

    response: int
    first: int
    stop: int
    text: bytes
    encoded: EncodedText
    teacher_first: int
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

    def align(self, responses: Sequence[np.ndarray], finished: Sequence[bool], rooms: Sequence[int]) -> AlignedResponses:
        """Return each response [R] as the teacher reads it, in at most `rooms` tokens. All texts are tokenized in one call; most arrays are of all units."""
        ended = [bool(done and len(ids) and int(ids[-1]) in self.student_ends) for ids, done in zip(responses, finished, strict=True)]
        stretches = self._stretches(responses, ended)
        counts = UnitCounts(responses=len(responses), student_tokens=sum(map(len, responses)), ended=sum(ended))
        counts.special_tokens = counts.student_tokens - counts.ended - sum(part.stop - part.first for part in stretches)
        counts.text_bytes = sum(len(part.text) for part in stretches)
        teacher_ids: list[list[int]] = [[] for _ in responses]
        for part in stretches:
            teacher_ids[part.response] += part.encoded.ids
        response_N, spans_N4 = self._units(responses, stretches, counts)
        if self.vocabulary.eos != "skip" and self.vocabulary.teacher_eos_id is not None:
            response_N, spans_N4 = self._with_ends(responses, ended, stretches, teacher_ids, response_N, spans_N4)
        if self.kind == "uld":
            shorter = [min(len(ids), len(theirs)) for ids, theirs in zip(responses, teacher_ids)]
            places = np.concatenate([np.arange(0), *map(np.arange, shorter)])
            response_N, spans_N4 = np.repeat(np.arange(len(responses)), shorter), np.stack([places, places + 1, places, places + 1], 1)
        return self._rows(responses, ended, teacher_ids, np.asarray(rooms, np.int64), response_N, spans_N4, counts)

    def _stretches(self, responses: Sequence[np.ndarray], ended: Sequence[bool]) -> list[_Stretch]:
        """Return the text between special tokens, without empty stretches, and what the teacher makes of it."""
        spans = []
        for response, (ids, end) in enumerate(zip(responses, ended)):
            body = ids[: len(ids) - end]
            walls = [-1, *np.flatnonzero(self.student.lengths[body] == 0).tolist(), len(body)]
            spans += [(response, before + 1, wall) for before, wall in itertools.pairwise(walls) if wall > before + 1]
        texts = [self.student.join(responses[response][first:stop].tolist()) for response, first, stop in spans]
        stretches, read = [], [0] * len(responses)
        for (response, first, stop), text, encoded in zip(spans, texts, self.teacher.encode_many([text.decode("utf-8", "replace") for text in texts])):
            agrees = self.teacher.text_bytes(encoded) == text
            stretches.append(_Stretch(response, first, stop, text, encoded, read[response], agrees))
            read[response] += len(encoded.ids)
        return stretches

    def _units(self, responses: Sequence[np.ndarray], stretches: Sequence[_Stretch], counts: UnitCounts) -> tuple[np.ndarray, np.ndarray]:
        """Return the units of all stretches, in their order, and the response of each."""
        together = [part for part in stretches if part.agrees and self.units == "minimal"]
        found = [_pooled_units([self.student.lengths[responses[part.response][part.first : part.stop]] for part in together], together)]
        for part in stretches:
            if not (part.agrees and self.units == "minimal"):
                student_stops, teacher_stops, num_common = self._units_of(responses[part.response][part.first : part.stop], part)
                counts.lost_bytes += len(part.text) - num_common
                starts = [np.concatenate([[0], stops[:-1]]) if len(stops) else stops for stops in (student_stops, teacher_stops)]
                spans_N4 = np.stack([starts[0], student_stops, starts[1], teacher_stops], 1)
                offset = [part.first, part.first, part.teacher_first, part.teacher_first]
                found.append((np.full(len(spans_N4), part.response), spans_N4 + offset))
        return _in_order(*(np.concatenate(arrays) for arrays in zip(*found)))

    def _units_of(self, ids: np.ndarray, part: _Stretch) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the stops of one stretch's units in both models' tokens, and the bytes that both write."""
        num_common = common_prefix(part.text, self.teacher.text_bytes(part.encoded))
        if self.boundaries == "decoded_text":
            units = released_units(_decoded(self.student, ids.tolist()), _decoded(self.teacher, part.encoded.ids), **_NO_ENDS, tail=self.tail)
            table = np.array(units, np.int64).reshape(-1, 4)
            return table[:, 1], table[:, 3], num_common
        stops = common_boundaries(self.student.lengths[ids], part.encoded.lengths, num_common)
        if self.units == "released":
            stops = coarsen_to_anchors(*stops, self.tail)
        return *stops, num_common

    def _with_ends(
        self,
        responses: Sequence[np.ndarray],
        ended: Sequence[bool],
        stretches: Sequence[_Stretch],
        teacher_ids: list[list[int]],
        response_N: np.ndarray,
        spans_N4: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Let the teacher read the ends of responses, and return the units with those of ends that are compared."""
        end_id = self.vocabulary.teacher_eos_id
        last = {part.response: part for part in stretches}
        where, ends = [], []
        for response in np.flatnonzero(ended).tolist():
            ids, theirs = responses[response], teacher_ids[response]
            theirs.append(int(end_id or 0))
            start: tuple[int, int] | None = (len(ids) - 1, len(theirs) - 1)
            part = last.get(response)
            if self.units == "released" and part is not None and part.stop == len(ids) - 1:
                start = self._open_tail(ids, part, spans_N4[response_N == response])
            if start is not None and (self.vocabulary.eos == "bridge" or self.vocabulary.is_pair(ids[-1:], theirs[-1:])[0]):
                where.append(response)
                ends.append((start[0], len(ids), start[1], len(theirs)))
        if not ends:
            return response_N, spans_N4
        return _in_order(np.concatenate([response_N, where]), np.concatenate([spans_N4, ends]))

    def _open_tail(self, ids: np.ndarray, part: _Stretch, spans_N4: np.ndarray) -> tuple[int, int] | None:
        """Return from where on the released aligner folds text into the end, after the last unit of the last stretch; None where it has lost its way."""
        if self.boundaries == "decoded_text":
            agrees = "".join(_decoded(self.student, ids[part.first : part.stop].tolist())) == "".join(_decoded(self.teacher, part.encoded.ids))
        else:
            agrees = part.agrees
        if not agrees:
            return None
        within = spans_N4[spans_N4[:, 0] >= part.first]
        return (int(within[-1, 1]), int(within[-1, 3])) if len(within) else (part.first, part.teacher_first)

    def _rows(
        self,
        responses: Sequence[np.ndarray],
        ended: Sequence[bool],
        teacher_ids: Sequence[Sequence[int]],
        rooms_B: np.ndarray,
        response_N: np.ndarray,
        spans_N4: np.ndarray,
        counts: UnitCounts,
    ) -> AlignedResponses:
        """Keep the units that the kind compares and the teacher has room for, and count."""
        num_read_B, num_written_B = np.array(list(map(len, teacher_ids)), np.int64), np.array(list(map(len, responses)), np.int64)
        num_kept_B = np.minimum(num_read_B, np.maximum(rooms_B, 0))
        fits_N = spans_N4[:, 3] <= num_kept_B[response_N]
        response_N, spans_N4 = response_N[fits_N], spans_N4[fits_N]
        lengths_N, teacher_lengths_N = spans_N4[:, 1] - spans_N4[:, 0], spans_N4[:, 3] - spans_N4[:, 2]
        single_N = (lengths_N == 1) & (teacher_lengths_N == 1)
        at_end_N = np.asarray(ended, bool)[response_N] & (spans_N4[:, 1] == num_written_B[response_N])
        read = np.fromiter(itertools.chain.from_iterable(teacher_ids), np.int64, int(num_read_B.sum()))
        written = np.concatenate([np.zeros(0, np.int64), *responses])
        places_N = (num_written_B.cumsum() - num_written_B)[response_N] + spans_N4[:, 0]
        their_places_N = (num_read_B.cumsum() - num_read_B)[response_N] + spans_N4[:, 2]
        pair_N = single_N & self.vocabulary.is_pair(written[places_N], read[their_places_N])
        is_end_N = at_end_N & single_N
        counts.teacher_tokens, counts.cut_tokens = int(num_read_B.sum()), int((num_read_B - num_kept_B).sum())
        counts.units, counts.multi_token_units, counts.one_to_one_tokens = len(spans_N4), int((~single_N).sum()), int(pair_N.sum())
        counts.longer_tokens = int(np.maximum(lengths_N, teacher_lengths_N).sum())
        counts.longer_responses = int(np.maximum(num_written_B, num_read_B).sum())
        rows_N = np.ones(len(spans_N4), bool)
        if self.kind == "strict":
            rows_N = pair_N | (is_end_N if self.vocabulary.eos == "bridge" else False)
        has_column_N = np.zeros(len(spans_N4), bool)
        if self.kind == "simct":
            has_column_N = ~pair_N & ~is_end_N & (~single_N | (self.oov_unit == "column"))
        num_units_B = np.bincount(response_N[rows_N], minlength=len(responses))
        counts.covered_tokens, counts.ends_compared = int(lengths_N[rows_N].sum()), int(at_end_N[rows_N].sum())
        counts.unaligned_responses = int((num_units_B == 0).sum())
        kept_tokens = np.arange(len(read)) - np.repeat(num_read_B.cumsum() - num_read_B, num_read_B) < np.repeat(num_kept_B, num_read_B)
        return AlignedResponses(read[kept_tokens], num_kept_B, spans_N4[rows_N], has_column_N[rows_N], is_end_N[rows_N], num_units_B, counts)


_NO_ENDS = {"student_eos": False, "teacher_eos": False}


def _pooled_units(student_lengths: Sequence[np.ndarray], stretches: Sequence[_Stretch]) -> tuple[np.ndarray, np.ndarray]:
    """Return the minimal units [N, 4] of stretches whose two texts agree, and the response of each: one pass over all of them.

    The texts end together, so no unit crosses from one stretch to the next. Tokens without bytes at the end of a stretch are in none.
    """
    ours = np.concatenate([np.zeros(0, np.int32), *student_lengths])
    theirs = np.concatenate([np.zeros(0, np.int32), *(part.encoded.lengths for part in stretches)])
    stops = common_boundaries(ours, theirs, int(ours.sum(dtype=np.int64)))
    counts = [np.array([len(lengths) for lengths in student_lengths], np.int64), np.array([len(part.encoded.ids) for part in stretches], np.int64)]
    stretch_N = np.repeat(np.arange(len(stretches)), counts[0])[stops[0] - 1]
    firsts = (np.array([part.first for part in stretches], np.int64), np.array([part.teacher_first for part in stretches], np.int64))
    columns = []
    for stop_N, count_P, first_P in zip(stops, counts, firsts):
        pool_start_N = (count_P.cumsum() - count_P)[stretch_N]
        start_N = np.maximum(np.concatenate([[0], stop_N[:-1]])[: len(stop_N)], pool_start_N)
        offset_N = first_P[stretch_N] - pool_start_N
        columns += [start_N + offset_N, stop_N + offset_N]
    return np.array([part.response for part in stretches], np.int64)[stretch_N], np.stack(columns, 1)


def _in_order(response_N: np.ndarray, spans_N4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return units response after response, each from its first token on."""
    order = np.lexsort((spans_N4[:, 0], response_N))
    return response_N[order], spans_N4[order]


def _decoded(pieces: BytePieces, ids: Sequence[int]) -> list[str]:
    """Return what each token decodes to on its own, as the released code has it: parts of a character become U+FFFD."""
    return [pieces.tokenizer.decode([token]) for token in ids]
