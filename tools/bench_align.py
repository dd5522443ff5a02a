"""How fast responses are aligned on one core: student tokens per second, of units and of the array form that training uses.

    python tools/bench_align.py [--repeats N] [--json]

Two byte-level BPEs are trained on the spot on different parts of the standard library's source, so that neither cuts within the other's tokens only; ids
in, units out, the look-up of bytes included. At ten times the text the figures should stay: alignment is linear. The fastest of several calls counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_common import environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd_megatron.align import BytePieces, common_boundaries, common_prefix, minimal_aligned_units

STUDENT_VOCAB, TEACHER_VOCAB = 4096, 2048
TRAINING_CHARACTERS = 300_000
TEXT_CHARACTERS = (100_000, 1_000_000)
BAR_TOKENS_PER_SECOND = 2e6


def main() -> int:
    arguments = _parse_arguments()
    if arguments.repeats < 1:
        print(f"error: --repeats {arguments.repeats} must be at least 1", file=sys.stderr)
        return 2
    text = _source(TEXT_CHARACTERS[-1])
    student = BytePieces.of(_train(text[:TRAINING_CHARACTERS], STUDENT_VOCAB))
    teacher = BytePieces.of(_train(text[-TRAINING_CHARACTERS:], TEACHER_VOCAB))
    results = [_measure(student, teacher, text[:size], arguments.repeats) for size in TEXT_CHARACTERS]
    for result in results:
        rates = ", ".join(f"{name} {result[f'{name}_tokens_per_second'] / 1e6:.2f} M" for name in ("units", "arrays"))
        print(f"{result['student_tokens']} student and {result['teacher_tokens']} teacher tokens, {result['units']} units: {rates} student tokens/s")
    slowest = min(result[f"{name}_tokens_per_second"] for result in results for name in ("units", "arrays"))
    verdict = "reached" if slowest >= BAR_TOKENS_PER_SECOND else "missed"
    print(f"slowest {slowest / 1e6:.2f} M student tokens/s, bar {BAR_TOKENS_PER_SECOND / 1e6:g} M: {verdict}")
    if arguments.json:
        print(
            json.dumps(
                {"bar_tokens_per_second": BAR_TOKENS_PER_SECOND, "results": results, "environment": environment(("numpy", "tokenizers", "transformers"))}
            )
        )
    return 0


def align_units(student: BytePieces, teacher: BytePieces, student_ids: list[int], teacher_ids: list[int]) -> int:
    return len(minimal_aligned_units(student.look_up(student_ids), teacher.look_up(teacher_ids)))


def align_arrays(student: BytePieces, teacher: BytePieces, student_ids: list[int], teacher_ids: list[int]) -> int:
    num_common_bytes = common_prefix(student.join(student_ids), teacher.join(teacher_ids))
    return len(common_boundaries(student.lengths[student_ids], teacher.lengths[teacher_ids], num_common_bytes)[0])


def _measure(student: BytePieces, teacher: BytePieces, text: str, repeats: int) -> dict[str, Any]:
    """Return the best rate of several calls, since other programs share the machine."""
    ids = [pieces.encode_many([text])[0].ids for pieces in (student, teacher)]
    num_units = {align(student, teacher, *ids) for align in (align_units, align_arrays)}
    assert len(num_units) == 1, num_units
    result: dict[str, Any] = {"characters": len(text), "student_tokens": len(ids[0]), "teacher_tokens": len(ids[1]), "units": num_units.pop()}
    for name, align in (("units", align_units), ("arrays", align_arrays)):
        result[f"{name}_tokens_per_second"] = len(ids[0]) / _best_seconds(lambda align=align: align(student, teacher, *ids), repeats)  # type: ignore[misc]
    return result


def _best_seconds(call: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def _train(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _source(num_characters: int) -> str:
    text = ""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += file.read_text(encoding="utf-8")
        if len(text) >= num_characters:
            break
    return text[:num_characters]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Student tokens aligned per second on one core.")
    parser.add_argument("--repeats", type=int, default=20, help="calls of which the fastest counts, default 20")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
