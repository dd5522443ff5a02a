"""Generation by the training weights themselves, under the student's own tensor, pipeline and data parallelism.

What every engine gives, and the static one: our loop over Megatron-Core's model and its static key-value cache, on any machine.
Shapes: B sequences decoded together, S length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from opd_megatron.models.forward import forward_hidden, inference_mode
from opd_megatron.models.gpt import ModelChunks
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.rollout.next_token import NextToken
from opd_megatron.rollout.sampling import SamplingSettings, uniform_stream


@dataclass(frozen=True)
class Response:
    """What the model wrote after one prompt: ids with the end-of-sequence token if it came, and each token's log-probability."""

    ids: torch.Tensor
    logp: torch.Tensor
    finished: bool


class RolloutEngine(Protocol):
    """One model as a writer. Every rank of the model calls `generate`; those of a replica give the same prompts and get the same responses."""

    @property
    def groups(self) -> ModelGroups:
        """The layout that writes: prompts are divided over its writers."""
        ...

    @property
    def vocab_size(self) -> int:
        """How many ids it may write."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int | str, ...]], settings: SamplingSettings) -> list[Response]:
        """Return one response per prompt, in order. `keys` seeds each sequence on its own, so batching and layout change nothing."""
        ...


class Sampler:
    """The static engine: sequences of similar length are decoded together until the last of them has ended."""

    def __init__(self, model: ModelChunks, groups: ModelGroups, *, vocab_size: int, eos_ids: Sequence[int], batch_sequences: int) -> None:
        self.model = model
        self.groups = groups
        self.vocab_size = vocab_size
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.eos_ids = torch.tensor(sorted(set(eos_ids)), device=self.device)
        self.batch_sequences = batch_sequences
        self._next = NextToken(model=model, groups=groups, vocab_size=vocab_size, device=self.device)

    def generate(self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int | str, ...]], settings: SamplingSettings) -> list[Response]:
        """Return one response per prompt, in order. `keys` seeds each sequence on its own, so batching and layout change nothing.

        Prompts of similar length are decoded together: a batch starts at its shortest prompt and longer ones are fed token by token.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        responses: list[Response | None] = [None] * len(prompts)
        with inference_mode(self.model, self.groups):
            for start in range(0, len(order), self.batch_sequences):
                chosen = order[start : start + self.batch_sequences]
                batch = self._generate_batch([prompts[i] for i in chosen], [keys[i] for i in chosen], settings)
                for index, response in zip(chosen, batch, strict=True):
                    responses[index] = response
        return [response for response in responses if response is not None]

    def _generate_batch(self, prompts: list[Sequence[int]], keys: list[tuple[int | str, ...]], settings: SamplingSettings) -> list[Response]:
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        total = int(lengths_B.max()) + settings.max_response_tokens
        tokens_BS = torch.zeros(len(prompts), total, dtype=torch.long, device=self.device)
        for row, prompt in enumerate(prompts):
            tokens_BS[row, : len(prompt)] = torch.tensor(prompt, device=self.device)
        logp_BS = torch.zeros(len(prompts), total, device=self.device)
        uniform_BS = torch.stack([uniform_stream(settings.max_response_tokens, *key) for key in keys])
        done_B = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        stop_B = lengths_B + settings.max_response_tokens
        cache = StaticInferenceContext(len(prompts), total)
        start, position = 0, int(lengths_B.min())
        while position < total and not bool(done_B.all()):
            if position - start == 1:
                cache.enable_decode_mode()
            drawn_B = uniform_BS.gather(1, (position - lengths_B.cpu()).clamp(0, settings.max_response_tokens - 1)[:, None])[:, 0]
            token_B, step_logp_B = self._next_token(tokens_BS[:, start:position], drawn_B, cache, settings)
            in_prompt_B = lengths_B > position
            writes_B = ~in_prompt_B & ~done_B
            tokens_BS[:, position] = torch.where(writes_B, token_B, tokens_BS[:, position])
            logp_BS[:, position] = torch.where(writes_B, step_logp_B, 0.0)
            ended_B = writes_B & torch.isin(token_B, self.eos_ids)
            start, position = position, position + 1
            done_B = done_B | ended_B | (stop_B <= position)
        return self._collect(tokens_BS, logp_BS, lengths_B, stop_B)

    def _next_token(
        self, input_BS: torch.Tensor, uniform_B: torch.Tensor, cache: StaticInferenceContext, settings: SamplingSettings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sampled next token and its log-probability, the same on every rank of the replica."""
        hidden_B1H = forward_hidden(self.model, self.groups, input_BS, cache)
        return self._next.draw(hidden_B1H[:, -1] if hidden_B1H is not None else None, uniform_B, settings)

    def _collect(self, tokens_BS: torch.Tensor, logp_BS: torch.Tensor, lengths_B: torch.Tensor, stop_B: torch.Tensor) -> list[Response]:
        """Cut each row after its first end-of-sequence token, or where its budget ends."""
        responses = []
        is_eos_BS = torch.isin(tokens_BS, self.eos_ids)
        for row, (first, stop) in enumerate(zip(lengths_B.tolist(), stop_B.tolist(), strict=True)):
            ends = is_eos_BS[row, first:stop].nonzero()
            finished = ends.numel() > 0
            last = first + int(ends[0]) + 1 if finished else stop
            responses.append(Response(tokens_BS[row, first:last].cpu().clone(), logp_BS[row, first:last].cpu().clone(), finished))
        return responses
