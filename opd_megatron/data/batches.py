"""One prompt with one response, and many of them as one padded micro-batch, and where in it the scored positions are.

Shapes: B sequences, S padded length, T scored positions of the micro-batch, sample after sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opd_megatron.parallel.context import context_rank, local_positions


@dataclass(frozen=True)
class Sample:
    """One prompt with one response. `sampled_logp` is the writer's log-probability of every response token, None for given text."""

    prompt_index: int
    sample_index: int
    prompt_ids: torch.Tensor
    response_ids: torch.Tensor
    sampled_logp: torch.Tensor | None
    finished: bool

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_scored(self) -> int:
        """Positions with a loss: each response token is predicted from the position before it."""
        return len(self.response_ids)


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """`scored_T` indexes the flattened [B * S] positions whose hidden state predicts a response token; `target_T` are those tokens."""

    tokens_BS: torch.Tensor
    scored_T: torch.Tensor
    target_T: torch.Tensor
    # The writer's log-probabilities; NaN where the text was given, not sampled.
    sampled_logp_T: torch.Tensor

    def context_window(self, *, size: int, rank: int) -> PaddedBatch:
        """Return what one of `size` context ranks holds: its positions of every sequence, and the scored ones among them, counted anew."""
        if size == 1:
            return self
        length, device = self.tokens_BS.size(1), self.tokens_BS.device
        position_S = local_positions(length, size, rank).to(device)
        place_T = self.scored_T % length
        own_T = context_rank(place_T, length, size) == rank
        row_T = self.scored_T[own_T] // length
        return PaddedBatch(
            tokens_BS=self.tokens_BS[:, position_S],
            scored_T=row_T * len(position_S) + torch.searchsorted(position_S, place_T[own_T]),
            target_T=self.target_T[own_T],
            sampled_logp_T=self.sampled_logp_T[own_T],
        )


def pad_samples(samples: Sequence[Sample], *, length: int, device: torch.device) -> PaddedBatch:
    """Return one batch, right-padded to `length`."""
    tokens_BS = torch.zeros(len(samples), length, dtype=torch.long)
    scored, targets, logps = [], [], []
    for row, sample in enumerate(samples):
        first, count = len(sample.prompt_ids), len(sample.response_ids)
        assert first > 0, "the first response token is predicted from the prompt"
        tokens_BS[row, :first] = sample.prompt_ids
        tokens_BS[row, first : first + count] = sample.response_ids
        # The last prompt position predicts the first response token.
        scored.append(torch.arange(count) + row * length + first - 1)
        targets.append(sample.response_ids)
        logps.append(sample.sampled_logp if sample.sampled_logp is not None else torch.full((count,), torch.nan))
    return PaddedBatch(
        tokens_BS=tokens_BS.to(device),
        scored_T=torch.cat(scored).to(device),
        target_T=torch.cat(targets).to(device),
        sampled_logp_T=torch.cat(logps).to(device),
    )
