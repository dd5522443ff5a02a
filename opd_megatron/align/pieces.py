"""The bytes that a tokenizer's tokens stand for, read from its vocabulary and its decoder.

A token is never decoded on its own: half of a multibyte character decodes to U+FFFD, and two different halves then look equal.
Special tokens stand for no text and have no bytes; a response's end-of-sequence token is cut off before its text is aligned.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

# The tokenizer classes differ between libraries and have no common type: what they must offer is looked for by name.
Tokenizer = Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_DECODERS = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
_WAY_OUT = "use a byte-level BPE, a SentencePiece-like tokenizer with byte fallback or a tekken one, or a teacher with the student's tokenizer"

# Each line is one trap: scripts, joined emoji, code, runs of whitespace, digits, edges, rare characters, compatibility forms, marks.
_SAMPLE = (
    "The quick brown fox jumps over the lazy dog. DON'T they'VE",
    " leading space",
    "  two leading, two trailing  ",
    "trailing space ",
    "two  three   four    eight        tab\tend\t\t",
    "line\n\nparagraph\r\nwindows\n\n\n   indented\n",
    "\nleading newline",
    "def f(x: int) -> int:\n    return x ** 2 if x != 0 else -1  # comment\n\tfor (;;) { a[i] += b[i] && !c; }",
    "0 7 42 1024 1234567890123456789012345678901234567890 3.14159 1e-6 0xDEADBEEF 1,000,000",
    "\\frac{1}{2} + \\sqrt{x^2} = $\\boxed{\\tfrac{3}{4}}$ ∑ ∫ ≤ ≠ ∞ ⟨ψ|φ⟩",
    "naïve café Ångström Straße İstanbul “quotes” — and…",
    "日本語のテキスト、中文字符，한국어 문장 العربية עברית हिन्दी ไทย",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "zero\u200bwidth nbsp\u00a0end \u3000wide",
    "ﬁ ½ ² Ａ ① ㎏",
    "rare \U00010348 \U0001d518 \U00020bb7 \u16a0\u16a2 \ue000 \x01\x7f",
    "e\u0301 A\u030a a\u0323\u0307 o\u0308\u0304 \u1100\u1161",
    "x\u0331 marks without a composed form q\u0308",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa================--------________ Ġ Ċ",
    "",
)


class EncodedText(NamedTuple):
    """A text's tokens: ids [N], and how many bytes of the text each stands for [N], int32."""

    ids: list[int]
    lengths: np.ndarray


@dataclass(frozen=True, eq=False)
class BytePieces:
    """A tokenizer and the bytes of its V ids: None, and length 0, for special tokens and for ids without a token.

    `byte_ids` are SentencePiece's byte tokens (<0x41>): other ids of the same bytes (A) are what text is normally made of.
    """

    tokenizer: Tokenizer
    pieces: list[bytes | None]
    lengths: np.ndarray
    byte_ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> BytePieces:
        """Read a tokenizer's vocabulary; ValueError, with the way out, if its tokens have no bytes of their own."""
        pieces, byte_ids = _read_pieces(tokenizer)
        return cls(tokenizer, pieces, np.fromiter((len(piece or b"") for piece in pieces), np.int32, len(pieces)), byte_ids)

    def look_up(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token, empty for special ones; ValueError for ids that the tokenizer does not have."""
        try:
            return list(map(self._written.__getitem__, ids))
        except IndexError:
            raise ValueError(f"token id {max(ids)} is beyond the tokenizer's {len(self.pieces)} ids; these tokens are another tokenizer's") from None

    @cached_property
    def _written(self) -> list[bytes]:
        return [piece or b"" for piece in self.pieces]

    def join(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that the tokens write one after another; special ones write nothing."""
        return b"".join(self.look_up(ids))

    def text_bytes(self, encoded: EncodedText) -> bytes:
        """Return what the tokens of `encode_many` write of the text itself: `join`, without an added prefix space."""
        written = self.join(encoded.ids)
        return written[len(written) - int(encoded.lengths.sum()) :]

    def encode_many(self, texts: list[str]) -> list[EncodedText]:
        """Return the tokens of each text, none of them special: "</s>" in a text is four characters of it.

        SentencePiece writes a space before a text that does not start with one. It is taken off the first piece, which then is shorter than the token's bytes.
        """
        if not texts:
            return []
        tekken = _tekkenizer(self.tokenizer)
        if tekken is not None:
            batch = [tekken.encode(text, bos=False, eos=False) for text in texts]
        else:
            batch = self.tokenizer(
                texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )["input_ids"]
        return [EncodedText(ids, self._text_lengths(text, ids)) for text, ids in zip(texts, batch)]

    def _text_lengths(self, text: str, ids: list[int]) -> np.ndarray:
        lengths = self.lengths[np.asarray(ids, np.int64)]
        written = self.join(ids)
        # Equal but for the prefix, or also normalized elsewhere: either way one more space leads what was written.
        if written.startswith(b" ") and _leading_spaces(written) == _leading_spaces(text.encode()) + 1:
            lengths[np.flatnonzero(lengths)[0]] -= 1
        return lengths


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """Return the bytes of every id up to the highest, None for special tokens and for ids without a token.

    Byte-level BPE, SentencePiece-like fast tokenizers (▁ is a space, <0x41> a byte) and tekken are read; ValueError for others.
    """
    return _read_pieces(tokenizer)[0]


def check_lossless(role: str, pieces: BytePieces) -> list[str]:
    """Return notes about texts that only canonical Unicode normalization changes; ValueError if the tokens of any other do not write it.

    `role` ("student", "teacher") is named in messages. A normalizer (Qwen: NFC) merges what the other tokenizer may keep apart; such text is aligned up
    to there.
    """
    notes = []
    for text, encoded in zip(_SAMPLE, pieces.encode_many(list(_SAMPLE))):
        written = pieces.text_bytes(encoded)
        if written == text.encode():
            continue
        back = written.decode(errors="replace")
        composed = unicodedata.normalize("NFC", text)
        if composed == text or unicodedata.normalize("NFC", back) != composed:
            raise ValueError(
                f"the {role}'s tokenizer does not keep text: {text!r} comes back as {back!r}, so its tokens cannot be aligned by bytes; {_WAY_OUT}"
            )
        notes.append(f"the {role}'s tokenizer normalizes Unicode: {text!r} comes back as {back!r}; such text is aligned up to the first change")
    return notes


def _read_pieces(tokenizer: Tokenizer) -> tuple[list[bytes | None], frozenset[int]]:
    tekken = _tekkenizer(tokenizer)
    if tekken is not None:
        first = tekken.num_special_tokens
        return [None] * first + [tekken.id_to_byte_piece(index) for index in range(first, tekken.n_words)], frozenset()
    decoders = _decoders(tokenizer)
    kinds = {decoder["type"] for decoder in decoders}
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    pieces: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    ordinary = {token: index for token, index in vocabulary.items() if index not in special}
    if kinds <= {"ByteLevel", "Fuse"} and "ByteLevel" in kinds:
        # Added tokens are matched in the text itself; the model's own are in byte-level letters.
        of_model = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        for token, index in ordinary.items():
            pieces[index] = _byte_level(token) if token in of_model else token.encode()
        return pieces, frozenset()
    space = _space_sign(decoders)
    if not kinds <= _SENTENCEPIECE_DECODERS or (space is None and "ByteFallback" not in kinds):
        raise ValueError(f"a tokenizer with decoder {' + '.join(decoder['type'] for decoder in decoders)} does not say which bytes its tokens are; {_WAY_OUT}")
    byte_ids = set()
    for token, index in ordinary.items():
        byte = _BYTE_TOKEN.fullmatch(token) if "ByteFallback" in kinds else None
        if byte is not None:
            byte_ids.add(index)
            pieces[index] = bytes.fromhex(byte[1])
        else:
            pieces[index] = (token if space is None else token.replace(space, " ")).encode()
    return pieces, frozenset(byte_ids)


def _tekkenizer(tokenizer: Tokenizer) -> Any | None:
    """Return mistral-common's tekken tokenizer, itself or from within what wraps it; None if there is none."""
    for names in ((), ("instruct_tokenizer", "tokenizer"), ("tokenizer", "instruct_tokenizer", "tokenizer")):
        found = tokenizer
        for name in names:
            found = getattr(found, name, None)
        if hasattr(found, "id_to_byte_piece"):
            return found
    return None


def _decoders(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the description of every step of a fast tokenizer's decoder; ValueError if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer, so its decoder cannot be read; save it with a tokenizer.json, or {_WAY_OUT}")
    if backend.decoder is None:
        raise ValueError(f"a tokenizer without a decoder (model {type(backend.model).__name__}) does not say which bytes its tokens are; {_WAY_OUT}")
    waiting, found = [json.loads(backend.decoder.__getstate__())], []
    while waiting:
        decoder = waiting.pop(0)
        if decoder["type"] == "Sequence":
            waiting = [*decoder["decoders"], *waiting]
        else:
            found.append(decoder)
    return found


def _space_sign(decoders: list[dict[str, Any]]) -> str | None:
    """Return the sign that stands for a space, mostly ▁; ValueError for a replacement that is not a sign by a space."""
    signs = set()
    for decoder in decoders:
        if decoder["type"] == "Metaspace":
            signs.add(decoder["replacement"])
        elif decoder["type"] == "Replace":
            if decoder["content"] != " " or "String" not in decoder["pattern"]:
                raise ValueError(f"a tokenizer whose decoder replaces {decoder['pattern']} by {decoder['content']!r} is unknown here; {_WAY_OUT}")
            signs.add(decoder["pattern"]["String"])
    if len(signs) > 1:
        raise ValueError(f"a tokenizer whose decoder makes spaces of each of {sorted(signs)} is unknown here; {_WAY_OUT}")
    return signs.pop() if signs else None


@cache
def _byte_of_letter() -> dict[str, int]:
    """Return GPT-2's letters for bytes: printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    letters = _byte_of_letter()
    # Trainers put tokens that were given to them into the model as they are, spaces included.
    return bytes(letters[letter] for letter in token) if all(letter in letters for letter in token) else token.encode()


def _leading_spaces(text: bytes) -> int:
    return len(text) - len(text.lstrip(b" "))
