"""Prompts, tokenized once at start, in an order that depends on nothing but the seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, Literal

from opd_megatron.config import DataConfig, PrivilegedConfig
from opd_megatron.data.rows import Row
from opd_megatron.data.sources import read_rows
from opd_megatron.data.templates import PromptText, ReadText, has_chat_template

Part = Literal["train", "evaluation", "all"]

_ROWS_AT_ONCE = 512
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, tokenized. `index` is its position in its source: the stable id in seeds and records.

    `teacher_ids` are what the teacher reads where that differs.
    """

    index: int
    messages: tuple[dict[str, str], ...]
    ids: tuple[int, ...]
    answer: str | None
    target: str | None
    entry: Any = None
    teacher_ids: tuple[int, ...] | None = None
    # The last user message that such a teacher reads.
    teacher_message: str | None = None

    def as_teacher_reads(self) -> Prompt:
        """Return the prompt with the teacher's tokens."""
        return self if self.teacher_ids is None else replace(self, ids=self.teacher_ids, teacher_ids=None)


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """A fixed, ordered list of prompts, and how many were dropped: too long themselves, or with a privileged prompt that leaves no room for a response."""

    prompts: list[Prompt]
    num_dropped_long: int = 0
    num_dropped_privileged: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def fingerprint(self) -> str:
        """Return a short hash of indices, messages, answers, targets and what a privileged teacher is asked, by which a resumed run notices replaced data.

        Token ids stay out: some chat templates print today's date, and a run may resume tomorrow.
        """
        digest = hashlib.sha256()
        for prompt in self.prompts:
            read = [prompt.index, prompt.messages, prompt.answer, prompt.target]
            digest.update(_canonical_json([*read, prompt.teacher_message] if prompt.teacher_message is not None else read) + b"\n")
        return digest.hexdigest()[:16]

    def batch(self, step: int, size: int, seed: int) -> list[Prompt]:
        """Return positions [step * size, (step + 1) * size) of an endless stream of epochs, each a permutation drawn from (seed, epoch).

        A pure function of its arguments: a resumed run needs no sampler state.
        """
        assert self.prompts
        assert step >= 0
        assert size >= 1
        chosen = []
        for position in range(step * size, (step + 1) * size):
            epoch, offset = divmod(position, len(self))
            chosen.append(self.prompts[_epoch_order(len(self), seed, epoch)[offset]])
        return chosen


@lru_cache(maxsize=4)
def _epoch_order(num_prompts: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_prompts))
    # Text seeds go through SHA-512, so neighbouring seeds and epochs are unrelated.
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


@dataclass
class _Counts:
    read: int = 0
    other_part: int = 0
    duplicates: int = 0
    too_long: int = 0
    no_room: int = 0


def load_prompts(
    data: DataConfig,
    tokenizer: Any,
    *,
    part: Part,
    limit: int | None = None,
    privileged: PrivilegedConfig | None = None,
    max_teacher_tokens: int | None = None,
    drop_without_room: bool = True,
    teacher_tokenizer: Any = None,
) -> PromptSet:
    """Return the prompts of one part of `data.prompts`, the first `limit` that qualify.

    `train` and `evaluation` are told apart by a hash of the prompt's messages against `data.holdout_fraction`, so they share
    no prompt even if the source repeats one; `all` does not split. `evaluation` holds each distinct prompt once. Prompts of more than
    `data.max_prompt_tokens` tokens are dropped, and those whose teacher would read more than `max_teacher_tokens`: or, with `drop_without_room=False`, they
    are kept for the student alone. `teacher_tokenizer` is given where it is not the student's.
    ValueError if the source is unusable, a row lacks what a template mentions, or nothing is left.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} prompts must be at least 1")
    counts = _Counts()
    prompts: list[Prompt] = []
    text = PromptText(data, tokenizer, privileged or PrivilegedConfig(), teacher_tokenizer)
    for row, read, ids, teacher_ids in _tokenized(_rows_of_part(read_rows(data), part, data.holdout_fraction, counts), text):
        if len(ids) > data.max_prompt_tokens:
            counts.too_long += 1
            continue
        if teacher_ids is not None and max_teacher_tokens is not None and len(teacher_ids) > max_teacher_tokens:
            counts.no_room += 1
            if drop_without_room:
                continue
            teacher_ids = None
        known = {"answer": row.answer, "target": row.target, "entry": row.entry}
        prompts.append(Prompt(index=row.index, messages=read.messages, ids=ids, teacher_ids=teacher_ids, teacher_message=read.teacher_message, **known))
        if len(prompts) == limit:
            break
    if not prompts:
        raise ValueError(_nothing_left(data, part, counts, max_teacher_tokens))
    return PromptSet(prompts=prompts, num_dropped_long=counts.too_long, num_dropped_privileged=counts.no_room)


def with_targets(prompts: PromptSet, tokenizer: Any, *, max_tokens: int) -> PromptSet:
    """Return the prompts that fit into `max_tokens` with their targets, for supervised fine-tuning; the others are dropped and counted.

    ValueError for a prompt without a target, and if nothing is left.
    """
    kept = [prompt for prompt, target_ids in _with_target_ids(prompts.prompts, tokenizer) if len(prompt.ids) + len(target_ids) <= max_tokens]
    if not kept:
        raise ValueError(
            f"all {len(prompts)} prompts with their targets are longer than {max_tokens} tokens, which is what the student or "
            "training.micro_batch_tokens takes; shorten the data"
        )
    return replace(prompts, prompts=kept, num_dropped_long=prompts.num_dropped_long + len(prompts) - len(kept))


def response_ids(prompt: Prompt, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of the prompt's target and the end of sequence, for supervised fine-tuning; ValueError without a target."""
    return next(_with_target_ids([prompt], tokenizer))[1]


def _with_target_ids(prompts: Iterable[Prompt], tokenizer: Any) -> Iterator[tuple[Prompt, tuple[int, ...]]]:
    rest = iter(prompts)
    while chunk := list(islice(rest, _ROWS_AT_ONCE)):
        for prompt, ids in zip(chunk, tokenizer([_target(prompt) for prompt in chunk], add_special_tokens=False)["input_ids"]):
            yield prompt, (*ids, tokenizer.eos_token_id)


def _target(prompt: Prompt) -> str:
    if prompt.target is None:
        raise ValueError(
            f"prompt {prompt.index} ({prompt.messages[-1]['content']!r:.80}) has no text to learn from; supervised fine-tuning needs "
            "a trailing assistant message, a `response`, or an answer under data.answer_key in every row"
        )
    return prompt.target


def _rows_of_part(rows: Iterable[Row], part: Part, holdout_fraction: float, counts: _Counts) -> Iterator[Row]:
    seen: set[bytes] = set()
    for row in rows:
        counts.read += 1
        key = hashlib.blake2b(_canonical_json(row.messages), digest_size=16).digest()
        held_out = int.from_bytes(key[:8], "big") < holdout_fraction * 2**64
        if part != "all" and held_out != (part == "evaluation"):
            counts.other_part += 1
        elif part == "evaluation" and key in seen:
            counts.duplicates += 1
        else:
            seen.add(key)
            yield row


def _tokenized(rows: Iterator[Row], text: PromptText) -> Iterator[tuple[Row, ReadText, tuple[int, ...], tuple[int, ...] | None]]:
    """Yield each row with its texts, and the token ids of the student's and the teacher's; encoded many at once, which a fast tokenizer does in parallel."""
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        read = [text.of(row) for row in chunk]
        student_ids = _encoded([texts.student for texts in read], text.tokenizer)
        privileged = [texts.teacher for texts in read if texts.teacher is not None]
        teacher_ids = _encoded(privileged, text.teacher_tokenizer) if privileged else [None] * len(chunk)
        yield from zip(chunk, read, student_ids, teacher_ids, strict=True)


def _encoded(texts: list[str], tokenizer: Any) -> list[tuple[int, ...]]:
    # A chat template writes its special tokens itself.
    encoded = tokenizer(texts, add_special_tokens=not has_chat_template(tokenizer))["input_ids"]
    # A tokenizer that closes every text would have the student write after the end.
    is_closed = [not has_chat_template(tokenizer) and ids and ids[-1] == tokenizer.eos_token_id for ids in encoded]
    return [tuple(ids[:-1] if closed else ids) for ids, closed in zip(encoded, is_closed, strict=True)]


def _canonical_json(value: Any) -> bytes:
    return _CANONICAL.encode(value).encode()


def _nothing_left(data: DataConfig, part: Part, counts: _Counts, max_teacher_tokens: int | None) -> str:
    read = f"data.prompts={data.prompts!r} leaves no prompt for {part}: {counts.read} rows read"
    if counts.read == 0:
        return f"{read}; the source is empty, name another"
    dropped = (
        f"{counts.too_long} longer than data.max_prompt_tokens={data.max_prompt_tokens}, "
        f"{counts.other_part} belong to the other part (data.holdout_fraction={data.holdout_fraction})"
    )
    if counts.no_room:
        dropped += f", {counts.no_room} with a prompt of more than {max_teacher_tokens} tokens for the teacher, which leaves it no room for the response"
        way_out = "shorten privileged.template or the solutions, or the prompts, or lower rollout.max_response_tokens"
    else:
        way_out = "raise data.max_prompt_tokens" if counts.too_long else "change data.holdout_fraction or give more data"
    if part == "evaluation":
        way_out += ", or name evaluation.prompts as a source of its own, or set evaluation.prompts=0"
    return f"{read}, {dropped}; {way_out}"
