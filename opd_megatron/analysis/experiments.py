"""What parts of an update are worth: the run's held-out accuracy with part of it put into the weights that the run began with.

EffOPD's experiments on Property 1 (windows of layers, lengths, embeddings) and Property 2 (first directions, early directions), arXiv 2605.11739. Where one
is about matrices, they are those of attention and MLP, and everything else of the model is as it was before training: nothing but what an experiment
names may answer for its accuracy. Their whole update is measured so too, and is what the others are to be read against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from opd_megatron.analysis.spectra import frobenius_norm, tail_directions, top_directions, with_norm
from opd_megatron.analysis.updates import AnalyzedRun
from opd_megatron.models.gpt import ModelChunks
from opd_megatron.models.modules import ModuleKind, layer_of, module_kind
from opd_megatron.models.weight_map import MappedTensor, weight_map
from opd_megatron.models.weight_slices import to_megatron
from opd_megatron.models.weights import named_global_parameters

SCALES = (0.25, 0.5, 0.75, 1.0)
TAIL_FRACTION = 0.5
_MATRIX_KINDS: tuple[ModuleKind, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Change:
    """What is done with the update of one tensor: `scaled`, a fraction of its directions, or the early update, as it is or as long as the final one."""

    kind: Literal["scaled", "top", "tail", "early", "early_rescaled"]
    amount: float = 1.0


NOTHING, WHOLE = Change("scaled", 0.0), Change("scaled", 1.0)
Name = Literal["base", "final", "scaled", "embedding_swapped", "window", "matrices", "top", "tail", "early", "early_rescaled", "early_rescaled_matrices"]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One set of weights. `changes` has the tensors whose update is in it, by the name of their row."""

    name: Name
    # Of a window: attention or MLP, and the layer in its middle.
    kind: ModuleKind | None = None
    layer: int | None = None
    # How many layers are in the window, which the ends of the model cut.
    num_layers: int | None = None
    # The factor or the fraction.
    amount: float | None = None
    changes: Mapping[str, Change]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An experiment's accuracy, and the norm of what it put into the weights."""

    experiment: Experiment
    accuracy: float
    num_prompts: int
    update_norm: float


def plan_experiments(rows: Sequence[MappedTensor], num_layers: int, *, radius: int | None, fractions: Iterable[float], has_early: bool) -> list[Experiment]:
    """Return what to measure, base and final weights first; without `radius` no windows."""

    def everything(change: Change) -> dict[str, Change]:
        return {row.name: change for row in rows}

    def matrices(change: Change) -> dict[str, Change]:
        return {row.name: change for row in rows if _is_matrix(row)}

    swapped = {row.name: WHOLE for row in rows if module_kind(row) != "embedding"}
    planned = [Experiment(name="base", changes={}), Experiment(name="final", changes=everything(WHOLE))]
    planned += [Experiment(name="scaled", amount=scale, changes=everything(Change("scaled", scale))) for scale in SCALES]
    planned += [Experiment(name="embedding_swapped", changes=swapped), Experiment(name="matrices", changes=matrices(WHOLE))]
    for fraction in fractions:
        planned.append(Experiment(name="top", amount=fraction, changes=matrices(Change("top", fraction))))
    planned.append(Experiment(name="tail", amount=TAIL_FRACTION, changes=matrices(Change("tail", TAIL_FRACTION))))
    if has_early:
        planned.append(Experiment(name="early", changes=everything(Change("early"))))
        planned.append(Experiment(name="early_rescaled", changes=everything(Change("early_rescaled"))))
        planned.append(Experiment(name="early_rescaled_matrices", changes=matrices(Change("early_rescaled"))))
    if radius is not None:
        planned += [_window(rows, kind, layer, radius, num_layers) for kind in _MATRIX_KINDS for layer in range(num_layers)]
    return planned


def _window(rows: Sequence[MappedTensor], kind: ModuleKind, layer: int, radius: int, num_layers: int) -> Experiment:
    window = range(max(0, layer - radius), min(num_layers, layer + radius + 1))
    changes = {row.name: WHOLE for row in rows if module_kind(row) == kind and layer_of(row) in window}
    return Experiment(name="window", kind=kind, layer=layer, num_layers=len(window), amount=float(radius), changes=changes)


def _is_matrix(row: MappedTensor) -> bool:
    return module_kind(row) in _MATRIX_KINDS and len(row.shape) == 2


class EditedModel:
    """One whole model on one rank, whose weights are a run's base and as much of its update as an experiment says. Only what differs is written."""

    def __init__(self, run: AnalyzedRun, model: ModelChunks) -> None:
        self._run = run
        self._rows = {row.name: row for row in weight_map(run.final.architecture)}
        self._parameters = dict(named_global_parameters(model, run.final.architecture))
        self._now: dict[str, Change] = {}
        self._norms: dict[str, float] = {}

    @torch.no_grad()
    def put(self, changes: Mapping[str, Change]) -> float:
        """Write the weights of an experiment; return the norm of the update in them."""
        for name, row in self._rows.items():
            change = changes.get(name, NOTHING)
            if self._now.get(name) != change:
                base = self._run.base_of(row)
                update = changed_update(self._run, row, base, change, self._parameters[name].device)
                self._parameters[name].copy_(base + update)
                self._now[name], self._norms[name] = change, frobenius_norm(update)
        return sum(norm**2 for norm in self._norms.values()) ** 0.5


def changed_update(run: AnalyzedRun, row: MappedTensor, base: torch.Tensor, change: Change, device: torch.device | None = None) -> torch.Tensor:
    """Return what is added to one tensor; directions and lengths are those of its Hugging Face parts, one by one."""
    if change.kind == "scaled":
        return change.amount * run.update_of(row, base) if change.amount else torch.zeros_like(base)
    if change.kind == "early":
        return run.update_of(row, base, is_early=True)
    final = run.parts_of(row, run.update_of(row, base))
    if change.kind == "early_rescaled":
        early = run.parts_of(row, run.update_of(row, base, is_early=True))
        parts = [with_norm(early[name], frobenius_norm(part)) for name, part in final.items()]
    else:
        cut = top_directions if change.kind == "top" else tail_directions
        parts = [cut(part.to(device or part.device), change.amount).to(part.device) for part in final.values()]
    return to_megatron(row, parts, run.final.architecture)


def carry_out(
    planned: Iterable[Experiment], edited: EditedModel, evaluate: Callable[[], tuple[float, int]], tell: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Return the outcome of every experiment; `evaluate` returns the accuracy of the model as it is, and over how many prompts."""
    outcomes = []
    for experiment in planned:
        norm = edited.put(experiment.changes)
        accuracy, num_prompts = evaluate()
        outcomes.append(Outcome(experiment=experiment, accuracy=accuracy, num_prompts=num_prompts, update_norm=norm))
        tell(outcomes[-1])
    return outcomes


def kept_share(accuracy: float, base: float, final: float) -> float | None:
    """Return how much of what training gained is there, 1 for all of it; None where training gained nothing."""
    return (accuracy - base) / (final - base) if final != base else None
