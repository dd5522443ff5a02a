"""What to change where a plan does not fit: chosen by what is largest, and planned anew before it is named."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opd_megatron.config import RunConfig, apply_overrides
from opd_megatron.planning.memory import RankMemory, Term
from opd_megatron.planning.plan import make_plan
from opd_megatron.planning.text import GIB

# A remedy is tried at 2, 4 and 8 times its strength.
_DOUBLINGS = (2, 4, 8)
_NUM_SHOWN = 3
# Changes that are tried together where none is enough.
_MOST_TOGETHER = 6
# A recipe that needs less than this part of a GPU is no substitute for one that does not fit on it: tiny models for a laptop.
_LEAST_SHARE = 0.05
# The keys that shrink a term; `*` grows, `/` shrinks.
_REMEDIES = {
    "weights": ("*student.layout.expert", "*student.layout.tensor", "*student.layout.pipeline"),
    "gradients": ("training.offload_optimizer=true", "*student.layout.expert", "*student.layout.tensor", "*student.layout.pipeline"),
    "optimizer": ("training.offload_optimizer=true", "*world_size", "*student.layout.tensor", "*student.layout.pipeline"),
    "activations": (
        "training.recompute=selective",
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
    "KV cache": ("/rollout.batch_sequences", "*student.layout.tensor", "/rollout.max_response_tokens"),
    "prompts": ("/rollout.batch_sequences",),
    "sampling": ("/rollout.batch_sequences",),
}


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What a message may name as a way out.

    `published` are the architectures of models that are not here (`know_model`), `recipes` the other runs by name, smaller ones among them. `check` raises
    ValueError for configurations that a run would refuse: no change is named that leads to one.
    """

    published: Sequence[Path]
    recipes: Mapping[str, Callable[[], RunConfig]] = field(default_factory=dict)
    check: Callable[[RunConfig], object] = lambda config: None

    def planned(self, config: RunConfig) -> RankMemory | None:
        """Return what the largest rank would need; None of a run that would be refused."""
        try:
            self.check(config)
            return make_plan(config, self.published).largest
        except ValueError:
            return None


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """KEY=VALUE changes of a configuration, and what the largest rank then needs."""

    changes: tuple[str, ...]
    total_bytes: int

    def __str__(self) -> str:
        return f"{' and '.join(self.changes)} ({self.total_bytes / GIB:.1f} GiB)"


def shortfall(config: RunConfig, memory: RankMemory, free_bytes: int, catalogue: Catalogue) -> str | None:
    """Return None if a rank's planned memory is free, else what it needs, by part, the changes after which all ranks would fit, and recipes that fit."""
    if memory.total_bytes <= free_bytes:
        return None
    terms = memory.peak_terms
    shown = [term for place, term in enumerate(terms) if place < _NUM_SHOWN or term.num_bytes >= GIB // 20]
    parts = ", ".join(f"{term.name} {term.num_bytes / GIB:.1f}" for term in shown)
    fits = remedies(config, memory, free_bytes, catalogue)
    if not fits:
        way_out = "no single change of those tried fits, nor all together; use more ranks, a wider layout and shorter responses"
    else:
        alone = "it would" if len(fits[0].changes) == 1 else "no single change of those tried fits; it would"
        way_out = f"{alone} fit with {', or '.join(map(str, fits))}"
    others = [f"{name} ({size / GIB:.1f} GiB)" for name, size in fitting_recipes(config, free_bytes, catalogue)]
    smaller = f"; recipes for at most {config.world_size} ranks that fit: {', '.join(others)}" if others else ""
    need = f"rank {memory.rank} needs {memory.total_bytes / GIB:.1f} of {free_bytes / GIB:.1f} GiB"
    return f"{need}; largest: {parts} GiB, at the peak in {memory.peak_phase}; {way_out}{smaller}"


def remedies(config: RunConfig, memory: RankMemory, free_bytes: int, catalogue: Catalogue) -> list[Remedy]:
    """Return up to three changes, each alone enough for all ranks to fit; where there is none, one set of changes that is; or nothing."""
    changes = (_smallest_change(config, key, free_bytes, catalogue) for key in _keys(memory.peak_terms))
    alone = list(itertools.islice((change for change in changes if change is not None), _NUM_SHOWN))
    return alone or list(_together(config, memory, free_bytes, catalogue))


def fitting_recipes(config: RunConfig, free_bytes: int, catalogue: Catalogue) -> list[tuple[str, int]]:
    """Return up to three recipes for no more ranks, of different models, that fit, and what their largest rank needs: the largest first."""
    sizes: dict[str, int] = {}
    models: dict[str, tuple[str | None, ...]] = {}
    for name, recipe in catalogue.recipes.items():
        other = recipe()
        largest = catalogue.planned(other) if other.world_size <= config.world_size else None
        if largest is not None and _LEAST_SHARE * free_bytes <= largest.total_bytes <= free_bytes:
            sizes[name] = largest.total_bytes
            models[name] = (other.student.hf, other.teacher.hf if other.teacher is not None else None)
    largest_first = sorted(sizes, key=lambda name: -sizes[name])
    of_models = {models[name]: name for name in reversed(largest_first)}
    return [(name, sizes[name]) for name in largest_first if of_models[models[name]] == name][:_NUM_SHOWN]


def _keys(terms: list[Term]) -> list[str]:
    """Return the remedies of the three largest terms, those of the largest first, each once."""
    return list(dict.fromkeys(key for term in terms[:3] for key in _REMEDIES[_kind(term)]))


def _kind(term: Term) -> str:
    """Return the name of a term without its phase."""
    return term.name.partition(",")[0]


def _smallest_change(config: RunConfig, key: str, free_bytes: int, catalogue: Catalogue) -> Remedy | None:
    """Return the weakest form of a remedy that fits; None if none does."""
    for change, _, memory in _changed(config, key, catalogue):
        if memory.total_bytes <= free_bytes:
            return Remedy(changes=(change,), total_bytes=memory.total_bytes)
    return None


def _together(config: RunConfig, memory: RankMemory, free_bytes: int, catalogue: Catalogue) -> Iterator[Remedy]:
    """Yield one set of changes that fits, if there is one: again and again the change that saves most."""
    made: dict[str, str] = {}
    for _ in range(_MOST_TOGETHER):
        tried = [tried for key in _keys(memory.peak_terms) for tried in _changed(config, key, catalogue)]
        if not tried:
            return
        change, config, smaller = min(tried, key=lambda entry: entry[2].total_bytes)
        if smaller.total_bytes >= memory.total_bytes:
            return
        # A key that is changed again has its last value.
        made[change.partition("=")[0]], memory = change, smaller
        if memory.total_bytes <= free_bytes:
            yield Remedy(changes=tuple(made.values()), total_bytes=memory.total_bytes)
            return


def _changed(config: RunConfig, key: str, catalogue: Catalogue) -> Iterator[tuple[str, RunConfig, RankMemory]]:
    """Yield the forms of a remedy that a run would accept, weakest first: KEY=VALUE, the changed configuration, and what its largest rank needs."""
    for change in [key] if "=" in key else _strengths(config, key):
        try:
            changed = apply_overrides(config, [change])
        except ValueError:
            continue
        if (memory := catalogue.planned(changed)) is not None:
            yield change, changed, memory


def _strengths(config: RunConfig, key: str) -> list[str]:
    """Return `key` grown or shrunk by each factor."""
    operation, name = key[0], key[1:]
    value: int = config  # type: ignore[assignment]
    for part in name.split("."):
        value = getattr(value, part)
    values = [value * factor if operation == "*" else value // factor for factor in _DOUBLINGS]
    return [f"{name}={changed}" for changed in values if changed >= 1]
