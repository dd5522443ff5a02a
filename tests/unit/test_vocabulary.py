"""Shared vocabularies against plain dictionaries: which ids are pairs by bytes and by string, what becomes of the ends, and the file on disk.

Not covered: how much of a teacher's probability the shared tokens hold.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from opd_megatron.align import BytePieces, SharedVocabulary, shared_vocabulary
from tests.programs import run_program
from tests.tokenizers_made import EOS, byte_level_bpe, mistral_file, mistral_tokenizer, sentencepiece_like, source_text, word_piece


@pytest.fixture(scope="module")
def byte_level() -> BytePieces:
    return BytePieces.of(byte_level_bpe(512))


@pytest.fixture(scope="module")
def larger() -> BytePieces:
    return BytePieces.of(byte_level_bpe(4096, part=1))


@pytest.fixture(scope="module")
def sentencepiece() -> BytePieces:
    return BytePieces.of(sentencepiece_like())


def ends(pieces: BytePieces) -> list[int]:
    return [pieces.tokenizer.eos_token_id]


def share(student: BytePieces, teacher: BytePieces, **options) -> SharedVocabulary:
    return shared_vocabulary(student, teacher, **{"student_eos": ends(student), "teacher_eos": ends(teacher), **options})


def pairs_of(shared: SharedVocabulary) -> list[tuple[int, int]]:
    return list(zip(shared.student_ids_K.tolist(), shared.teacher_ids_K.tolist()))


def names(pieces: BytePieces, *tokens: str) -> list[int]:
    return [pieces.tokenizer.convert_tokens_to_ids(token) for token in tokens]


@pytest.mark.parametrize("roles", [("byte_level", "larger"), ("sentencepiece", "larger"), ("byte_level", "sentencepiece")], ids="-".join)
def test_pairs_are_the_tokens_of_equal_bytes_one_to_one(roles: tuple[str, str], request: pytest.FixtureRequest) -> None:
    student, teacher = (request.getfixturevalue(role) for role in roles)
    shared = share(student, teacher, eos="skip")
    pairs = pairs_of(shared)
    assert {student.pieces[mine] for mine, _ in pairs} == {piece for piece in student.pieces if piece} & {piece for piece in teacher.pieces if piece}
    assert all(student.pieces[mine] == teacher.pieces[theirs] for mine, theirs in pairs)
    assert pairs == sorted(pairs)
    assert len({mine for mine, _ in pairs}) == len({theirs for _, theirs in pairs}) == len(pairs) == shared.num_pairs
    assert shared.student_ids_K.dtype == shared.teacher_ids_K.dtype == torch.long
    assert (shared.student_size, shared.teacher_size) == (len(student.pieces), len(teacher.pieces))


def test_bytes_share_what_strings_miss(sentencepiece: BytePieces, byte_level: BytePieces) -> None:
    """Ċ and <0x0A> are both a newline, and é's first byte is shared; by name neither is, and the byte é and the letter é are."""
    by_bytes, by_string = (share(sentencepiece, byte_level, match=match) for match in ("bytes", "string"))
    newline, first_byte = (names(sentencepiece, "<0x0A>")[0], names(byte_level, "Ċ")[0]), (names(sentencepiece, "<0xC3>")[0], names(byte_level, "Ã")[0])
    assert {newline, first_byte} <= set(pairs_of(by_bytes))
    assert not {newline, first_byte} & set(pairs_of(by_string))
    space = names(sentencepiece, "▁self")[0], names(byte_level, "Ġself")[0]
    assert space in set(pairs_of(by_bytes)) & set(pairs_of(by_string))


def test_strings_share_equal_names_with_one_sign_for_a_space(sentencepiece: BytePieces, larger: BytePieces) -> None:
    mine, theirs = ({name.replace("Ġ", "▁"): index for name, index in side.tokenizer.get_vocab().items()} for side in (sentencepiece, larger))
    expected = {(mine[name], theirs[name]) for name in set(mine) & set(theirs) - {"<unk>", "<s>", EOS}} | {(ends(sentencepiece)[0], ends(larger)[0])}
    assert set(pairs_of(share(sentencepiece, larger, match="string"))) == expected


def test_of_equal_bytes_the_byte_fallback_token_comes_last(sentencepiece: BytePieces, byte_level: BytePieces) -> None:
    letter, fallback = names(sentencepiece, "a", "<0x61>")
    assert fallback < letter
    assert sentencepiece.pieces[letter] == sentencepiece.pieces[fallback] == b"a"
    shared = share(sentencepiece, byte_level)
    theirs = names(byte_level, "a")
    assert shared.is_pair([letter, fallback], theirs * 2).tolist() == [True, False]
    # The same from the other side, and of two added tokens the lower id.
    assert share(byte_level, sentencepiece).is_pair(theirs * 2, [letter, fallback]).tolist() == [True, False]


def test_of_equal_bytes_the_lowest_id_counts(byte_level: BytePieces) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level.tokenizer.backend_tokenizer.to_str()), eos_token=EOS)
    tokenizer.add_tokens([AddedToken(" self", normalized=False)])
    student = BytePieces.of(tokenizer)
    old, new = names(student, "Ġself", " self")
    assert student.pieces[old] == student.pieces[new] == b" self"
    assert share(student, byte_level).is_pair([old, new], [old, old]).tolist() == [True, False]


def test_looking_pairs_up_is_a_search_among_them(sentencepiece: BytePieces, larger: BytePieces) -> None:
    shared = share(sentencepiece, larger)
    pairs = set(pairs_of(shared))
    generator = np.random.default_rng(1)
    # Beyond the tokenizers too, where a padded head has rows, and places that hold no token (-1).
    mine = np.concatenate([generator.integers(-1, len(sentencepiece.pieces) + 50, 20_000), shared.student_ids_K.numpy()])
    theirs = np.concatenate([generator.integers(-1, len(larger.pieces) + 50, 20_000), shared.teacher_ids_K.numpy()])
    found = shared.is_pair(mine, theirs)
    assert found.tolist() == [pair in pairs for pair in zip(mine.tolist(), theirs.tolist())]
    assert found.sum() >= shared.num_pairs
    assert shared.is_pair([], []).tolist() == []


def test_ends_are_a_pair_or_in_none(sentencepiece: BytePieces, larger: BytePieces) -> None:
    several = {"student_eos": [2, names(sentencepiece, "a")[0]], "teacher_eos": [ends(larger)[0], *names(larger, "b", "a")]}
    without = {pair for pair in pairs_of(share(sentencepiece, larger)) if pair[0] not in several["student_eos"] and pair[1] not in several["teacher_eos"]}
    for eos in ("pair", "skip", "bridge"):
        shared = share(sentencepiece, larger, eos=eos, **several)
        first = (2, ends(larger)[0])
        assert set(pairs_of(shared)) == without | ({first} if eos == "pair" else set())
        assert (shared.student_eos_id, shared.teacher_eos_id) == first
        assert (list(shared.student_eos), list(shared.teacher_eos), shared.eos) == (several["student_eos"], several["teacher_eos"], eos)
    # Other special tokens are in none, even where both sides have them.
    for match in ("bytes", "string"):
        assert not {0, 1} & set(share(sentencepiece, sentencepiece, match=match).student_ids_K.tolist())


def test_ends_of_other_text_are_a_pair_too(byte_level: BytePieces, sentencepiece: BytePieces) -> None:
    """Qwen ends with <|im_end|>, Gemma with <end_of_turn>."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level.tokenizer.backend_tokenizer.to_str()), eos_token="<|im_end|>")
    student = BytePieces.of(tokenizer)
    shared = share(student, sentencepiece)
    assert shared.is_pair([tokenizer.eos_token_id], ends(sentencepiece)).all()
    assert shared.num_pairs == share(student, sentencepiece, eos="skip").num_pairs + 1


def test_statistics_count(byte_level: BytePieces, larger: BytePieces) -> None:
    shared = share(byte_level, larger)
    statistics = shared.statistics()
    assert statistics == {
        "num_pairs": shared.num_pairs,
        "student_size": 512,
        "teacher_size": 4096,
        "student_share": shared.num_pairs / 512,
        "teacher_share": shared.num_pairs / 4096,
        "eos": "pair",
    }
    # All 256 bytes at least.
    assert 257 <= shared.num_pairs <= 512


def test_a_file_holds_all_of_it_in_the_same_bytes(sentencepiece: BytePieces, larger: BytePieces, tmp_path: Path) -> None:
    shared = share(sentencepiece, larger, eos="bridge", student_eos=[2, 7])
    shared.save(tmp_path / "a.json")
    read = SharedVocabulary.load(tmp_path / "a.json")
    assert pairs_of(read) == pairs_of(shared)
    assert read.statistics() == shared.statistics()
    assert (read.student_eos, read.teacher_eos, read.student_ids_K.dtype) == (shared.student_eos, shared.teacher_eos, torch.long)
    read.save(tmp_path / "b.json")
    share(sentencepiece, larger, eos="bridge", student_eos=[2, 7]).save(tmp_path / "c.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes() == (tmp_path / "c.json").read_bytes()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "something else"}'])
def test_a_file_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is not a shared vocabulary"):
        SharedVocabulary.load(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_eos": []}, "eos=pair needs the student's end of sequence"),
        ({"teacher_eos": [], "eos": "bridge"}, "eos=bridge needs the teacher's end of sequence.*generation_config.json"),
        ({"teacher_eos": [99_999]}, r"teacher's ends of sequence \[99999\] are not all among its tokenizer's 4096 ids"),
        ({"match": "text"}, "match='text' is none of bytes, string"),
        ({"eos": "never"}, "eos='never' is none of pair, skip, bridge"),
    ],
    ids=["student", "teacher", "unknown end", "match", "eos"],
)
def test_wrong_options_are_refused_with_the_way_out(options: dict, message: str, byte_level: BytePieces, larger: BytePieces) -> None:
    with pytest.raises(ValueError, match=message):
        share(byte_level, larger, **options)


def test_no_ends_are_needed_to_skip_them(byte_level: BytePieces, larger: BytePieces) -> None:
    shared = share(byte_level, larger, eos="skip", student_eos=[], teacher_eos=[])
    assert (shared.student_eos_id, shared.teacher_eos_id) == (None, None)


def test_nothing_shared_is_refused_with_numbers(byte_level: BytePieces) -> None:
    other = BytePieces(None, [b"\xff\xff", None], np.array([2, 0], np.int32))
    with pytest.raises(ValueError, match=r"of 511 student and 1 teacher tokens none stands for the same text by alignment\.vocab_match=bytes"):
        shared_vocabulary(byte_level, other, student_eos=[0], teacher_eos=[1])
    with pytest.raises(ValueError, match=r"alignment\.vocab_match=string needs the names of tokens"):
        shared_vocabulary(byte_level, other, match="string", student_eos=[0], teacher_eos=[1])


def test_released_vocabularies_share_bytes(tmp_path: Path) -> None:
    """Mistral's SentencePiece and tekken: every pair has equal bytes, all bytes among them, and more than by name."""
    files = [mistral_file(name) for name in ("tokenizer.model.v1", "tekken_240718.json")]
    if None in files:
        pytest.skip("needs pip install --no-deps mistral-common==1.13.1")
    sides = []
    for place, file in enumerate(files):
        (tmp_path / str(place)).mkdir()
        sides.append(BytePieces.of(mistral_tokenizer(file, tmp_path / str(place))))
    by_bytes, by_string = (share(*sides, match=match, student_eos=[2], teacher_eos=[2]) for match in ("bytes", "string"))
    assert all(sides[0].pieces[mine] == sides[1].pieces[theirs] for mine, theirs in pairs_of(by_bytes))
    assert {sides[0].pieces[mine] for mine, _ in pairs_of(by_bytes)} >= {bytes([byte]) for byte in range(256)}
    # tekken's names have spaces where SentencePiece's have ▁, so by name only word pieces without a space are shared.
    assert by_string.num_pairs < by_bytes.num_pairs / 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in (("student", sentencepiece_like(prefix_space=True)), ("teacher", byte_level_bpe(4096)), ("word", word_piece())):
        tokenizer.save_pretrained(folder / name)
    (folder / "text.py").write_text(source_text()[:30_000] + "日本語 😀\n", encoding="utf-8")
    (folder / "empty").write_text("")
    return folder


def test_the_report_counts_what_it_shows(folders: Path) -> None:
    done = run_program("tools.align_report", "--student", folders / "student", "--teacher", folders / "teacher", "--text", folders / "text.py", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["dropped_bytes"] == 0
    assert record["student_bytes"] == (folders / "text.py").stat().st_size
    for side in ("student", "teacher"):
        assert sum(row[side] * row["units"] for row in record["unit_sizes"]) == record[f"{side}_tokens"]
    assert sum(row["units"] for row in record["unit_sizes"]) == record["units"]
    single = next(row["units"] for row in record["unit_sizes"] if (row["student"], row["teacher"]) == (1, 1))
    assert record["one_to_one_coverage"] == single / record["student_tokens"]
    assert 0.2 < record["paired_coverage"] <= record["one_to_one_coverage"] < 1
    assert len(record["mismatches"]) == 20
    assert "".join(record["mismatches"][0]["student"]) == "".join(record["mismatches"][0]["teacher"])
    assert "Units by size" in done.stdout


@pytest.mark.parametrize(
    ("student", "text", "message"),
    [
        ("word", "text.py", "decoder WordPiece"),
        ("absent", "text.py", "does not exist"),
        ("student", "none", "cannot be read"),
        ("student", "empty", "is empty"),
    ],
)
def test_the_report_refuses_wrong_input_in_one_line(student: str, text: str, message: str, folders: Path) -> None:
    done = run_program("tools.align_report", "--student", folders / student, "--teacher", folders / "teacher", "--text", folders / text)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
