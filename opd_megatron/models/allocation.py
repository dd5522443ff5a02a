"""Which of the student's tensors train, and how fast (`modules`): what does not has no gradient, no optimizer state and no place in a message. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opd_megatron.config import ModulesConfig
from opd_megatron.models.architecture import Architecture
from opd_megatron.models.modules import chosen_rows
from opd_megatron.models.weight_map import MappedTensor, weight_map


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The names of the rows that train, and factors of the learning rate by row name, where they are not 1."""

    trained: frozenset[str]
    factors: Mapping[str, float]

    @classmethod
    def of(cls, modules: ModulesConfig, architecture: Architecture, measured: str | None = None) -> Allocation:
        """Return what the configuration asks for; `measured` is the choice that a probe made (`modules.train=measured`), and before it everything trains.

        ValueError for words that name nothing, and for factors of what does not train.
        """
        rows = weight_map(architecture)
        choice = (measured or "all") if modules.train == "measured" else modules.train
        trained = frozenset(row.name for row in named_rows("modules.train", choice, rows))
        factors: dict[str, float] = {}
        for words, factor in modules.learning_rate_factors.items():
            named = {row.name for row in named_rows("modules.learning_rate_factors", words, rows)}
            if modules.train != "measured" and not named & trained:
                raise ValueError(f"modules.learning_rate_factors: {words!r} names only what modules.train={modules.train!r} leaves out; drop one of them")
            factors |= dict.fromkeys(named & trained, factor)
        return cls(trained=trained, factors={name: factor for name, factor in factors.items() if factor != 1})


def named_rows(key: str, choice: str, rows: Sequence[MappedTensor]) -> list[MappedTensor]:
    """Return the rows that the value of a configuration key chooses; ValueError, with the key, for a choice of nothing."""
    try:
        chosen = chosen_rows(choice, rows)
    except ValueError as error:
        raise ValueError(f"{key}={choice!r}: {error}") from None
    if not chosen:
        raise ValueError(f"{key}={choice!r} leaves no tensor; take fewer words away")
    return chosen


def chosen_names(key: str, choice: str, architecture: Architecture) -> frozenset[str]:
    """Return the names of the rows that the value of a configuration key chooses; ValueError for a choice of nothing."""
    return frozenset(row.name for row in named_rows(key, choice, weight_map(architecture)))


def check_modules(modules: ModulesConfig, moved: str | None, architecture: Architecture) -> None:
    """Raise ValueError for choices that do not fit; `moved` is `effopd.modules`, or None where nothing is extrapolated."""
    allocation = Allocation.of(modules, architecture)
    if moved is not None and not chosen_names("effopd.modules", moved, architecture) & allocation.trained:
        raise ValueError(f"effopd.modules={moved!r} moves only what modules.train={modules.train!r} leaves where it is; change one of them")
