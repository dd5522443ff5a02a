"""Units of two tokenizations against readable definitions: components of overlaps, sets of boundaries, whole histories compared at every token.

Not covered: how fast it is (`tools/bench_align.py`), and what a loss makes of the units.
"""

from __future__ import annotations

import random
import unicodedata
from itertools import pairwise, product

import numpy as np
import pytest

from opd_megatron.align import (
    BytePieces,
    Unit,
    coarsen_to_anchors,
    common_boundaries,
    common_prefix,
    minimal_aligned_units,
    released_units,
    units_between,
)
from tests.tokenizers_made import TEXTS, byte_level_bpe, mistral_file, mistral_tokenizer, sentencepiece_like, source_text

Pieces = list[bytes]
# The three examples by which the released aligner differs: student, teacher, whether both end, released units, minimal units.
EXAMPLES = {
    "an anchor is taken along": ("ha|pp|y| day", "hap|py| day", False, [Unit(0, 4, 0, 3)], [Unit(0, 3, 0, 2), Unit(3, 4, 2, 3)]),
    "the end is folded into the span": ("2|5|<E>", "25|<e>", True, [Unit(0, 3, 0, 2)], [Unit(0, 2, 0, 1), Unit(2, 3, 1, 2)]),
    "the tail has no anchor": ("= |2|5", "= |25", False, [Unit(0, 1, 0, 1)], [Unit(0, 1, 0, 1), Unit(1, 3, 1, 2)]),
}


def cut(text: bytes, generator: random.Random, share: float) -> Pieces:
    places = [0, *(place for place in range(1, len(text)) if generator.random() < share), len(text)]
    return [text[start:stop] for start, stop in pairwise(places)] if text else []


def ends(pieces: Pieces) -> list[int]:
    return np.cumsum([len(piece) for piece in pieces], dtype=int).tolist()


def components(student: Pieces, teacher: Pieces) -> list[Unit]:
    """The definition: fragments between all boundaries of both sides, joined where a token of either side covers them both."""
    boundaries = sorted({0, *ends(student), *ends(teacher)})
    parent = list(range(len(boundaries) - 1))

    def root(fragment: int) -> int:
        while parent[fragment] != fragment:
            fragment = parent[fragment]
        return fragment

    for pieces in (student, teacher):
        for start, stop in pairwise([0, *ends(pieces)]):
            inside = [fragment for fragment in range(len(parent)) if start <= boundaries[fragment] < stop]
            for fragment in inside[1:]:
                parent[root(fragment)] = root(inside[0])
    spans: dict[int, list[int]] = {}
    for fragment in range(len(parent)):
        spans.setdefault(root(fragment), []).append(fragment)
    units = []
    for fragments in spans.values():
        start, stop = boundaries[fragments[0]], boundaries[fragments[-1] + 1]
        covered = [[place for place, end in enumerate(ends(pieces)) if start < end <= stop] for pieces in (student, teacher)]
        units.append(Unit(covered[0][0], covered[0][-1] + 1, covered[1][0], covered[1][-1] + 1))
    return sorted(units)


def released_naively(student: list, teacher: list, both_end: bool) -> list[Unit]:
    """The released rule, with whole histories: an anchor where they are equal and the next tokens are, or both are the last, the ends."""
    nothing = student[0][:0] if student else ""
    anchors, i, j = [(0, 0)], 0, 0
    while i < len(student) and j < len(teacher):
        mine, theirs = nothing.join(student[:i]), nothing.join(teacher[:j])
        ended = both_end and i == len(student) - 1 and j == len(teacher) - 1
        if mine == theirs and (student[i] == teacher[j] or ended):
            anchors.append((i + 1, j + 1))
        i, j = i + (len(mine) <= len(theirs)), j + (len(theirs) <= len(mine))
    return [Unit(before[0], after[0], before[1], after[1]) for before, after in pairwise(anchors)]


def check_restores(units: list[Unit], student: Pieces, teacher: Pieces) -> None:
    """Units follow each other without a gap, have text on both sides, the same, and together are the whole."""
    assert units == [] or (units[0].student_start, units[0].teacher_start) == (0, 0)
    for before, after in pairwise(units):
        assert (before.student_stop, before.teacher_stop) == (after.student_start, after.teacher_start)
    texts = [(b"".join(student[unit.student_start : unit.student_stop]), b"".join(teacher[unit.teacher_start : unit.teacher_stop])) for unit in units]
    assert all(mine == theirs and mine for mine, theirs in texts)
    assert b"".join(text for text, _ in texts) == b"".join(student) == b"".join(teacher)


def random_pairs(count: int, longest: int, alphabet: bytes = b"abc") -> list[tuple[Pieces, Pieces]]:
    generator = random.Random(7)
    pairs = []
    for _ in range(count):
        text = bytes(generator.choices(alphabet, k=generator.randrange(longest + 1)))
        pairs.append((cut(text, generator, generator.random()), cut(text, generator, generator.random())))
    return pairs


def test_units_are_the_connected_components_of_overlaps() -> None:
    sizes = set()
    for student, teacher in random_pairs(10_000, 24, bytes(range(256))):
        units = minimal_aligned_units(student, teacher)
        assert units == components(student, teacher), (student, teacher)
        check_restores(units, student, teacher)
        sizes |= {(unit.student_stop - unit.student_start, unit.teacher_stop - unit.teacher_start) for unit in units}
    assert {(1, 1), (1, 2), (2, 1), (2, 2), (3, 2)} <= sizes


def test_no_unit_can_be_split() -> None:
    """Every pair of partitions of a short text, equal bytes in it, and every way to cut a unit in two on both sides."""
    text = b"aabaaba"
    partitions = []
    for cuts in product((False, True), repeat=len(text) - 1):
        places = [0, *(place for place, is_cut in enumerate(cuts, start=1) if is_cut), len(text)]
        partitions.append([text[start:stop] for start, stop in pairwise(places)])
    for student, teacher in product(partitions, repeat=2):
        units = minimal_aligned_units(student, teacher)
        check_restores(units, student, teacher)
        for unit in units:
            for i, j in product(range(unit.student_start + 1, unit.student_stop), range(unit.teacher_start + 1, unit.teacher_stop)):
                assert b"".join(student[unit.student_start : i]) != b"".join(teacher[unit.teacher_start : j])


def test_a_piece_without_bytes_goes_with_what_follows() -> None:
    generator = random.Random(3)
    for student, teacher in random_pairs(500, 12):
        plain = minimal_aligned_units(student, teacher)
        widened = []
        for pieces in (student, teacher):
            # Which token of the plain sequence each place holds; an empty piece counts to the token after it.
            places, spread = [], []
            for place, piece in enumerate(pieces):
                for _ in range(generator.choice((0, 0, 1, 2))):
                    places.append(place)
                    spread.append(b"")
                places.append(place)
                spread.append(piece)
            places += [len(pieces)] * 2
            widened.append((places, [*spread, b"", b""]))
        (student_places, student_spread), (teacher_places, teacher_spread) = widened
        units = minimal_aligned_units(student_spread, teacher_spread)
        back = [
            Unit(
                *(student_places.index(unit.student_start), student_places.index(unit.student_stop)),
                *(teacher_places.index(unit.teacher_start), teacher_places.index(unit.teacher_stop)),
            )
            for unit in plain
        ]
        assert units == back


@pytest.mark.parametrize(("student", "teacher"), [([], []), ([b"a"], []), ([], [b"a"]), ([b"a"], [b""]), ([b"a"], [b"b"]), ([b"ab"], [b"a"])])
def test_nothing_in_common_is_no_unit(student: Pieces, teacher: Pieces) -> None:
    assert minimal_aligned_units(student, teacher) == []
    assert released_units(student, teacher, student_eos=False, teacher_eos=False, tail="keep") == []


def test_two_tokens_without_text_match_in_the_released_aligner_only() -> None:
    assert minimal_aligned_units([b""], [b""]) == []
    assert released_units([""], [""], student_eos=False, teacher_eos=False) == [Unit(0, 1, 0, 1)]


def test_differing_texts_align_up_to_the_last_boundary_in_common() -> None:
    generator = random.Random(5)
    seen_differing = 0
    for student, teacher in random_pairs(2000, 20):
        text = bytearray(b"".join(teacher))
        if text:
            text[generator.randrange(len(text))] ^= generator.choice((0, 1))
        teacher = cut(bytes(text), generator, 0.5)
        mine, theirs = b"".join(student), b"".join(teacher)
        agree = next((place for place, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
        seen_differing += agree < len(mine)
        assert common_prefix(mine, theirs) == agree
        common = sorted(end for end in set(ends(student)) & set(ends(teacher)) if end <= agree)
        stops = [(0, 0), *((ends(student).index(end) + 1, ends(teacher).index(end) + 1) for end in common)]
        assert minimal_aligned_units(student, teacher) == [Unit(a, c, b, d) for (a, b), (c, d) in pairwise(stops)]
    assert seen_differing > 500


def test_the_common_prefix_is_found_at_every_place() -> None:
    text = bytes(range(256)) * 5
    for place in range(0, len(text), 7):
        other = bytearray(text)
        other[place] ^= 255
        assert common_prefix(text, bytes(other)) == place
        assert common_prefix(text, text[:place]) == common_prefix(text[:place], text) == place
        assert common_prefix(text, text[:place] + b"\xff" * 3) in (place, place + 1, place + 2)


def test_arrays_hold_the_stops_of_units() -> None:
    for student, teacher in random_pairs(200, 30):
        lengths = [np.array([len(piece) for piece in pieces], np.int32) for pieces in (student, teacher)]
        student_stops, teacher_stops = common_boundaries(*lengths, len(b"".join(student)))
        units = minimal_aligned_units(student, teacher)
        assert student_stops.tolist() == [unit.student_stop for unit in units]
        assert teacher_stops.tolist() == [unit.teacher_stop for unit in units]
        assert units_between(student_stops, teacher_stops) == units


@pytest.mark.parametrize("as_bytes", [False, True], ids=["strings", "bytes"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_released_aligner_and_the_minimal_units_on_the_examples(example: str, as_bytes: bool) -> None:
    student, teacher, both_end, released, minimal = EXAMPLES[example]
    texts = [[token.encode() if as_bytes else token for token in tokens.split("|")] for tokens in (student, teacher)]
    assert released_units(*texts, student_eos=both_end, teacher_eos=both_end) == released
    # Ends are cut off before units are made, and are one of their own.
    content = [[token.encode() for token in tokens.split("|")][: -1 if both_end else None] for tokens in (student, teacher)]
    units = minimal_aligned_units(*content)
    if both_end:
        units.append(Unit(len(content[0]), len(content[0]) + 1, len(content[1]), len(content[1]) + 1))
    assert units == minimal


def test_the_kept_tail_is_the_unit_that_the_released_aligner_loses() -> None:
    student, teacher, *_ = EXAMPLES["the tail has no anchor"]
    texts = student.split("|"), teacher.split("|")
    assert released_units(*texts, student_eos=False, teacher_eos=False, tail="keep") == [Unit(0, 1, 0, 1), Unit(1, 3, 1, 2)]
    # An end on one side only is a token as any other.
    assert released_units(["a", "<e>"], ["a"], student_eos=True, teacher_eos=False) == [Unit(0, 1, 0, 1)]


@pytest.mark.parametrize("both_end", [False, True])
def test_the_released_aligner_is_its_rule_with_whole_histories(both_end: bool) -> None:
    """Strings of an alphabet in which tokens fail to decode, and texts that differ."""
    generator = random.Random(11)
    found = lost = 0
    for student, teacher in random_pairs(3000, 14, "aé😀".encode()):
        texts = [[piece.decode(errors="replace") for piece in pieces] for pieces in (student, teacher)]
        if generator.random() < 0.3:
            texts[0].insert(generator.randrange(len(texts[0]) + 1), "")
        if both_end:
            texts = [[*texts[0], "<e>"], [*texts[1], "<E>"]]
        expected = released_naively(texts[0], texts[1], both_end)
        assert released_units(*texts, student_eos=both_end, teacher_eos=both_end) == expected, texts
        found += len(expected)
        lost += not expected
    assert found > 1000
    assert lost > 100


def test_decoded_halves_of_a_character_match_falsely_and_then_nothing_does() -> None:
    student, teacher = [b"\xf0\x9f", b"\x98", b"\x80", b" x"], [b"\xf0", b"\x9f\x98\x80", b" x"]
    decoded = [[piece.decode(errors="replace") for piece in pieces] for pieces in (student, teacher)]
    # One U+FFFD for the first two bytes as for the first alone; then two against three, and the texts differ for good.
    assert released_units(*decoded, student_eos=False, teacher_eos=False, tail="keep") == [Unit(0, 1, 0, 1)]
    assert minimal_aligned_units(student, teacher) == [Unit(0, 3, 0, 2), Unit(3, 4, 2, 3)]


@pytest.mark.parametrize("tail", ["drop", "keep"])
def test_released_units_by_bytes_are_minimal_units_up_to_anchors(tail: str) -> None:
    for student, teacher in random_pairs(3000, 16):
        lengths = [np.array([len(piece) for piece in pieces], np.int32) for pieces in (student, teacher)]
        coarse = coarsen_to_anchors(*common_boundaries(*lengths, len(b"".join(student))), tail)  # type: ignore[arg-type]
        assert units_between(*coarse) == released_units(student, teacher, student_eos=False, teacher_eos=False, tail=tail)  # type: ignore[arg-type]


def align_fully(student: BytePieces, teacher: BytePieces, texts: list[str]) -> int:
    """Align texts, refuse any loss, and return how many units are not 1:1."""
    wider = 0
    for text, mine, theirs in zip(texts, student.encode_many(texts), teacher.encode_many(texts)):
        # Bytes of the text alone: an added prefix space is no part of it.
        pieces = []
        for side, encoded in ((student, mine), (teacher, theirs)):
            written, stops = side.text_bytes(encoded), [0, *np.cumsum(encoded.lengths).tolist()]
            assert written == text.encode()
            pieces.append([written[start:stop] for start, stop in pairwise(stops)])
        units = minimal_aligned_units(*pieces)
        check_restores(units, *pieces)
        wider += sum((unit.student_stop - unit.student_start, unit.teacher_stop - unit.teacher_start) != (1, 1) for unit in units)
    return wider


MADE = {
    "bytes 512": lambda: byte_level_bpe(512),
    "bytes 4096": lambda: byte_level_bpe(4096, part=1),
    "sentencepiece": lambda: sentencepiece_like(),
    "sentencepiece, prefix space": lambda: sentencepiece_like(prefix_space=True),
    "sentencepiece, metaspace": lambda: sentencepiece_like(prefix_space=True, metaspace=True),
}


@pytest.mark.parametrize(("student", "teacher"), [pair for pair in product(MADE, repeat=2) if pair[0] < pair[1]])
def test_tokenizers_never_lose_each_other(student: str, teacher: str) -> None:
    """Scripts, emoji, code, long digits, byte fallback: all bytes in units, where decoded tokens lose sync at the first split character."""
    sides = [BytePieces.of(MADE[name]()) for name in (student, teacher)]
    assert align_fully(*sides, [*TEXTS, source_text()[:20_000]]) > 0


def test_a_normalizer_costs_what_follows_its_first_change() -> None:
    student, teacher = BytePieces.of(byte_level_bpe(512)), BytePieces.of(byte_level_bpe(512, normalizer="NFC"))
    text = "kept up to e\u0301 and no further"
    mine, theirs = (pieces.encode_many([text])[0] for pieces in (student, teacher))
    units = minimal_aligned_units(student.look_up(mine.ids), teacher.look_up(theirs.ids))
    kept = b"".join(student.look_up(mine.ids[: units[-1].student_stop]))
    assert text.encode().startswith(kept)
    # 12 letters come before the change, and only the token that holds it and the one before can be lost with it.
    assert b"kept up to" in kept
    assert len(kept) <= len("kept up to ")
    assert unicodedata.normalize("NFC", text).encode() == teacher.text_bytes(theirs)


MISTRAL = ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3", "tekken_240718.json")


@pytest.mark.parametrize("name", MISTRAL)
def test_a_released_vocabulary_never_loses_sync(name: str, tmp_path) -> None:
    file = mistral_file(name)
    if file is None:
        pytest.skip("needs pip install --no-deps mistral-common==1.13.1")
    released = BytePieces.of(mistral_tokenizer(file, tmp_path))
    for other in (BytePieces.of(byte_level_bpe(4096)), BytePieces.of(sentencepiece_like(prefix_space=True))):
        assert align_fully(released, other, list(TEXTS)) > 0
