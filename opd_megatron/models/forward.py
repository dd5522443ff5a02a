"""One gradient-free forward through the pipeline, for rollouts, teacher scores and comparisons.

Shapes: B sequences, S length, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel

from opd_megatron.models.gpt import hidden_states_only
from opd_megatron.parallel.groups import ModelGroups


@contextmanager
def inference_mode(model: GPTModel, groups: ModelGroups) -> Iterator[None]:
    """Evaluation mode, no gradients, and no sequence parallelism: a decoding step has one position, which cannot be split."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _without_sequence_parallelism(model):
            yield
    finally:
        model.train(was_training)


# Where Megatron-Core's modules, and the configuration they share, remember that activations are split along the sequence.
_SEQUENCE_ATTRIBUTES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def _without_sequence_parallelism(model: GPTModel) -> Iterator[None]:
    """Switch sequence parallelism off in every module, and back to what each had.

    Megatron's set_model_to_sequence_parallel keeps the modules of each model in a cache by id(): a freed model's weights stay in memory,
    and a later model at the same address is not switched, on one rank and not on the next, which ends in a hang.
    """
    switched = [
        (owner, name, value)
        for owner in [model.config, *model.modules()]
        for name in _SEQUENCE_ATTRIBUTES
        if isinstance(value := getattr(owner, name, None), bool)
    ]
    for owner, name, _ in switched:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name, value in switched:
            setattr(owner, name, value)


def forward_hidden(model: GPTModel, groups: ModelGroups, tokens_BS: torch.Tensor, cache: StaticInferenceContext | None = None) -> torch.Tensor | None:
    """Return final hidden states [B, S, H] on every rank of the last stage, None on the others; call inside `inference_mode`.

    Every rank of the replica calls this with the same tokens. With a `cache`, `tokens_BS` continues the cached text,
    only the last position comes back ([B, 1, H]), and the cache advances by S.
    """
    batch, length = tokens_BS.shape
    offset = cache.sequence_len_offset if cache is not None else 0
    positions_BS = torch.arange(offset, offset + length, device=tokens_BS.device).expand(batch, -1)
    if not groups.is_first_stage:
        received = torch.empty(length, batch, model.config.hidden_size, dtype=model.config.pipeline_dtype, device=tokens_BS.device)
        dist.recv(received, src=groups.stage_neighbour(-1), group=groups.collection.pp)
        model.set_input_tensor(received)
    with hidden_states_only(model):
        # Megatron asserts gathered logits whenever a cache is used; the output layer is bypassed, so the flag costs nothing.
        output = model(tokens_BS, positions_BS, None, inference_context=cache, runtime_gather_output=True)
    if cache is not None:
        cache.sequence_len_offset += length
    if not groups.is_last_stage:
        dist.send(output.contiguous(), dst=groups.stage_neighbour(1), group=groups.collection.pp)
        return None
    return output
