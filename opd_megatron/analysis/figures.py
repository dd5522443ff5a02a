"""The figures of an analysis, in the report's style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from opd_megatron.analysis.experiments import Outcome
from opd_megatron.analysis.measure import Group, Measured, grouped
from opd_megatron.models.modules import ModuleKind
from opd_megatron.reporting.plots import RUN_COLORS, TEACHER_COLOR, styled_figure

_KINDS: tuple[ModuleKind, ...] = ("attention", "mlp")
_LABELS = {
    "base": "base",
    "final": "final",
    "embedding_swapped": "base embeddings",
    "matrices": "all matrices",
    "early": "early",
    "early_rescaled": "early, lengthened",
    "early_rescaled_matrices": "early matrices, lengthened",
}


def write_figures(measured: Measured, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Write `spectra.png`, and with experiments `experiments.png`; ValueError for a place that cannot be written."""
    written = [folder / "spectra.png"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_spectra(measured, written[0])
        if outcomes:
            written.append(folder / "experiments.png")
            _write_experiments(outcomes, written[1])
    except OSError as error:
        raise ValueError(f"--plots {folder} cannot be written: {error.strerror or error}; name another folder") from error
    return written


def experiment_label(outcome: Outcome) -> str:
    """Return an experiment in a few words."""
    experiment = outcome.experiment
    if experiment.name == "window":
        return f"{experiment.kind} around layer {experiment.layer} ({experiment.num_layers})"
    if experiment.name == "scaled":
        return f"{experiment.amount:g} of the update"
    if experiment.name in ("top", "tail"):
        return f"{'first' if experiment.name == 'top' else 'last'} {experiment.amount:.0%} of the rank"
    return _LABELS[experiment.name]


def _write_spectra(measured: Measured, path: Path) -> None:
    inside = [tensor for tensor in measured.tensors if tensor.kind in _KINDS]
    groups = grouped(inside, lambda tensor: (tensor.kind, tensor.layer))
    panels: list[tuple[str, Callable[[Group], float | None]]] = [
        ("Norm of the update", lambda group: group.norm),
        ("Spectral / Frobenius norm", lambda group: group.spectral_share),
        ("Norm in the top 1 % of directions", lambda group: group.top_share),
    ]
    if any(tensor.alignment for tensor in inside):
        panels.append(("Early and final subspaces, cosine", lambda group: group.alignment))
    with styled_figure(len(panels), (4.4 * len(panels), 3.4)) as (figure, axes):
        for ax, (title, value_of) in zip(axes, panels, strict=True):
            ax.set_title(title, pad=10)
            _draw_by_layer(ax, groups, value_of, measured.num_layers)
        if len(panels) == 4:
            _draw_by_layer(axes[3], groups, lambda group: group.alignment_by_chance, measured.num_layers, is_chance=True)
        axes[0].legend(loc="best")
        figure.savefig(path, dpi=150)


def _draw_by_layer(ax: Axes, groups: dict[object, Group], value_of: Callable[[Group], float | None], num_layers: int, *, is_chance: bool = False) -> None:
    for kind, color in zip(_KINDS, RUN_COLORS, strict=False):
        points = [(layer, value_of(groups[kind, layer])) for layer in range(num_layers) if (kind, layer) in groups]
        known = [(layer, value) for layer, value in points if value is not None]
        style = {"linestyle": (0, (2, 2)), "linewidth": 1.0} if is_chance else {"marker": "o", "markersize": 4, "linewidth": 1.6}
        ax.plot([layer for layer, _ in known], [value for _, value in known], color=color, label=None if is_chance else kind, **style)  # type: ignore[arg-type]
    _number_layers(ax)
    ax.set_ylim(bottom=0)


def _write_experiments(outcomes: Sequence[Outcome], path: Path) -> None:
    windows = [outcome for outcome in outcomes if outcome.experiment.name == "window"]
    others = [outcome for outcome in outcomes if outcome.experiment.name != "window"]
    with styled_figure(2 if windows else 1, (11.0 if windows else 5.5, 4.2)) as (figure, axes):
        figure.subplots_adjust(left=0.2 if windows else 0.36)
        _draw_bars(axes[0], others)
        if windows:
            _draw_windows(axes[1], windows, others)
        figure.savefig(path, dpi=150)


def _draw_bars(ax: Axes, outcomes: Sequence[Outcome]) -> None:
    ax.set_title("Accuracy with part of the update, %", pad=10)
    for place, outcome in enumerate(outcomes):
        ax.barh(place, 100 * outcome.accuracy, color=RUN_COLORS[0], height=0.7)
        ax.annotate(f"{100 * outcome.accuracy:.1f}", (100 * outcome.accuracy, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yticks(range(len(outcomes)), [experiment_label(outcome) for outcome in outcomes])
    ax.set_xlim(0, 112)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def _draw_windows(ax: Axes, windows: Sequence[Outcome], others: Sequence[Outcome]) -> None:
    radius = int(windows[0].experiment.amount or 0)
    ax.set_title("Accuracy with a window of layers, %", pad=10)
    for kind, color in zip(_KINDS, RUN_COLORS, strict=False):
        chosen = [outcome for outcome in windows if outcome.experiment.kind == kind]
        layers, accuracies = [outcome.experiment.layer or 0 for outcome in chosen], [100 * outcome.accuracy for outcome in chosen]
        ax.plot(layers, accuracies, color=color, label=kind, marker="o", markersize=4)
    for outcome in others:
        if outcome.experiment.name in ("base", "final"):
            height = 100 * outcome.accuracy
            ax.axhline(height, color=TEACHER_COLOR, linewidth=1.0, linestyle=(0, (2, 2)))
            ax.annotate(outcome.experiment.name, (0.99, height), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", ha="right")
    _number_layers(ax)
    ax.set_xlabel(f"middle of the window of radius {radius}, from 0")
    ax.set_ylim(bottom=0)
    ax.legend(loc="best")


def _number_layers(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer, from 0")
