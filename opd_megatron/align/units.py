"""Units of text that two tokenizers both can write: where one response's student tokens and teacher tokens end together.

A minimal aligned unit lies between two consecutive common boundaries, as in SimCT (arXiv 2605.07711, App. D, there as the connected components of token
overlaps). No partition whose parts both sides can write is finer (its Theorem 1). `released_units` follows the authors' released aligner instead.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

Tail = Literal["drop", "keep"]


class Unit(NamedTuple):
    """Student tokens [student_start, student_stop) and teacher tokens [teacher_start, teacher_stop) that write the same text."""

    student_start: int
    student_stop: int
    teacher_start: int
    teacher_stop: int


# Makes a Unit of a tuple without leaving C: millions of them a second.
_as_unit: Callable[[Iterable[int]], Unit] = partial(tuple.__new__, Unit)  # type: ignore[arg-type]


def minimal_aligned_units(student_pieces: Sequence[bytes], teacher_pieces: Sequence[bytes]) -> list[Unit]:
    """Return the minimal aligned units of two sequences of token bytes, in their order; linear in bytes and tokens.

    Where the texts differ, those of the common prefix only: the units end at the last boundary in it. A piece of no bytes belongs to the unit
    that follows it, to none at the end of the text. Both sides of a unit have at least one byte.
    """
    student_text, teacher_text = b"".join(student_pieces), b"".join(teacher_pieces)
    student_stops, teacher_stops = common_boundaries(_lengths(student_pieces), _lengths(teacher_pieces), common_prefix(student_text, teacher_text))
    return units_between(student_stops, teacher_stops)


def common_boundaries(student_lengths: np.ndarray, teacher_lengths: np.ndarray, num_common_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many student and how many teacher tokens have been written at each common boundary, two int64 arrays [U].

    These are the stops of the U minimal units, each unit starting where the one before it stops. Lengths are bytes per token; `num_common_bytes`
    is the length of the prefix on which the two texts agree (`common_prefix`), and no boundary lies beyond it.
    """
    student_ends, teacher_ends = np.cumsum(student_lengths, dtype=np.int64), np.cumsum(teacher_lengths, dtype=np.int64)
    # A token without bytes ends where its predecessor does and is the next unit's.
    student_ends_here = (student_lengths > 0) & (student_ends <= num_common_bytes)
    teacher_ends_here = (teacher_lengths > 0) & (teacher_ends <= num_common_bytes)
    return _stops(student_ends, student_ends_here, teacher_ends[teacher_ends_here], num_common_bytes), _stops(
        teacher_ends, teacher_ends_here, student_ends[student_ends_here], num_common_bytes
    )


def common_prefix(a: bytes, b: bytes) -> int:
    """Return how many leading bytes two texts share: one comparison if they are equal, else a bisection whose comparisons halve."""
    if a == b:
        return len(a)
    equal, differs = 0, min(len(a), len(b)) + 1
    # Invariant: the first `equal` bytes agree, the first `differs` do not (or do not exist).
    while differs - equal > 1:
        middle = (equal + differs) // 2
        if a.startswith(b[equal:middle], equal):
            equal = middle
        else:
            differs = middle
    return equal


def units_between(student_stops: np.ndarray, teacher_stops: np.ndarray) -> list[Unit]:
    """Return consecutive units of their stops [U], the first starting at 0."""
    student, teacher = student_stops.tolist(), teacher_stops.tolist()
    # Every few thousand new tuples start the garbage collector, which finds nothing in tuples of integers and takes six times as long as making them.
    collects = gc.isenabled()
    gc.disable()
    try:
        return list(map(_as_unit, zip([0, *student[:-1]], student, [0, *teacher[:-1]], teacher)))
    finally:
        if collects:
            gc.enable()


def coarsen_to_anchors(student_stops: np.ndarray, teacher_stops: np.ndarray, tail: Tail = "drop") -> tuple[np.ndarray, np.ndarray]:
    """Return the stops that remain when a unit ends only after a 1:1 unit, its anchor: what `released_units` finds where tokens are matched by bytes.

    With tail="keep" what follows the last anchor is one more unit; with "drop" it is in none, as in the released code.
    """
    anchors = (np.diff(student_stops, prepend=0) == 1) & (np.diff(teacher_stops, prepend=0) == 1)
    if tail == "keep" and len(anchors):
        anchors[-1] = True
    return student_stops[anchors], teacher_stops[anchors]


def released_units(
    student_texts: Sequence[str] | Sequence[bytes],
    teacher_texts: Sequence[str] | Sequence[bytes],
    *,
    student_eos: bool,
    teacher_eos: bool,
    tail: Tail = "drop",
) -> list[Unit]:
    """Return the units of SimCT's released aligner (commit 4dae6fc): a unit ends only with an anchor, a token that both sides write alike from the same place.

    A unit holds all since the last anchor, so a mismatch takes the token after it along, and neighbouring mismatches merge. Texts are of single tokens:
    decoded strings, as the released code has them, or bytes. With both `student_eos` and `teacher_eos` the last tokens are the two
    ends of sequence and match, whatever their texts. What follows the last anchor is lost with tail="drop"; "keep" makes it a unit up to where
    both sides last had written the same. Once the texts differ nothing is found any more.
    """
    both_end = student_eos and teacher_eos
    num_student, num_teacher = len(student_texts), len(teacher_texts)
    units: list[Unit] = []
    i = j = start_i = start_j = last_i = last_j = 0
    empty = student_texts[0][:0] if student_texts else b""
    # What one side has written beyond the other; at most one of them is not empty.
    student_ahead = teacher_ahead = empty
    while True:
        take_student, take_teacher = not student_ahead, not teacher_ahead
        if (take_student and i == num_student) or (take_teacher and j == num_teacher):
            break
        if take_student and take_teacher:
            ends = both_end and i == num_student - 1 and j == num_teacher - 1
            if ends or student_texts[i] == teacher_texts[j]:
                i, j = i + 1, j + 1
                units.append(Unit(start_i, i, start_j, j))
                start_i, start_j = last_i, last_j = i, j
                continue
        if take_student:
            student_ahead, i = student_texts[i], i + 1  # type: ignore[assignment]
        if take_teacher:
            teacher_ahead, j = teacher_texts[j], j + 1  # type: ignore[assignment]
        if student_ahead[: len(teacher_ahead)] != teacher_ahead[: len(student_ahead)]:
            break
        student_ahead, teacher_ahead = student_ahead[len(teacher_ahead) :], teacher_ahead[len(student_ahead) :]
        if not student_ahead and not teacher_ahead:
            last_i, last_j = i, j
    if tail == "keep" and last_i > start_i:
        units.append(Unit(start_i, last_i, start_j, last_j))
    return units


def _lengths(pieces: Sequence[bytes]) -> np.ndarray:
    return np.fromiter(map(len, pieces), np.int32, len(pieces))


def _stops(ends: np.ndarray, usable: np.ndarray, other_ends: np.ndarray, num_common_bytes: int) -> np.ndarray:
    """Return one past each usable token whose end is one of the other side's, by a mark on every byte: no search, no sort."""
    marks = np.zeros(num_common_bytes + 1, bool)
    marks[other_ends] = True
    places = np.flatnonzero(usable)
    return places[marks[ends[places]]] + 1
