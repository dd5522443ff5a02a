"""One prompt with one response, and many of them as one padded micro-batch, and where in it the scored positions are.

Shapes: B sequences, S padded length, T scored positions of the micro-batch, sample after sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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


def pad_samples(samples: Sequence[Sample], *, multiple: int, device: torch.device, length: int | None = None) -> PaddedBatch:
    """Return one right-padded batch; S is `length`, or the longest sample, rounded up to `multiple` (sequence parallelism splits it)."""
    longest = length or max(len(sample.prompt_ids) + len(sample.response_ids) for sample in samples)
    padded = -(-longest // multiple) * multiple
    tokens_BS = torch.zeros(len(samples), padded, dtype=torch.long)
    scored, targets, logps = [], [], []
    for row, sample in enumerate(samples):
        first, count = len(sample.prompt_ids), len(sample.response_ids)
        assert first > 0, "the first response token is predicted from the prompt"
        tokens_BS[row, :first] = sample.prompt_ids
        tokens_BS[row, first : first + count] = sample.response_ids
        # The last prompt position predicts the first response token.
        scored.append(torch.arange(count) + row * padded + first - 1)
        targets.append(sample.response_ids)
        logps.append(sample.sampled_logp if sample.sampled_logp is not None else torch.full((count,), torch.nan))
    return PaddedBatch(
        tokens_BS=tokens_BS.to(device),
        scored_T=torch.cat(scored).to(device),
        target_T=torch.cat(targets).to(device),
        sampled_logp_T=torch.cat(logps).to(device),
    )
