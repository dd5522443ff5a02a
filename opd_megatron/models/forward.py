"""One gradient-free forward through the pipeline, for rollouts, teacher scores and comparisons.

Shapes: B sequences, S length, N tokens of sequences with a paged cache, padded, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import BaseInferenceContext, DynamicInferenceContext, StaticInferenceContext
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from opd_megatron.models.gpt import ModelChunks, hidden_states_only, without_fp8
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.megatron import generating


@contextmanager
def inference_mode(model: ModelChunks, groups: ModelGroups, *, context_parallel: bool = False) -> Iterator[None]:
    """Evaluation mode, no gradients, and no sequence parallelism: a decoding step has one position, which cannot be split.

    With `context_parallel` the sequences stay split over the model's context ranks, for a pass over given text.
    Every rank of the model enters and leaves it. Replicas may make different numbers of forwards in between, or none: where experts are spread over
    ranks, one that is done lends its experts until all are.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), without_fp8(model), _switched_off(model, _ALWAYS if context_parallel else _ALWAYS | _CONTEXT):
            yield
            lend_experts(model, groups)
    finally:
        model.train(was_training)


@contextmanager
def without_recomputation(model: ModelChunks) -> Iterator[None]:
    """Let forwards without gradients prepare nothing for a backward: for parts of layers that are computed again, Megatron-Core does so in each of them."""
    with _switched_off(model, _RECOMPUTE):
        yield


def lend_experts(model: ModelChunks, groups: ModelGroups) -> None:
    """Run forwards of nothing but padding for as long as another replica has text: its tokens visit experts that are here. Inside `inference_mode`."""
    # An even number of positions, which context parallelism cuts into two chunks.
    padding_BS = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    while _in_step(groups, has_text=False, device=padding_BS.device):
        _forward(model, groups, padding_BS)


def _in_step(groups: ModelGroups, *, has_text: bool, device: torch.device) -> bool:
    """Return whether any replica has text for the next forward; every rank of a pipeline stage asks before each one. False where experts are not spread."""
    if not groups.layout.replicas_share_experts:
        return False
    busy = torch.tensor([float(has_text)], device=device)
    # The whole stage, and not the expert group: one that does not begin where a tensor group does ties others together.
    dist.all_reduce(busy, op=dist.ReduceOp.MAX, group=groups.collection.tp_dp_cp)
    return bool(busy)


# Where Megatron-Core's modules, and the configuration they share, remember that activations are split along the sequence; and what switches it off.
_SEQUENCE = {"sequence_parallel": False, "scatter_to_sequence_parallel": False, "reduce_scatter_embeddings": False}
# What makes a part of a layer again in the backward; in every forward the states of random numbers are read for it, for which a GPU has to be waited for.
_RECOMPUTE = dict.fromkeys(("recompute_mlp", "moe_layer_recompute", "activation_recompute", "recompute_input_layernorm", "recompute_pre_mlp_layernorm"), False)
_ALWAYS = _SEQUENCE | _RECOMPUTE
_CONTEXT = {"context_parallel_size": 1, "cp_group": None}


@contextmanager
def _switched_off(model: ModelChunks, settings: Mapping[str, Any]) -> Iterator[None]:
    """Give every module that has one of these attributes another value, and afterwards what each had.

    Megatron's set_model_to_sequence_parallel keeps the modules of each model in a cache by id(): a freed model's weights stay in memory,
    and a later model at the same address is not switched, on one rank and not on the next, which ends in a hang.
    """
    switched = [
        (owner, name, getattr(owner, name)) for owner in [model.config, *model.modules()] for name in settings if getattr(owner, name, None) is not None
    ]
    for owner, name, _ in switched:
        setattr(owner, name, settings[name])
    # Its results are cached by length, whether cut for a context rank or not.
    RotaryEmbedding.forward.cache_clear()
    try:
        yield
    finally:
        for owner, name, value in switched:
            setattr(owner, name, value)
        RotaryEmbedding.forward.cache_clear()


def forward_hidden(model: ModelChunks, groups: ModelGroups, tokens_BS: torch.Tensor, cache: StaticInferenceContext | None = None) -> torch.Tensor | None:
    """Return final hidden states [B, S, H] on every rank of the last stage, None on the others; call inside `inference_mode`.

    Every rank of the replica calls this with the same tokens. With a `cache`, `tokens_BS` continues the cached text,
    only the last position comes back ([B, 1, H]), and the cache advances by S.
    """
    _in_step(groups, has_text=True, device=tokens_BS.device)
    return _forward(model, groups, tokens_BS, cache)


def forward_paged(
    model: ModelChunks, groups: ModelGroups, cache: DynamicInferenceContext, replayed: Callable[[Callable[[], torch.Tensor]], torch.Tensor] | None = None
) -> torch.Tensor | None:
    """Return final hidden states [1, N, H] of the tokens that a paged cache has for its next step, on every rank of the last stage, None on the others.

    Every rank of the replica calls this with a cache in the same state, inside `inference_mode`. `replayed` runs the model in place of this function, which
    gives it the call: a recorded one, where the model is one stage.
    """
    tokens_1N, positions_1N = cache.current_input_and_position_ids()
    _in_step(groups, has_text=True, device=tokens_1N.device)
    if replayed is None:
        return _through_stages(model, groups, tokens_1N, positions_1N, cache)
    with hidden_states_only(model):
        return replayed(lambda: model.last(tokens_1N, positions_1N, None, inference_context=cache, runtime_gather_output=True))


def _forward(model: ModelChunks, groups: ModelGroups, tokens_BS: torch.Tensor, cache: StaticInferenceContext | None = None) -> torch.Tensor | None:
    batch, length = tokens_BS.shape
    offset = cache.sequence_len_offset if cache is not None else 0
    positions_BS = torch.arange(offset, offset + length, device=tokens_BS.device).expand(batch, -1)
    hidden_BSH = _through_stages(model, groups, tokens_BS, positions_BS, cache)
    if cache is not None:
        cache.sequence_len_offset += length
    return hidden_BSH


def _through_stages(
    model: ModelChunks, groups: ModelGroups, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, cache: BaseInferenceContext | None
) -> torch.Tensor | None:
    """Pass tokens through every stage, this rank's and the others'; return what the last one makes of them, on its ranks."""
    batch, length = tokens_BS.shape
    with hidden_states_only(model), generating(cache):
        for chunk in model:
            if not chunk.pre_process:
                received = torch.empty(length, batch, model.config.hidden_size, dtype=model.config.pipeline_dtype, device=tokens_BS.device)
                dist.recv(received, src=groups.stage_neighbour(-1), group=groups.collection.pp)
                chunk.set_input_tensor(received)
            # Megatron asserts gathered logits whenever a cache is used; the output layer is bypassed, so the flag costs nothing.
            output = chunk(tokens_BS, positions_BS, None, inference_context=cache, runtime_gather_output=True)
            if not chunk.post_process:
                dist.send(output.contiguous(), dst=groups.stage_neighbour(1), group=groups.collection.pp)
    return output if groups.is_last_stage else None
