"""From one position's logits to a token. Randomness is given, never drawn here: the same numbers give the same token in any layout.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy
import torch


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """`temperature=0` is greedy; `top_k=0` and `top_p=1` keep the whole vocabulary."""

    max_response_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def sample_tokens(logits_BV: torch.Tensor, uniform_B: torch.Tensor, settings: SamplingSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids [B] and their log-probabilities [B] under softmax(logits / temperature), before any truncation.

    `uniform_B` in [0, 1) picks by inverse transform sampling, so rounding differences between layouts change a token only where
    a cumulative probability falls on the drawn number. Truncation follows transformers: top-k first, then the smallest set reaching top-p.
    """
    scaled_BV = logits_BV.float() / (settings.temperature or 1.0)
    logp_BV = scaled_BV.log_softmax(-1)
    if settings.temperature == 0:
        token_B = logp_BV.argmax(-1)
    else:
        cumulative_BV = _truncate(logp_BV, settings).exp().double().cumsum(-1)
        threshold_B1 = uniform_B.to(cumulative_BV.device, torch.float64)[:, None] * cumulative_BV[:, -1:]
        token_B = (cumulative_BV <= threshold_B1).sum(-1).clamp_max(logp_BV.size(-1) - 1)
    return token_B, logp_BV.gather(-1, token_B[:, None])[:, 0]


def _truncate(logp_BV: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Return log-probabilities with everything outside top-k, then top-p, at minus infinity."""
    if settings.top_k and settings.top_k < logp_BV.size(-1):
        smallest_B1 = logp_BV.topk(settings.top_k).values[:, -1:]
        logp_BV = logp_BV.masked_fill(logp_BV < smallest_B1, -torch.inf)
    if settings.top_p < 1:
        sorted_BV, order_BV = logp_BV.softmax(-1).sort(descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        drop_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter_(-1, order_BV, before_BV >= settings.top_p)
        logp_BV = logp_BV.masked_fill(drop_BV, -torch.inf)
    return logp_BV


def uniform_stream(length: int, *key: int | str) -> torch.Tensor:
    """Return `length` numbers in [0, 1) that depend on nothing but `key`, such as (seed, step, prompt, sample).

    A counter-based generator with a 128-bit key: torch's CPU generator keeps 32 bits of a seed, so long runs would repeat streams.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    generator = numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.random(length))
