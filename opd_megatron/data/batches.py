"""One prompt with one response, and many of them as one micro-batch, padded or packed, and where in it the scored positions are.

Shapes: B rows, S positions of a row, N = B * S, T scored positions of the micro-batch, sample after sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opd_megatron.parallel.context import context_rank


@dataclass(frozen=True)
class UnitSpans:
    """N units of a response that have a loss: response tokens [student_start, student_stop) and, of the teacher's, [teacher_start, teacher_stop).

    Both are in ascending order, without overlap. `has_column_N` marks units that are a column of their own in their row of the loss, `is_end_N` the ends
    of responses.
    """

    student_start_N: torch.Tensor
    student_stop_N: torch.Tensor
    teacher_start_N: torch.Tensor
    teacher_stop_N: torch.Tensor
    has_column_N: torch.Tensor
    is_end_N: torch.Tensor

    def __len__(self) -> int:
        return len(self.student_start_N)

    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the starts and stops [N], student's first."""
        return self.student_start_N, self.student_stop_N, self.teacher_start_N, self.teacher_stop_N

    def of_teacher(self, num_tokens: int) -> torch.Tensor:
        """Return the unit [R] of each of the teacher's response tokens, -1 where it belongs to none."""
        unit_R = torch.full((num_tokens,), -1)
        places_T, unit_T = spans(self.teacher_start_N, self.teacher_stop_N)
        unit_R[places_T] = unit_T
        return unit_R


def spans(start_N: torch.Tensor, stop_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places within N spans, span after span, and the span of each."""
    length_N = stop_N - start_N
    unit_R = torch.arange(len(length_N)).repeat_interleave(length_N)
    first_N = length_N.cumsum(0) - length_N
    return torch.arange(len(unit_R)) - first_N[unit_R] + start_N[unit_R], unit_R


@dataclass(frozen=True)
class Sample:
    """One prompt with one response. `sampled_logp` is the writer's log-probability of every response token, None for given text.

    A privileged teacher, or one with another tokenizer, reads `teacher_prompt_ids` in place of the prompt. The response is the same text; a teacher with
    another tokenizer reads it as `teacher_response_ids`, and `units` say which of its tokens belong to which of the student's.
    """

    prompt_index: int
    sample_index: int
    prompt_ids: torch.Tensor
    response_ids: torch.Tensor
    sampled_logp: torch.Tensor | None
    finished: bool
    teacher_prompt_ids: torch.Tensor | None = None
    teacher_response_ids: torch.Tensor | None = None
    units: UnitSpans | None = None

    def as_teacher_reads(self) -> Sample:
        """Return the sample with the teacher's tokens."""
        read = self
        if self.teacher_response_ids is not None:
            read = replace(read, response_ids=self.teacher_response_ids, sampled_logp=None, teacher_response_ids=None, units=None)
        return read if read.teacher_prompt_ids is None else replace(read, prompt_ids=read.teacher_prompt_ids, teacher_prompt_ids=None)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_scored(self) -> int:
        """Positions with a loss: each response token is predicted from the position before it."""
        return len(self.response_ids)


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Rows of text. `scored_T` indexes the flattened [B * S] positions whose hidden state predicts a response token; `target_T` are those tokens.

    `sequences` are the lengths, before any split over context ranks, of what attends only to itself: B rows of S positions, or the parts of a packed row.
    """

    tokens_BS: torch.Tensor
    sequences: tuple[int, ...]
    packed: bool
    scored_T: torch.Tensor
    target_T: torch.Tensor
    # The writer's log-probabilities; NaN where the text was given, not sampled.
    sampled_logp_T: torch.Tensor
    # Places of the targets among all response tokens of the samples, one sample after another.
    token_T: torch.Tensor

    def to(self, device: torch.device) -> TokenBatch:
        """Return it where it is computed with."""
        moved: dict[str, Any] = {name: on_device(getattr(self, name), device) for name in ("tokens_BS", "scored_T", "target_T", "sampled_logp_T", "token_T")}
        return replace(self, **moved)

    def context_window(self, *, size: int, rank: int) -> TokenBatch:
        """Return what one of `size` context ranks holds: its positions of every sequence, and the scored ones among them, counted anew.

        Done on the host: a selection by a mask waits for the GPU, which has to say how many there are.
        """
        if size == 1:
            return self
        owner_N = torch.cat([context_rank(torch.arange(length), length, size) for length in self.sequences])
        own_N = owner_N == rank
        place_N = own_N.cumsum(0) - 1
        own = self.scored_only(own_N[self.scored_T])
        return replace(own, tokens_BS=self.tokens_BS.flatten()[own_N].view(self.tokens_BS.size(0), -1), scored_T=place_N[own.scored_T])

    def gathered_places(self, size: int) -> torch.Tensor:
        """Return where each of the B * S positions is once the windows of `size` context ranks are put one after another, on the host."""
        if size == 1:
            return torch.arange(self.tokens_BS.numel())
        owner_N = torch.cat([context_rank(torch.arange(length), length, size) for length in self.sequences])
        place_N = torch.empty_like(owner_N)
        place_N[owner_N.sort(stable=True).indices] = torch.arange(len(owner_N))
        return place_N

    def scored_only(self, kept_T: torch.Tensor) -> TokenBatch:
        """Return the same text with a loss at some of the scored positions only, given by a mask or by their indices."""
        return replace(
            self,
            scored_T=self.scored_T[kept_T],
            target_T=self.target_T[kept_T],
            sampled_logp_T=self.sampled_logp_T[kept_T],
            token_T=self.token_T[kept_T],
        )


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host where it is computed with. A copy from pinned memory does not wait for what the GPU still computes, any other does."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not tensor.is_cuda else tensor.to(device)


def pad_samples(samples: Sequence[Sample], *, length: int, num_rows: int | None = None) -> TokenBatch:
    """Return, on the host, one sample a row, right-padded to `length`; rows beyond the samples, up to `num_rows`, are padding alone."""
    num_rows = num_rows or len(samples)
    return _lay_out(samples, [row * length for row in range(len(samples))], (length,) * num_rows, packed=False)


def pack_samples(samples: Sequence[Sample], lengths: Sequence[int], *, row_length: int, longest: int) -> TokenBatch:
    """Return one row of samples one after another, each right-padded to its length, and padding up to `row_length` in pieces of at most `longest`.

    It is on the host.
    """
    starts = list(itertools.accumulate(lengths, initial=0))
    # Padding is cut like text: attention over one long sequence would cost more than over the samples.
    unused = row_length - starts[-1]
    padding = [min(longest, unused - start) for start in range(0, unused, longest)]
    return _lay_out(samples, starts[:-1], (*lengths, *padding), packed=True)


def _lay_out(samples: Sequence[Sample], starts: Sequence[int], sequences: tuple[int, ...], *, packed: bool) -> TokenBatch:
    """Write the samples into flattened positions from `starts` on."""
    token_N = torch.zeros(sum(sequences), dtype=torch.long)
    # Without a sample there is nothing to concatenate.
    scored, targets, logps = [token_N[:0]], [token_N[:0]], [torch.empty(0)]
    for start, sample in zip(starts, samples, strict=True):
        first, count = len(sample.prompt_ids), len(sample.response_ids)
        assert first > 0, "the first response token is predicted from the prompt"
        token_N[start : start + first] = sample.prompt_ids
        token_N[start + first : start + first + count] = sample.response_ids
        # The last prompt position predicts the first response token.
        scored.append(torch.arange(count) + start + first - 1)
        targets.append(sample.response_ids)
        logps.append(sample.sampled_logp if sample.sampled_logp is not None else torch.full((count,), torch.nan))
    return TokenBatch(
        tokens_BS=token_N.view(1 if packed else len(sequences), -1),
        sequences=sequences,
        packed=packed,
        scored_T=torch.cat(scored),
        target_T=torch.cat(targets),
        sampled_logp_T=torch.cat(logps),
        token_T=torch.arange(sum(map(len, targets))),
    )
