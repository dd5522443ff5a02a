"""What a response becomes for a teacher with another tokenizer: tokens, units with a loss, and what is counted.

Units of pieces are in test_units.py; here are specials, ends, room, kinds, and text that one side cannot write.
"""

from __future__ import annotations

import numpy as np
import pytest

from opd_megatron.align.pieces import BytePieces
from opd_megatron.align.responses import ResponseAligner, UnitCounts
from opd_megatron.align.units import minimal_aligned_units
from opd_megatron.align.vocabulary import shared_vocabulary
from tests.tokenizers_made import TEXTS, byte_level_bpe, sentencepiece_like
from tools.make_tiny_models import tiny_tokenizer

LETTERS = BytePieces.of(tiny_tokenizer())
MERGED = BytePieces.of(byte_level_bpe(512))
END, OTHER_END, THEIR_END = LETTERS.tokenizer.eos_token_id, LETTERS.tokenizer.pad_token_id, MERGED.tokenizer.eos_token_id
ROOM = 1000


def aligner(student=LETTERS, teacher=MERGED, kind="simct", eos="pair", ends=(END, OTHER_END), their_ends=(THEIR_END,), **options) -> ResponseAligner:
    vocabulary = shared_vocabulary(student, teacher, match=options.pop("match", "bytes"), eos=eos, student_eos=ends, teacher_eos=their_ends)
    return ResponseAligner(student=student, teacher=teacher, vocabulary=vocabulary, student_ends=frozenset(ends), kind=kind, **options)


def letters(text: str, *end: int) -> np.ndarray:
    """The student's tokens of a text, one for each byte."""
    return np.array([*LETTERS.tokenizer(text, split_special_tokens=True)["input_ids"], *end], np.int64)


def one(text_ids: np.ndarray, finished: bool = True, room: int = ROOM, **options):
    return aligner(**options).align([text_ids], [finished], [room])


def written(response, ids: np.ndarray) -> list[tuple[bytes, bytes]]:
    """Each unit's text on both sides."""
    return [(LETTERS.join(ids[a:b].tolist()), MERGED.join(response.teacher_ids[c:d].tolist())) for a, b, c, d in response.spans_N4]


@pytest.mark.parametrize("text", TEXTS)
def test_units_are_the_minimal_ones_and_write_the_same_text(text: str) -> None:
    ids = letters(text, END)
    response = one(ids)
    texts = written(response, ids)[:-1]
    assert b"".join(ours for ours, _ in texts) == text.encode()
    assert all(ours == theirs != b"" for ours, theirs in texts)
    pieces = [LETTERS.look_up(ids[:-1].tolist()), MERGED.look_up(response.teacher_ids[:-1].tolist())]
    assert [tuple(unit) for unit in response.spans_N4[:-1].tolist()] == minimal_aligned_units(*pieces)
    assert response.counts.lost_bytes == 0
    assert response.spans_N4[-1].tolist() == [len(ids) - 1, len(ids), len(response.teacher_ids) - 1, len(response.teacher_ids)]
    assert response.is_end_N.tolist() == [False] * len(texts) + [True]


def test_strict_compares_single_shared_tokens_and_the_end() -> None:
    """Of all units those of one token each: what SimCT has besides is dropped, and counted as not covered."""
    ids = letters("import self, x = 3", END)
    strict, simct = one(ids, kind="strict"), one(ids)
    single = (simct.spans_N4[:, 1] - simct.spans_N4[:, 0] == 1) & (simct.spans_N4[:, 3] - simct.spans_N4[:, 2] == 1)
    assert 0 < single.sum() < len(single)
    assert strict.spans_N4.tolist() == simct.spans_N4[single].tolist()
    assert not strict.has_column_N.any()
    assert simct.has_column_N.tolist() == (~single).tolist()
    assert strict.counts.covered_tokens == single.sum() == strict.counts.one_to_one_tokens == simct.counts.one_to_one_tokens
    assert simct.counts.covered_tokens == len(ids)
    assert strict.counts.units == simct.counts.units == len(single)


def test_a_single_token_that_is_not_shared_has_a_column_unless_asked_not_to() -> None:
    """Names of tokens differ where bytes agree: matched by strings, a newline (Ċ) of one byte-level and <0x0A> of the other are no pair."""
    spm = BytePieces.of(sentencepiece_like())
    ids = letters("a\n", END)
    by_bytes, by_string, without = (
        one(ids, teacher=spm, their_ends=(2,), **options) for options in ({}, {"match": "string"}, {"match": "string", "oov_unit": "none"})
    )
    assert by_bytes.has_column_N.tolist() == [False, False, False]
    assert by_string.has_column_N.tolist() == [False, True, False]
    assert without.has_column_N.tolist() == [False, False, False]
    assert len(one(ids, teacher=spm, their_ends=(2,), match="string", kind="strict").spans_N4) == 2


def test_a_special_token_is_a_wall() -> None:
    """The texts before and after it are tokenized apart, no unit crosses it, and the teacher does not read it; the text around it is not one."""
    start = LETTERS.tokenizer.convert_tokens_to_ids("<|im_start|>")
    whole, parts = letters("return None", END), np.concatenate([letters("retu"), [start], letters("rn None", END)])
    response = one(parts)
    assert response.counts.special_tokens == 1
    assert MERGED.join(response.teacher_ids.tolist()) == b"return None"
    assert len(response.teacher_ids) > len(one(whole).teacher_ids)
    assert 4 not in np.concatenate([np.arange(a, b) for a, b, *_ in response.spans_N4])
    assert all(b <= 4 or a >= 5 for a, b, *_ in response.spans_N4)


def test_text_that_looks_like_a_special_token_is_text() -> None:
    ids = letters("</s> <|im_end|>", END)
    response = one(ids)
    assert (response.teacher_ids == THEIR_END).sum() == 1
    assert b"".join(theirs for _, theirs in written(response, ids)) == b"</s> <|im_end|>"


@pytest.mark.parametrize(
    ("eos", "end", "teacher_reads_end", "compared"),
    [("pair", END, True, True), ("pair", OTHER_END, True, False), ("bridge", END, True, True), ("bridge", OTHER_END, True, True), ("skip", END, False, False)],
)
@pytest.mark.parametrize("kind", ["strict", "simct"])
def test_the_end_stands_alone(kind: str, eos: str, end: int, teacher_reads_end: bool, compared: bool) -> None:
    """In every mode: a row of its own, or none. The student may end with an id that is paired with nothing."""
    ids = letters("self", end)
    response = one(ids, kind=kind, eos=eos)
    assert (response.teacher_ids[-1] == THEIR_END) == teacher_reads_end
    assert bool(response.is_end_N.any()) == compared == bool(response.counts.ends_compared)
    assert response.counts.ended == 1
    if compared:
        assert response.spans_N4[-1, 1] - response.spans_N4[-1, 0] == 1
        assert not response.has_column_N[-1]


def test_an_unfinished_response_has_no_end_even_where_it_stops_at_one() -> None:
    for ids, finished in ((letters("self"), False), (letters("self"), True)):
        response = one(ids, finished)
        assert response.counts.ended == 0
        assert THEIR_END not in response.teacher_ids


def test_the_released_aligner_takes_the_anchor_along_and_folds_the_end_in() -> None:
    """ " self" is one token of the teacher and five of the student: at the end of a response it has no anchor but the end."""
    text = "x self"
    ids = letters(text, END)
    minimal, released, dropped = one(ids), one(ids, units="released", tail="keep"), one(ids, units="released", tail="drop")
    texts = [ours for ours, _ in written(minimal, ids)]
    assert texts == [b"x", b" self", b""]
    # Kept, it is a unit of its own; dropped, it is in the end's unit, as released.
    assert [ours for ours, _ in written(released, ids)][-1] == b""
    assert dropped.spans_N4[-1, 1] == len(ids)
    assert dropped.spans_N4[-1, 1] - dropped.spans_N4[-1, 0] > 1
    assert dropped.has_column_N[-1]
    assert not dropped.is_end_N[-1]
    assert one(letters(text), False, units="released", tail="drop").spans_N4[-1, 1] < len(text)


def test_decoded_text_loses_split_characters_and_bytes_do_not() -> None:
    """A character that one side writes whole and the other in bytes: each byte alone decodes to U+FFFD, and the two histories never meet again."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["日"])
    whole = BytePieces.of(tokenizer)
    ids = letters("a日b self", END)
    by_bytes, by_text = (
        one(ids, teacher=whole, their_ends=(END,), **options) for options in ({}, {"units": "released", "tail": "drop", "boundaries": "decoded_text"})
    )
    assert by_bytes.counts.covered_tokens == len(ids)
    # Not even the end is found again.
    assert by_text.spans_N4.tolist() == [[0, 1, 0, 1]]


def test_bytes_that_are_no_text_end_the_units() -> None:
    """Half a character cannot be given to the teacher: units end before it, and what follows is counted as lost."""
    half = [index for index, piece in enumerate(LETTERS.pieces) if piece == "日".encode()[:1]]
    ids = np.concatenate([letters("self "), half, letters(" more", END)])
    response = one(ids)
    assert response.counts.lost_bytes == 6
    assert b"".join(ours for ours, _ in written(response, ids)) == b"self "
    assert response.counts.unaligned_responses == 0
    nothing = one(np.array(half), False)
    assert nothing.counts.unaligned_responses == 1
    assert len(nothing.spans_N4) == 0


def test_a_normalizing_teacher_is_followed_up_to_the_first_change() -> None:
    teacher = BytePieces.of(byte_level_bpe(512, normalizer="NFC"))
    response = one(letters("self e\u0301 more", END), teacher=teacher)
    assert response.counts.lost_bytes == len("e\u0301 more".encode())
    assert response.is_end_N[-1]


def test_a_prefix_space_is_no_text() -> None:
    """SentencePiece writes a space before a text: the teacher reads it, the units do not."""
    spm = BytePieces.of(sentencepiece_like(prefix_space=True))
    ids = letters("self.x", END)
    response = one(ids, teacher=spm, their_ends=(2,))
    assert spm.join(response.teacher_ids[:-1].tolist()) == b" self.x"
    assert response.counts.lost_bytes == 0
    assert response.counts.covered_tokens == len(ids)


def test_what_the_teacher_has_no_room_for_is_left_out() -> None:
    ids = letters("import self, return None", END)
    whole = one(ids)
    for room in (0, 1, 5, len(whole.teacher_ids) - 1):
        response = one(ids, room=room)
        assert response.teacher_ids.tolist() == whole.teacher_ids[:room].tolist()
        assert response.spans_N4.tolist() == [unit for unit in whole.spans_N4.tolist() if unit[3] <= room]
        assert response.counts.cut_tokens == len(whole.teacher_ids) - room
    assert one(ids, room=0).counts.unaligned_responses == 1


def test_sorted_probabilities_are_compared_place_by_place() -> None:
    ids = letters("import self", END)
    response = one(ids, kind="uld")
    count = min(len(ids), len(response.teacher_ids))
    assert response.spans_N4.tolist() == [[place, place + 1, place, place + 1] for place in range(count)]
    assert not response.has_column_N.any()


def test_many_responses_are_aligned_as_each_alone() -> None:
    half = [index for index, piece in enumerate(LETTERS.pieces) if piece == "日".encode()[:1]]
    texts = [letters(text, *end) for text in TEXTS for end in ((), (END,))]
    texts[3:3] = [np.array([*letters("cut "), *half]), np.array([], np.int64), np.array([256, 256, *letters("x y", END)])]
    finished = [bool(len(ids) and ids[-1] == END) for ids in texts]
    for options in ({}, {"units": "released", "tail": "drop"}, {"kind": "strict"}, {"kind": "uld"}):
        together = aligner(**{"kind": "simct", **options}).align(texts, finished, [ROOM] * len(texts))
        alone = [one(ids, done, **options) for ids, done in zip(texts, finished)]
        for name in ("teacher_ids", "spans_N4", "has_column_N", "is_end_N", "num_units_B", "num_teacher_tokens_B"):
            assert getattr(together, name).tolist() == np.concatenate([getattr(response, name) for response in alone]).tolist(), name
        assert together.counts == sum((response.counts for response in alone), UnitCounts())
