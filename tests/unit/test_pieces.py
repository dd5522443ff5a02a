"""The bytes of tokens: texts written back by their tokens, for each kind of tokenizer, and tokenizers that keep no text refused.

Not covered: released vocabularies other than mistral-common's, which the suite cannot download.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_megatron.align import BytePieces, check_lossless, token_bytes
from tests.tokenizers_made import EOS, TEXTS, byte_level_bpe, mistral_file, mistral_tokenizer, sentencepiece_like, word_piece

KINDS = {
    "byte level": lambda: byte_level_bpe(512),
    "byte level 4096": lambda: byte_level_bpe(4096),
    "sentencepiece": lambda: sentencepiece_like(),
    "sentencepiece, prefix space": lambda: sentencepiece_like(prefix_space=True),
    "sentencepiece, metaspace": lambda: sentencepiece_like(metaspace=True),
    "sentencepiece, metaspace and prefix space": lambda: sentencepiece_like(prefix_space=True, metaspace=True),
}


def wrapped(model: object, decoder: object | None, **parts: object) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_normalizer(normalizer: object) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer, with another normalizer before it."""
    tokenizer = Tokenizer.from_str(byte_level_bpe(512).backend_tokenizer.to_str())
    tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_write_the_text_back(kind: str) -> None:
    pieces = BytePieces.of(KINDS[kind]())
    assert check_lossless("student", pieces) == []
    for text, encoded in zip(TEXTS, pieces.encode_many(list(TEXTS))):
        assert pieces.text_bytes(encoded) == text.encode()
        assert int(encoded.lengths.sum()) == len(text.encode())
        assert len(encoded.ids) == len(encoded.lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_those_of_the_tokens_and_only_a_prefix_space_is_taken_off(kind: str) -> None:
    pieces = BytePieces.of(KINDS[kind]())
    texts = ["word and word", " word", "  word", "日本", "\nword", " "]
    for text, encoded in zip(texts, pieces.encode_many(texts)):
        whole = [len(piece) for piece in pieces.look_up(encoded.ids)]
        taken = sum(whole) - len(text.encode())
        assert taken == (pieces.join(encoded.ids) == b" " + text.encode())
        assert encoded.lengths.tolist() == [whole[0] - taken, *whole[1:]]
        assert encoded.lengths.dtype == "int32"
    added = [pieces.join(encoded.ids) == b" " + text.encode() for text, encoded in zip(texts, pieces.encode_many(texts))]
    assert any(added) == ("prefix space" in kind)


def test_a_byte_level_vocabulary_has_every_byte_and_no_bytes_for_its_specials() -> None:
    tokenizer = byte_level_bpe(512)
    pieces = token_bytes(tokenizer)
    assert len(pieces) == len(tokenizer)
    assert {piece for piece in pieces if piece and len(piece) == 1} == {bytes([byte]) for byte in range(256)}
    assert pieces[tokenizer.eos_token_id] is None
    assert sum(piece is None for piece in pieces) == 1
    # Half of a character, which decodes to U+FFFD on its own, keeps its byte.
    assert pieces[tokenizer.convert_tokens_to_ids("Ċ")] == b"\n"
    assert pieces[tokenizer.convert_tokens_to_ids("Ġ")] == b" "
    assert b"\xf0" in pieces


def test_byte_fallback_tokens_are_bytes_and_known_as_such() -> None:
    tokenizer = sentencepiece_like()
    pieces = BytePieces.of(tokenizer)
    fallback = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)]
    assert pieces.byte_ids == set(fallback)
    assert [pieces.pieces[index] for index in fallback] == [bytes([byte]) for byte in range(256)]
    assert [pieces.pieces[index] for index in range(3)] == [None] * 3
    assert pieces.lengths[:3].tolist() == [0, 0, 0]
    newline = pieces.encode_many(["\n"])[0]
    assert newline.ids == [tokenizer.convert_tokens_to_ids("<0x0A>")]


def test_without_byte_fallback_the_name_of_a_byte_is_text() -> None:
    tokenizer = wrapped(models.BPE({"<0x41>": 0, "▁a": 1}, []), decoders.Metaspace(prepend_scheme="never"))
    assert token_bytes(tokenizer) == [b"<0x41>", b" a"]


def test_special_tokens_within_text_are_text() -> None:
    for kind in KINDS.values():
        tokenizer = kind()
        pieces = BytePieces.of(tokenizer)
        text = f"they write {EOS} and <s>, then go on"
        # Otherwise the tokenizer reads it as the token itself, and what the student wrote would end there.
        assert tokenizer.eos_token_id in tokenizer(text, add_special_tokens=False)["input_ids"]
        encoded = pieces.encode_many([text])[0]
        assert pieces.text_bytes(encoded) == text.encode()
        assert not set(encoded.ids) & set(tokenizer.all_special_ids)


def test_added_tokens_that_are_not_special_are_what_they_say() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level_bpe(512).backend_tokenizer.to_str()), eos_token=EOS)
    # Each letter of "naïve" is also GPT-2's letter for some byte.
    added = ["<think>", " é→ ", "naïve", "<|hidden|>"]
    tokenizer.add_tokens([AddedToken(content, special=content == "<|hidden|>", normalized=False) for content in added])
    pieces = BytePieces.of(tokenizer)
    assert [pieces.pieces[tokenizer.convert_tokens_to_ids(content)] for content in added] == [b"<think>", " é→ ".encode(), "naïve".encode(), None]
    text = "a<think>b é→ cnaïved<|hidden|>"
    encoded = pieces.encode_many([text])[0]
    assert pieces.text_bytes(encoded) == text.encode()
    assert [tokenizer.convert_tokens_to_ids(content) in encoded.ids for content in added] == [True, True, True, False]


def test_ids_without_a_token_have_no_bytes_and_ids_beyond_are_refused() -> None:
    pieces = BytePieces.of(wrapped(models.BPE({"a": 0, "Ġ": 3}, []), decoders.ByteLevel()))
    assert pieces.pieces == [b"a", None, None, b" "]
    assert pieces.join([0, 1, 3]) == b"a "
    with pytest.raises(ValueError, match="token id 4 is beyond the tokenizer's 4 ids"):
        pieces.join([0, 4])


def test_batches_are_texts_one_by_one() -> None:
    pieces = BytePieces.of(sentencepiece_like(prefix_space=True))
    assert pieces.encode_many([]) == []
    for text, encoded in zip(TEXTS, pieces.encode_many(list(TEXTS))):
        alone = pieces.encode_many([text])[0]
        assert (alone.ids, alone.lengths.tolist()) == (encoded.ids, encoded.lengths.tolist())


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [
        (word_piece, "WordPiece"),
        (lambda: wrapped(models.WordLevel({"a": 0}, unk_token="a"), None), "WordLevel"),
        (lambda: wrapped(models.BPE({"a</w>": 0}, []), decoders.BPEDecoder()), "BPEDecoder"),
        (lambda: wrapped(models.BPE({"a": 0}, []), decoders.Sequence([decoders.Fuse(), decoders.CTC()])), "Fuse . CTC"),
        (lambda: wrapped(models.BPE({"a": 0}, []), decoders.Replace("▁", "_")), "replaces"),
        (lambda: wrapped(models.BPE({"a": 0}, []), decoders.Fuse()), "Fuse"),
        (object, "object is not a fast tokenizer"),
    ],
    ids=["word piece", "no decoder", "end of word", "ctc", "other replacement", "nothing", "not fast"],
)
def test_a_tokenizer_whose_tokens_have_no_bytes_is_refused(tokenizer, named: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){named}.*(use|or use) a byte-level BPE"):
        BytePieces.of(tokenizer())


@pytest.mark.parametrize(
    ("normalizer", "shown"),
    [
        (normalizers.Lowercase(), "the quick brown fox"),
        (normalizers.Replace(Regex(" {2,}"), " "), "two leading"),
        (normalizers.Strip(), "leading space"),
        (normalizers.NFKC(), r"and\.\.\."),
        (normalizers.NFD(), "frac"),
        (normalizers.StripAccents(), "日本語"),
    ],
    ids=["lower case", "collapsed spaces", "stripped", "compatibility forms", "decomposed", "accents"],
)
def test_a_tokenizer_that_changes_text_is_refused_with_the_text(normalizer: object, shown: str) -> None:
    pieces = BytePieces.of(with_normalizer(normalizer))
    with pytest.raises(ValueError, match=f"the teacher's tokenizer does not keep text: .*comes back as.*{shown}"):
        check_lossless("teacher", pieces)


def test_canonical_normalization_is_accepted_with_a_note() -> None:
    notes = check_lossless("student", BytePieces.of(with_normalizer(normalizers.NFC())))
    assert len(notes) == 1
    assert "the student's tokenizer normalizes Unicode" in notes[0]


def test_an_unknown_character_is_refused() -> None:
    """A SentencePiece vocabulary without byte fallback writes <unk> for a rare character, which has no bytes."""
    whole = sentencepiece_like()
    description = json.loads(whole.backend_tokenizer.to_str())
    description["model"]["byte_fallback"] = False
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), unk_token="<unk>")
    with pytest.raises(ValueError, match="does not keep text"):
        check_lossless("student", BytePieces.of(tokenizer))


def test_prefix_space_of_a_byte_level_tokenizer_is_taken_off_too() -> None:
    tokenizer = Tokenizer.from_str(byte_level_bpe(512).backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    pieces = BytePieces.of(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    encoded = pieces.encode_many(["word"])[0]
    assert pieces.join(encoded.ids) == b" word"
    assert pieces.text_bytes(encoded) == b"word"


def test_a_prefix_space_is_taken_off_what_a_normalizer_changed_too() -> None:
    tokenizer = Tokenizer.from_str(sentencepiece_like(prefix_space=True).backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), tokenizer.normalizer])
    pieces = BytePieces.of(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert len(check_lossless("student", pieces)) == 1
    texts = ["e\u0301 word", " e\u0301 word"]
    for text, encoded in zip(texts, pieces.encode_many(texts)):
        assert pieces.text_bytes(encoded) == unicodedata.normalize("NFC", text).encode()


def mistral(name: str, folder: Path):
    file = mistral_file(name)
    if file is None:
        pytest.skip("needs pip install --no-deps mistral-common==1.13.1")
    return mistral_tokenizer(file, folder)


@pytest.mark.parametrize(
    ("name", "size", "specials"),
    [("tokenizer.model.v1", 32_000, 3), ("mistral_instruct_tokenizer_240323.model.v3", 32_768, 771), ("tekken_240718.json", 131_072, 1000)],
)
def test_mistral_vocabularies_keep_text(name: str, size: int, specials: int, tmp_path: Path) -> None:
    pieces = BytePieces.of(mistral(name, tmp_path))
    assert (len(pieces.pieces), sum(piece is None for piece in pieces.pieces)) == (size, specials)
    assert check_lossless("teacher", pieces) == []
    assert {bytes([byte]) for byte in range(256)} <= set(pieces.pieces)
    for text, encoded in zip(TEXTS, pieces.encode_many(list(TEXTS))):
        assert pieces.text_bytes(encoded) == text.encode()


def test_tekken_is_read_from_itself_and_from_what_wraps_it(tmp_path: Path) -> None:
    wrapper = mistral("tekken_240718.json", tmp_path)
    inner = wrapper.tokenizer.instruct_tokenizer.tokenizer
    expected = token_bytes(wrapper)
    assert token_bytes(inner) == token_bytes(wrapper.tokenizer) == expected
    # Tokens that are no whole characters have no string of their own.
    assert b" \xf0\x9f" in expected
    text = TEXTS[3]
    assert BytePieces.of(inner).encode_many([text])[0].ids == wrapper.encode(text, add_special_tokens=False)
