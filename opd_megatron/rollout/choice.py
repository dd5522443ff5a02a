"""Which engine writes with a model on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import torch
import torch.distributed as dist

from opd_megatron.config import RolloutConfig
from opd_megatron.models.architecture import Architecture
from opd_megatron.models.gpt import ModelChunks
from opd_megatron.models.paging import why_not_paged
from opd_megatron.packages import probe
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.megatron import makes_paged_caches
from opd_megatron.rollout.dynamic import DynamicSampler
from opd_megatron.rollout.engine import RolloutEngine, Sampler

# The version of flash-attention from which Megatron-Core's paged attention takes it.
_FLASH_ATTENTION = "2.7.3"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The engine, and why it is not the other one."""

    engine: Literal["static", "dynamic"]
    why: str

    def __str__(self) -> str:
        return f"rollout engine: {self.engine} ({self.why})"


def choose_engine(wanted: Literal["auto", "static", "dynamic"], architecture: Architecture, groups: ModelGroups, precision: Literal["bf16", "fp32"]) -> Choice:
    """Return the engine that writes with a model; ValueError where `dynamic` is wanted and cannot be had."""
    if wanted == "static":
        return Choice(engine="static", why="rollout.engine=static")
    problem = why_not_paged(architecture, groups.layout, precision) or _why_not_here()
    if problem is None:
        return Choice(engine="dynamic", why=f"rollout.engine={wanted}, {probe('flash_attn')}")
    if wanted == "dynamic":
        raise ValueError(f"rollout.engine=dynamic cannot be had: {problem}; set it to auto or static")
    return Choice(engine="static", why=problem)


def agreed_choice(own: Choice) -> Choice:
    """Return one choice for all ranks of the model's world, each of which has made its own: dynamic only where all nodes have what it needs."""
    choices: list[Choice] = [own] * dist.get_world_size()
    dist.all_gather_object(choices, own)
    return next((choice for choice in choices if choice.engine == "static"), own)


def _why_not_here() -> str | None:
    """Return what this process lacks for Megatron-Core's paged attention, or None."""
    if not torch.cuda.is_available():
        return "the paged attention needs a GPU"
    if not makes_paged_caches():
        return f"megatron-core is {version('megatron-core')}, and from 0.17 on its DynamicInferenceContext is made in another way; install 0.16.1"
    package = probe("flash_attn")
    if not package.works:
        return str(package)
    from megatron.core.utils import is_fa_min_version

    return None if is_fa_min_version(_FLASH_ATTENTION) else f"{package} is older than {_FLASH_ATTENTION}"


def make_engine(choice: Choice, model: ModelChunks, groups: ModelGroups, rollout: RolloutConfig, *, vocab_size: int, eos_ids: Sequence[int]) -> RolloutEngine:
    """Return a model as a writer."""
    if choice.engine == "static":
        return Sampler(model, groups, vocab_size=vocab_size, eos_ids=eos_ids, batch_sequences=rollout.batch_sequences)
    return DynamicSampler(
        model,
        groups,
        vocab_size=vocab_size,
        eos_ids=eos_ids,
        batch_sequences=rollout.batch_sequences,
        kv_cache_gib=rollout.kv_cache_gib,
        # A recorded step has one stage and no messages whose size depends on the tokens; a teacher that is measured may have both.
        cuda_graphs=rollout.cuda_graphs and groups.layout.pipeline == 1 and model.config.num_moe_experts is None,
    )
