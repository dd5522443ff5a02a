"""How well two tokenizers align on a text: shared vocabulary, 1:1 coverage, sizes of units, and what most often does not match.

    python tools/align_report.py --student DIR --teacher DIR --text FILE [--match bytes|string] [--top N] [--json]

DIR is a Hugging Face folder (its tokenizer is enough), FILE a UTF-8 text like what the student will write. It is aligned in samples of up to 4000
characters that end with a line. Exit code 2 and one line on stderr for wrong input. With --json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from opd_megatron.align import BytePieces, SharedVocabulary, check_lossless, common_boundaries, common_prefix, shared_vocabulary

SAMPLE_CHARACTERS = 4000
LARGEST_SHOWN = 4


@dataclass
class Tally:
    """Counts over all samples. Sizes of units are (student tokens, teacher tokens)."""

    student_tokens: int = 0
    teacher_tokens: int = 0
    student_bytes: int = 0
    dropped_bytes: int = 0
    one_to_one_tokens: int = 0
    paired_tokens: int = 0
    align_seconds: float = 0.0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    mismatches: Counter[tuple[tuple[bytes, ...], tuple[bytes, ...]]] = field(default_factory=Counter)


def main() -> int:
    arguments = _parse_arguments()
    try:
        if arguments.top < 0:
            raise ValueError(f"--top {arguments.top} must be at least 0")
        samples = list(_samples(_read(arguments.text)))
        student, student_eos = _load(arguments.student, "student")
        teacher, teacher_eos = _load(arguments.teacher, "teacher")
        notes = check_lossless("student", student) + check_lossless("teacher", teacher)
        vocabulary = shared_vocabulary(student, teacher, match=arguments.match, student_eos=student_eos, teacher_eos=teacher_eos)
        tally = measure(student, teacher, vocabulary, samples)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    record = as_record(vocabulary, tally, notes, arguments.top)
    _show(record)
    if arguments.json:
        print(json.dumps(record))
    return 0


def measure(student: BytePieces, teacher: BytePieces, vocabulary: SharedVocabulary, samples: list[str]) -> Tally:
    """Align every sample and count."""
    tally = Tally()
    for mine, theirs in zip(student.encode_many(samples), teacher.encode_many(samples)):
        started = time.perf_counter()
        student_text, teacher_text = student.text_bytes(mine), teacher.text_bytes(theirs)
        student_stops, teacher_stops = common_boundaries(mine.lengths, theirs.lengths, common_prefix(student_text, teacher_text))
        tally.align_seconds += time.perf_counter() - started
        student_sizes, teacher_sizes = np.diff(student_stops, prepend=0), np.diff(teacher_stops, prepend=0)
        student_ids, teacher_ids = np.asarray(mine.ids, np.int64), np.asarray(theirs.ids, np.int64)
        single = (student_sizes == 1) & (teacher_sizes == 1)
        paired = single & vocabulary.is_pair(student_ids[student_stops - 1], teacher_ids[teacher_stops - 1])
        tally.student_tokens += len(mine.ids)
        tally.teacher_tokens += len(theirs.ids)
        tally.student_bytes += len(student_text)
        tally.dropped_bytes += len(student_text) - int(mine.lengths[: student_stops[-1] if len(student_stops) else 0].sum())
        tally.one_to_one_tokens += int(single.sum())
        tally.paired_tokens += int(paired.sum())
        tally.sizes.update(zip(student_sizes.tolist(), teacher_sizes.tolist()))
        for unit in np.flatnonzero(~paired):
            tokens = (
                tuple(pieces.look_up(ids[stops[unit] - sizes[unit] : stops[unit]]))
                for pieces, ids, stops, sizes in ((student, mine.ids, student_stops, student_sizes), (teacher, theirs.ids, teacher_stops, teacher_sizes))
            )
            tally.mismatches[next(tokens), next(tokens)] += 1
    return tally


def as_record(vocabulary: SharedVocabulary, tally: Tally, notes: list[str], top: int) -> dict[str, Any]:
    """Return everything as JSON holds it. Coverage is of student tokens; bytes that are no UTF-8 on their own are shown escaped."""
    student_tokens = max(tally.student_tokens, 1)
    return {
        "vocabulary": vocabulary.statistics(),
        "student_tokens": tally.student_tokens,
        "teacher_tokens": tally.teacher_tokens,
        "units": tally.sizes.total(),
        "one_to_one_coverage": tally.one_to_one_tokens / student_tokens,
        "paired_coverage": tally.paired_tokens / student_tokens,
        "student_bytes": tally.student_bytes,
        "dropped_bytes": tally.dropped_bytes,
        "unit_sizes": [{"student": sizes[0], "teacher": sizes[1], "units": count} for sizes, count in sorted(tally.sizes.items())],
        "mismatches": [
            {"student": _readable(student), "teacher": _readable(teacher), "units": count}
            for (student, teacher), count in sorted(tally.mismatches.items(), key=lambda item: (-item[1], item[0]))[:top]
        ],
        "aligned_student_tokens_per_second": tally.student_tokens / max(tally.align_seconds, 1e-9),
        "notes": notes,
    }


def _show(record: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    shared = record["vocabulary"]
    summary = Table("what", "value", title="Alignment", title_justify="left")
    summary.add_row("shared tokens", f"{shared['num_pairs']}")
    summary.add_row(
        "share of student, teacher ids", f"{shared['student_share']:.1%} of {shared['student_size']}, {shared['teacher_share']:.1%} of {shared['teacher_size']}"
    )
    summary.add_row("student, teacher tokens, units", f"{record['student_tokens']}, {record['teacher_tokens']}, {record['units']}")
    summary.add_row("student tokens 1:1", f"{record['one_to_one_coverage']:.2%}")
    summary.add_row("student tokens 1:1 and a shared pair", f"{record['paired_coverage']:.2%}")
    summary.add_row("bytes dropped", f"{record['dropped_bytes']} of {record['student_bytes']}")
    summary.add_row("aligned, without tokenizing", f"{record['aligned_student_tokens_per_second']:,.0f} student tokens/s")
    console.print(summary)
    console.print(_size_table(record["unit_sizes"]))
    if record["mismatches"]:
        frequent = Table("student", "teacher", "units", title="Most frequent units without a shared pair", title_justify="left")
        for row in record["mismatches"]:
            frequent.add_row(*("|".join(row[side]).replace("[", "\\[") for side in ("student", "teacher")), str(row["units"]))
        console.print(frequent)
    for note in record["notes"]:
        console.print(f"note: {note}", markup=False)


def _size_table(sizes: list[dict[str, int]]) -> Table:
    """Return units by tokens per side; what is larger than shown counts in the last row or column."""
    counts: Counter[tuple[int, int]] = Counter()
    for row in sizes:
        counts[min(row["student"], LARGEST_SHOWN), min(row["teacher"], LARGEST_SHOWN)] += row["units"]
    names = [*(str(size) for size in range(1, LARGEST_SHOWN)), f"{LARGEST_SHOWN}+"]
    table = Table("student tokens", *(f"teacher {name}" for name in names), title="Units by size", title_justify="left")
    for student, name in enumerate(names, start=1):
        table.add_row(name, *(str(counts[student, teacher]) for teacher in range(1, LARGEST_SHOWN + 1)))
    return table


def _readable(tokens: tuple[bytes, ...]) -> list[str]:
    return [token.decode(errors="backslashreplace").encode("unicode_escape").decode() if not token.isascii() else ascii(token)[2:-1] for token in tokens]


def _load(folder: str, role: str) -> tuple[BytePieces, tuple[int, ...]]:
    """Return the pieces of a folder's tokenizer and all ids that end a response, the tokenizer's own first."""
    from opd_megatron.data.tokenizer import load_tokenizer
    from opd_megatron.models.hf_folder import stop_token_ids

    tokenizer = load_tokenizer(folder)
    try:
        pieces = BytePieces.of(tokenizer)
    except ValueError as error:
        raise ValueError(f"the {role}'s tokenizer {folder!r}: {error}") from None
    return pieces, tuple(dict.fromkeys([tokenizer.eos_token_id, *stop_token_ids(Path(folder))]))


def _read(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {file!r} cannot be read as UTF-8 ({error})") from None
    if not text:
        raise ValueError(f"--text {file!r} is empty; name a text like what the student will write")
    return text


def _samples(text: str) -> Iterator[str]:
    sample = ""
    for line in text.splitlines(keepends=True):
        if sample and len(sample) + len(line) > SAMPLE_CHARACTERS:
            yield sample
            sample = ""
        sample += line
    yield sample


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How well two tokenizers align on a text.")
    parser.add_argument("--student", required=True, metavar="DIR", help="Hugging Face folder of the student's tokenizer")
    parser.add_argument("--teacher", required=True, metavar="DIR", help="Hugging Face folder of the teacher's tokenizer")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--match", choices=("bytes", "string"), default="bytes", help="what makes a pair, default bytes")
    parser.add_argument("--top", type=int, default=20, help="mismatched units to show, default 20")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
