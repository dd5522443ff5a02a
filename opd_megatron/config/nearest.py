"""Which layouts near a refused one would do: tried, not guessed, so that each that is named works."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from opd_megatron.config.models import ParallelLayout

_AXES = ("tensor", "pipeline", "context", "expert", "expert_tensor", "virtual")
_MOST_CHANGES = 3


def nearest_layouts(layout: ParallelLayout, num_ranks: int, check: Callable[[ParallelLayout], object], *, count: int = 3) -> list[ParallelLayout]:
    """Return up to `count` layouts for `num_ranks` ranks that `check` accepts (it raises ValueError for others), the nearest first.

    Those that change one size come before those that change two, and no more are looked for once there are some; then the smallest factors count.
    """
    for num_changes in range(1, _MOST_CHANGES + 1):
        near = sorted(_changes(layout, num_ranks, num_changes), key=lambda sizes: _distance(layout, sizes))
        found = list(itertools.islice(filter(None, (_accepted(layout, sizes, check) for sizes in near)), count))
        if found:
            return found
    return []


def name_changes(layout: ParallelLayout, other: ParallelLayout, prefix: str) -> str:
    """Return what turns one layout into another as KEY=VALUE words."""
    changed = [name for name in (*_AXES, "sequence") if getattr(layout, name) != getattr(other, name)]
    return " ".join(f"{prefix}{name}={str(getattr(other, name)).lower()}" for name in changed)


def _changes(layout: ParallelLayout, num_ranks: int, num_changes: int) -> Iterator[dict[str, int]]:
    """Yield every choice of so many other sizes that divides the ranks."""
    divisors = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    for axes in itertools.combinations(_AXES, num_changes):
        # Virtual stages cut layers, not ranks: only fewer of them are tried.
        choices = [range(1, layout.virtual) if axis == "virtual" else [size for size in divisors if size != getattr(layout, axis)] for axis in axes]
        for chosen in itertools.product(*choices):
            sizes = dict(zip(axes, chosen, strict=True))
            tensor, pipeline, context, expert, expert_tensor = (sizes.get(axis, getattr(layout, axis)) for axis in _AXES[:5])
            if num_ranks % (tensor * pipeline * context) == 0 and num_ranks % (expert * expert_tensor * pipeline) == 0:
                yield sizes


def _accepted(layout: ParallelLayout, sizes: Mapping[str, int], check: Callable[[ParallelLayout], object]) -> ParallelLayout | None:
    """Return the changed layout if it may be; without what they cut, sequence parallelism and virtual stages go as well."""
    cut = {"virtual": 1} if sizes.get("pipeline", layout.pipeline) == 1 else {}
    try:
        candidate = replace(layout, **{**sizes, **cut}, sequence=layout.sequence and sizes.get("tensor", layout.tensor) > 1)
        check(candidate)
    except ValueError:
        return None
    return candidate


def _distance(layout: ParallelLayout, sizes: Mapping[str, int]) -> float:
    return sum(abs(math.log2(size / getattr(layout, axis))) for axis, size in sizes.items())
