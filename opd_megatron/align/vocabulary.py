"""The tokens that two vocabularies share: the columns on which student and teacher are compared.

K pairs of ids, one to one. By bytes, a newline (Ċ), a byte-fallback token and half of a character are shared wherever both sides have them;
by strings, as SimCT's released code pairs them (commit 4dae6fc), they are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch

from opd_megatron.align.pieces import BytePieces

EosRule = Literal["pair", "skip", "bridge"]
Match = Literal["bytes", "string"]
_Text = TypeVar("_Text", str, bytes)
_FORMAT = "opd_megatron shared vocabulary 1"


@dataclass(frozen=True, eq=False)
class SharedVocabulary:
    """Pairs of student and teacher ids [K], sorted by student id, and what becomes of the end of sequence.

    `student_size` and `teacher_size` count the ids that the tokenizers have: rows of a padded head beyond them are neither columns nor in a normalizer.
    `eos` says how the ends compare: "pair", the first end of each side is a pair like any other; "skip", no row; "bridge", all ends of a side are
    one column. `student_eos` and `teacher_eos` are all that end a response, e.g. those of generation_config.json.
    """

    student_ids_K: torch.Tensor
    teacher_ids_K: torch.Tensor
    student_size: int
    teacher_size: int
    student_eos: tuple[int, ...] = ()
    teacher_eos: tuple[int, ...] = ()
    eos: EosRule = "pair"

    @property
    def num_pairs(self) -> int:
        return len(self.student_ids_K)

    @property
    def student_eos_id(self) -> int | None:
        """The end of sequence that the student writes by default; None where none was named."""
        return self.student_eos[0] if self.student_eos else None

    @property
    def teacher_eos_id(self) -> int | None:
        return self.teacher_eos[0] if self.teacher_eos else None

    @cached_property
    def _teacher_id_of(self) -> np.ndarray:
        """The teacher's id of every student id [student_size], -1 where there is none."""
        table = np.full(self.student_size, -1, np.int64)
        table[self.student_ids_K.cpu().numpy()] = self.teacher_ids_K.cpu().numpy()
        return table

    def is_pair(self, student_ids: Sequence[int] | np.ndarray, teacher_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return for each place whether the two ids [N] are a pair, bool [N]; ids beyond a tokenizer's are in none."""
        student, teacher = np.asarray(student_ids, np.int64), np.asarray(teacher_ids, np.int64)
        known = (student >= 0) & (student < self.student_size) & (teacher >= 0)
        return known & (self._teacher_id_of[np.where(known, student, 0)] == teacher)

    def statistics(self) -> dict[str, Any]:
        """Return counts, and the share of each side's ids that are in a pair."""
        return {
            "num_pairs": self.num_pairs,
            "student_size": self.student_size,
            "teacher_size": self.teacher_size,
            "student_share": self.num_pairs / self.student_size,
            "teacher_share": self.num_pairs / self.teacher_size,
            "eos": self.eos,
        }

    def save(self, path: str | Path) -> None:
        """Write a JSON file, the same bytes for the same vocabulary."""
        record = {
            "format": _FORMAT,
            "statistics": self.statistics(),
            "eos": self.eos,
            "student_size": self.student_size,
            "teacher_size": self.teacher_size,
            "student_eos": list(self.student_eos),
            "teacher_eos": list(self.teacher_eos),
            "student_ids": self.student_ids_K.tolist(),
            "teacher_ids": self.teacher_ids_K.tolist(),
        }
        Path(path).write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SharedVocabulary:
        """Read what `save` wrote; ValueError if the file is something else."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a shared vocabulary ({error}); write it anew with SharedVocabulary.save") from None
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a shared vocabulary of format {_FORMAT!r}; write it anew with SharedVocabulary.save")
        return cls(
            student_ids_K=torch.tensor(record["student_ids"], dtype=torch.long),
            teacher_ids_K=torch.tensor(record["teacher_ids"], dtype=torch.long),
            student_size=record["student_size"],
            teacher_size=record["teacher_size"],
            student_eos=tuple(record["student_eos"]),
            teacher_eos=tuple(record["teacher_eos"]),
            eos=record["eos"],
        )


def shared_vocabulary(
    student: BytePieces,
    teacher: BytePieces,
    *,
    match: Match = "bytes",
    eos: EosRule = "pair",
    student_eos: Sequence[int],
    teacher_eos: Sequence[int],
) -> SharedVocabulary:
    """Return the pairs of ids that stand for the same text; special tokens are in none but, with eos="pair", the first end of each side.

    By "bytes", of several ids of the same bytes the lowest counts, byte-fallback tokens last. By "string", ids whose names are equal once Ġ is
    written ▁. ValueError if nothing is shared, or if an end of sequence is needed and not named, or unknown.
    """
    for what, given, known in (("match", match, get_args(Match)), ("eos", eos, get_args(EosRule))):
        if given not in known:
            raise ValueError(f"{what}={given!r} is none of {', '.join(known)}")
    for role, pieces, ends in (("student", student, student_eos), ("teacher", teacher, teacher_eos)):
        if not ends and eos != "skip":
            raise ValueError(
                f"alignment.eos={eos} needs the {role}'s end of sequence and none is named; set eos_token_id in its generation_config.json, or use skip"
            )
        if any(not 0 <= end < len(pieces.pieces) for end in ends):
            raise ValueError(
                f"the {role}'s ends of sequence {list(ends)} are not all among its tokenizer's {len(pieces.pieces)} ids; these are another model's"
            )
    read: Callable[[BytePieces, set[int]], dict[Any, int]] = _by_bytes if match == "bytes" else _by_string
    student_id_of, teacher_id_of = read(student, set(student_eos)), read(teacher, set(teacher_eos))
    pairs = [(index, teacher_id_of[text]) for text, index in student_id_of.items() if text in teacher_id_of]
    if not pairs:
        raise ValueError(
            f"of {len(student_id_of)} student and {len(teacher_id_of)} teacher tokens none stands for the same text by alignment.vocab_match={match}; "
            f"{'use bytes, or ' if match == 'string' else ''}choose a teacher whose tokenizer splits text into similar pieces"
        )
    if eos == "pair":
        pairs.append((student_eos[0], teacher_eos[0]))
    pairs.sort()
    return SharedVocabulary(
        student_ids_K=torch.tensor([pair[0] for pair in pairs], dtype=torch.long),
        teacher_ids_K=torch.tensor([pair[1] for pair in pairs], dtype=torch.long),
        student_size=len(student.pieces),
        teacher_size=len(teacher.pieces),
        student_eos=tuple(student_eos),
        teacher_eos=tuple(teacher_eos),
        eos=eos,
    )


def _by_bytes(pieces: BytePieces, ends: set[int]) -> dict[bytes, int]:
    """Return the id of each byte string."""
    order = sorted(range(len(pieces.pieces)), key=lambda index: (index in pieces.byte_ids, index))
    return _first_ids((piece, index) for index in order if (piece := pieces.pieces[index]) and index not in ends)


def _by_string(pieces: BytePieces, ends: set[int]) -> dict[str, int]:
    """Return the id of each token's name; ValueError for a tokenizer without names."""
    if not hasattr(pieces.tokenizer, "get_vocab"):
        raise ValueError(f"alignment.vocab_match=string needs the names of tokens, which {type(pieces.tokenizer).__name__} does not have; use bytes")
    named = sorted(pieces.tokenizer.get_vocab().items(), key=lambda item: item[1])
    return _first_ids((name.replace("Ġ", "▁"), index) for name, index in named if pieces.pieces[index] and index not in ends)


def _first_ids(ids: Iterable[tuple[_Text, int]]) -> dict[_Text, int]:
    first: dict[_Text, int] = {}
    for text, index in ids:
        first.setdefault(text, index)
    return first
