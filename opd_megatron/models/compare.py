"""What transformers' own model computes against what this rank's Megatron-Core model computes, on the same tokens: logits, and what passes between layers.

Shapes: B sequences, S length, H hidden, V vocabulary, W this rank's slice of V.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.models.forward import forward_hidden, inference_mode
from opd_megatron.models.gpt import ModelChunks, head_weight
from opd_megatron.parallel.groups import ModelGroups

# What passes through a model, by name and in order: `embedding` (what enters the first layer), `layers.N` (what leaves it), `norm`, `logits`.
Parts = dict[str, torch.Tensor]


def megatron_logits(model: ModelChunks, groups: ModelGroups, tokens_BS: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """Return fp32 logits [B, S, V] without padded columns on the last stage, None on the others."""
    with inference_mode(model, groups):
        hidden_BSH = forward_hidden(model, groups, tokens_BS)
        if hidden_BSH is None:
            return None
        logits_BSW = (hidden_BSH @ head_weight(model).t()).float().contiguous()
        if model.logit_softcap is not None:
            logits_BSW.div_(model.logit_softcap).tanh_().mul_(model.logit_softcap)
    parts = [torch.empty_like(logits_BSW) for _ in range(groups.layout.tensor)]
    dist.all_gather(parts, logits_BSW, group=groups.collection.tp)
    return torch.cat(parts, dim=-1)[..., :vocab_size]


def megatron_parts(model: ModelChunks, groups: ModelGroups, tokens_S: torch.Tensor, vocab_size: int) -> Parts | None:
    """Return the parts of one sequence, [S, H] in the model's dtype and [S, V] in fp32, on the host of every rank of the last stage; None on the others."""
    seen: Parts = {}
    with ExitStack() as hooks:
        for chunk in model:
            for layer in chunk.decoder.layers:
                number = layer.layer_number - 1
                if number == 0:
                    hooks.enter_context(_watched(layer, seen, entering="embedding"))
                hooks.enter_context(_watched(layer, seen, leaving=f"layers.{number}"))
            if chunk.decoder.final_layernorm is not None:
                hooks.enter_context(_watched(chunk.decoder.final_layernorm, seen, leaving="norm"))
        logits_BSV = megatron_logits(model, groups, tokens_S[None], vocab_size)
    stage_group = groups.collection.pp
    # Megatron's activations are [S, B, H].
    own = {name: state_SBH[:, 0].cpu() for name, state_SBH in seen.items()}
    stages: list[Parts] | None = [{} for _ in range(groups.layout.pipeline)] if groups.is_last_stage else None
    dist.gather_object(own, stages, dst=dist.get_global_rank(stage_group, groups.layout.pipeline - 1), group=stage_group)
    if stages is None or logits_BSV is None:
        return None
    return {**{name: state for stage in stages for name, state in stage.items()}, "logits": logits_BSV[0].cpu()}


def load_transformers(folder: Path, dtype: torch.dtype) -> Any:
    """Return transformers' model of a folder, in evaluation mode, with the attention that computes what the model defines; ValueError if it reads none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    try:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(folder, local_files_only=True))]
        # PyTorch's attention has no soft-capping of its scores, which Gemma 2 has.
        attention = "sdpa" if model_class._supports_sdpa else "eager"
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, attn_implementation=attention).eval()
    except Exception as error:  # its checks of a configuration raise classes of several libraries
        raise ValueError(
            f"transformers cannot read {folder}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        ) from error


def transformers_logits(folder: Path, sequences: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return fp32 logits [S, V] of each sequence by transformers' implementation of the folder's model."""
    model = load_transformers(folder, dtype)
    with torch.no_grad():
        return [model(sequence[None]).logits[0].float() for sequence in sequences]


def transformers_parts(model: Any, tokens_S: torch.Tensor) -> Parts:
    """Return the parts of one sequence, [S, H] in the model's dtype and [S, V] in fp32, by a model that `load_transformers` returned."""
    seen: Parts = {}
    decoder = model.model
    with ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(_watched(decoder.layers[0], seen, entering="embedding"))
        for number, layer in enumerate(decoder.layers):
            hooks.enter_context(_watched(layer, seen, leaving=f"layers.{number}"))
        hooks.enter_context(_watched(decoder.norm, seen, leaving="norm"))
        logits_BSV = model(tokens_S[None]).logits
    return {**{name: state_BSH[0] for name, state_BSH in seen.items()}, "logits": logits_BSV[0].float()}


@contextmanager
def _watched(module: torch.nn.Module, seen: Parts, *, entering: str | None = None, leaving: str | None = None) -> Iterator[None]:
    """Keep the hidden states that first enter or leave a module under a name. Later ones are of padding: see `inference_mode`."""

    def enters(_module: torch.nn.Module, words: tuple[Any, ...], named: dict[str, Any]) -> None:
        if entering is not None:
            seen.setdefault(entering, words[0] if words else named["hidden_states"])

    def leaves(_module: torch.nn.Module, _words: Any, output: Any) -> None:
        if leaving is not None:
            seen.setdefault(leaving, output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_pre_hook(enters, with_kwargs=True), module.register_forward_hook(leaves)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one part is from its reference: the largest absolute difference, and the largest absolute value of the reference."""

    name: str
    absolute: float
    scale: float

    @property
    def relative(self) -> float:
        return self.absolute / self.scale if self.scale else (0.0 if self.absolute == 0 else float("inf"))


def difference_of_parts(ours: Parts, reference: Parts) -> list[Difference]:
    """Return how far each part of one sequence is from the reference's, in the reference's order."""
    assert ours.keys() == reference.keys(), (list(ours), list(reference))
    return [
        Difference(name=name, absolute=float((ours[name].float() - state.float()).abs().max()), scale=float(state.abs().max()))
        for name, state in reference.items()
    ]


def largest(differences: Iterable[Sequence[Difference]]) -> list[Difference]:
    """Return the largest values of each part over several sequences."""

    def most(values: Iterable[float]) -> float:
        # Python's max() forgets a nan.
        return float(torch.tensor(list(values), dtype=torch.float64).max())

    return [
        Difference(name=same[0].name, absolute=most(one.absolute for one in same), scale=most(one.scale for one in same))
        for same in zip(*differences, strict=True)
    ]
