"""What to change where a plan does not fit: chosen by what is largest, and planned anew before it is named."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from opd_megatron.config import RunConfig, apply_overrides
from opd_megatron.planning.memory import Term
from opd_megatron.planning.plan import Plan, make_plan
from opd_megatron.planning.text import GIB

# A remedy is tried at 2, 4 and 8 times its strength.
_DOUBLINGS = (2, 4, 8)
_NUM_SHOWN = 3
# The keys that shrink a term; `*` grows, `/` shrinks.
_REMEDIES = {
    "weights": ("*student.layout.expert", "*student.layout.tensor", "*student.layout.pipeline"),
    "gradients": ("training.offload_optimizer=true", "*student.layout.expert", "*student.layout.tensor", "*student.layout.pipeline"),
    "optimizer": ("training.offload_optimizer=true", "*world_size", "*student.layout.tensor", "*student.layout.pipeline"),
    "activations": (
        "training.recompute=full",
        "/training.micro_batch",
        "student.layout.sequence=true",
        "*student.layout.tensor",
        "*student.layout.context",
        "/rollout.max_response_tokens",
    ),
    "recomputed layer": ("/training.micro_batch", "student.layout.sequence=true", "*student.layout.tensor", "*student.layout.context"),
    "loss chunk": ("*student.layout.tensor", "/training.micro_batch", "loss.chunk_tokens=256"),
    "head gradient": ("*student.layout.tensor",),
    "teacher head slice": ("*student.layout.tensor",),
    "teacher weights": ("teacher.placement=offloaded", "*teacher.layout.expert", "*teacher.layout.tensor", "*teacher.layout.pipeline"),
    "average": ("teacher.weights=initial", "*world_size", "*student.layout.tensor", "*student.layout.pipeline"),
    "weights on their way": ("teacher.weights=initial",),
    "rollout weights": ("*rollout.layout.expert", "*rollout.layout.tensor", "*rollout.layout.pipeline"),
    "teacher forward": ("/teacher.micro_batch", "*teacher.layout.tensor", "*teacher.layout.context"),
    "payload": ("*world_size", "/data.batch_prompts"),
    "KV cache": ("/rollout.batch_sequences", "*student.layout.tensor"),
    "prompts": ("/rollout.batch_sequences",),
    "sampling": ("/rollout.batch_sequences",),
}


def shortfall(plan: Plan, gpu_memory_bytes: int, published: Sequence[Path], check: Callable[[RunConfig], object] = lambda config: None) -> str | None:
    """Return None if every rank fits, else what the largest rank needs, its largest terms, and up to three changes after which the plan would fit.

    `check` raises ValueError for configurations that a run would refuse: no change is named that leads to one.
    """
    largest = plan.largest
    if largest.total_bytes <= gpu_memory_bytes:
        return None
    terms = largest.peak_terms
    parts = ", ".join(f"{term.name} {term.num_bytes / GIB:.1f}" for term in terms[:3])
    changes = (_smallest_change(plan.config, key, gpu_memory_bytes, published, check) for key in _keys(terms))
    fits = list(itertools.islice((change for change in changes if change is not None), _NUM_SHOWN))
    way_out = (
        f"it would fit with {', or '.join(fits)}" if fits else "no single change of those tried fits; combine more ranks, a wider layout and shorter responses"
    )
    return f"rank {largest.rank} needs {largest.total_bytes / GIB:.1f} of {gpu_memory_bytes / GIB:.1f} GiB; largest: {parts} GiB; {way_out}"


def _keys(terms: list[Term]) -> list[str]:
    """Return the remedies of the three largest terms, those of the largest first, each once."""
    return list(dict.fromkeys(key for term in terms[:3] for key in _REMEDIES[_kind(term)]))


def _kind(term: Term) -> str:
    """Return the name of a term without its phase."""
    return term.name.partition(",")[0]


def _smallest_change(config: RunConfig, key: str, gpu_memory_bytes: int, published: Sequence[Path], check: Callable[[RunConfig], object]) -> str | None:
    """Return the weakest form of a remedy that fits, as KEY=VALUE with what the largest rank then needs; None if none does."""
    for change in [key] if "=" in key else _strengths(config, key):
        try:
            changed = apply_overrides(config, [change])
            check(changed)
            plan = make_plan(changed, published)
        except ValueError:
            continue
        if plan.largest.total_bytes <= gpu_memory_bytes:
            return f"{change} ({plan.largest.total_bytes / GIB:.1f} GiB)"
    return None


def _strengths(config: RunConfig, key: str) -> list[str]:
    """Return `key` grown or shrunk by each factor."""
    operation, name = key[0], key[1:]
    value: int = config  # type: ignore[assignment]
    for part in name.split("."):
        value = getattr(value, part)
    values = [value * factor if operation == "*" else value // factor for factor in _DOUBLINGS]
    return [f"{name}={changed}" for changed in values if changed >= 1]
