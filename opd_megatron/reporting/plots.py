"""The figures of the report: each a Matplotlib `Figure` drawn without pyplot, so that nothing global is left behind."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from opd_megatron.reporting.metrics import RunHistory

RUN_COLORS = ("#2f6690", "#c8553d", "#4f8a5b", "#8a5a9e", "#c49a2c", "#3a9a9a", "#9c4a6e", "#6b6b6b")
TEACHER_COLOR = "#3d3d3d"
# Of one step and of what came before it; `train` is drawn whole where its parts were not measured.
TIME_PARTS = (
    ("rollout_seconds", "rollout", "#2f6690"),
    ("align_seconds", "alignment", "#7fb0cf"),
    ("teacher_seconds", "teacher", "#d98e48"),
    ("weigh_seconds", "statistics", "#c49a2c"),
    ("train_seconds", "train", "#5f9a6b"),
    ("forward_backward_seconds", "gradients", "#5f9a6b"),
    ("optimizer_seconds", "optimizer", "#2f6d4a"),
    ("probe_seconds", "probe", "#8a5a9e"),
    ("checkpoint_seconds", "checkpoint", "#9c4a6e"),
    ("idle_seconds", "waiting", "#e8b4a8"),
    ("other_seconds", "other", "#c9ccd1"),
)
_BESIDE_THE_STEP = ("checkpoint_seconds",)
# A part with a smaller share of the time is drawn as "other".
_SMALL_PART = 0.01
DIVERGENCE_LABELS = {
    "reverse_kl": "KL(student ‖ teacher), nats/token",
    "forward_kl": "KL(teacher ‖ student), nats/token",
    "jsd": "JSD(student, teacher), nats/token",
    "skew_forward": "KL(teacher ‖ mixture), nats/token",
    "skew_reverse": "KL(student ‖ mixture), nats/token",
    "topk_tail_forward": "KL(teacher ‖ student) over top-k and rest, nats/token",
    "topk_tail_reverse": "KL(student ‖ teacher) over top-k and rest, nats/token",
    "topk_renorm_forward": "KL(teacher ‖ student) within top-k, nats/token",
    "topk_renorm_reverse": "KL(student ‖ teacher) within top-k, nats/token",
    "k1": "k1 of the sampled token, nats",
    "k3": "k3 of the sampled token, nats",
}
PANEL_INCHES = (5.4, 3.0)
MAX_POINTS = 240  # beyond this a curve is drawn as means of equal windows, with a band from minimum to maximum
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a6",
    "axes.labelcolor": "#3c4043",
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "grid.color": "#e8eaed",
    "grid.linewidth": 0.8,
    "xtick.color": "#5f6368",
    "ytick.color": "#5f6368",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "opd-megatron",
    "figure.facecolor": "white",
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure of the report: a title and caption in text, the picture as a data URI."""

    title: str
    caption: str
    picture: str


@dataclass(frozen=True, kw_only=True)
class Curves:
    """One quantity over the steps. A second key is drawn pale on the same axes, as the caption says."""

    title: str
    keys: tuple[str, ...]
    label: str
    scale: float = 1.0
    log_if_decades: bool = False
    hide_constant: float | None = None  # nothing to see where every value equals this
    caption: str = ""


_CURVES = (
    Curves(title="Divergence from the teacher", keys=("divergence",), label="divergence, nats/token", log_if_decades=True),
    Curves(title="Loss", keys=("loss",), label="loss per token", log_if_decades=True),
    Curves(title="Student entropy", keys=("student_entropy",), label="entropy, nats/token"),
    Curves(title="Gradient norm", keys=("grad_norm",), label="norm before clipping", log_if_decades=True),
    Curves(title="Learning rate", keys=("lr",), label="learning rate"),
    Curves(title="Response length", keys=("response_length_mean",), label="mean, tokens/response"),
    Curves(title="Truncated responses", keys=("truncated_fraction",), label="cut at the limit, %", scale=100.0),
    Curves(title="Positions that train", keys=("kept_fraction",), label="kept, % of response tokens", scale=100.0, hide_constant=1.0),
    Curves(title="Throughput", keys=("tokens_per_second",), label="tokens/s"),
    Curves(
        title="Model FLOP utilization",
        keys=("train_model_flop_utilization", "model_flop_utilization"),
        label="% of the GPU's peak",
        scale=100.0,
        caption="of forward and backward; pale: of the whole step",
    ),
    Curves(
        title="Sampler drift",
        keys=("rollout_drift_mean", "rollout_drift_max"),
        label="|Δ logp|, nats",
        log_if_decades=True,
        caption="Sampled against recomputed log-probability of each token: mean dark, maximum pale.",
    ),
    Curves(title="Skipped steps", keys=("skipped_steps",), label="steps", hide_constant=0.0),
    Curves(title="Accepted extrapolation", keys=("effopd_accepted_k",), label="k of W + 2k Δ"),
)


def draw_report(histories: Sequence[RunHistory]) -> list[Plot]:
    """Return every figure that the recorded numbers allow, in reading order."""
    plots = []
    if any(history.evaluations_of("student") for history in histories):
        caption = "Band: one standard error over the prompts." + (" Dashed: the teacher." if any(h.evaluations_of("teacher") for h in histories) else "")
        plots.append(_plot("Accuracy on held-out prompts", caption, partial(draw_accuracy, histories=histories)))
        if any(history.series("step_seconds")[0] for history in histories) and any(len(history.evaluations_of("student")) > 1 for history in histories):
            caption = "Time of all steps, probes for extrapolated weights included, evaluations not."
            plots.append(_plot("Accuracy against training time", caption, partial(draw_accuracy, histories=histories, over_time=True)))
    for curves in _CURVES:
        if _has_something_to_show(histories, curves):
            plots.append(_plot(curves.title, _window_caption(histories, curves), partial(draw_curves, histories=histories, curves=curves)))
        if curves.title == "Learning rate" and any(_time_parts(history)[0].size for history in histories):
            caption = "Mean over all steps." if len(histories) > 1 else ""
            plots.append(_plot("Where the time of a step goes", caption, partial(draw_time, histories=histories)))
    return plots


def write_summary(histories: Sequence[RunHistory], path: Path) -> None:
    """Write accuracy, divergence and time split as one row into a PNG file."""
    with styled_figure(3, (14.0, 3.7)) as (figure, axes):
        for ax, title in zip(axes, ("Accuracy on held-out prompts", "Divergence from the teacher", "Where the time of a step goes"), strict=True):
            ax.set_title(title, pad=10)
        draw_accuracy(axes[0], histories)
        draw_curves(axes[1], histories, _CURVES[0])
        draw_time(axes[2], histories)
        if len(histories) > 1 and axes[0].lines:
            axes[0].legend(loc="best")
        figure.savefig(path, dpi=150)


def draw_accuracy(ax: Axes, histories: Sequence[RunHistory], over_time: bool = False) -> None:
    """Draw the student's accuracy over the steps, or over the minutes that these took, and the teacher's last one as a horizontal line."""
    teachers = {index: history.evaluations_of("teacher")[-1]["accuracy"] for index, history in enumerate(histories) if history.evaluations_of("teacher")}
    shared = len(set(teachers.values())) == 1
    for index, history in enumerate(histories):
        records = history.evaluations_of("student")
        steps = [history.seconds_until(record["step"]) / 60 if over_time else record["step"] for record in records]
        values = np.array([100 * record["accuracy"] for record in records])
        errors = np.array([100 * standard_error(record) for record in records])
        color = _color(index)
        ax.plot(steps, values, marker="o", markersize=4, linewidth=1.8, color=color, label=history.name)
        ax.fill_between(steps, np.clip(values - errors, 0, 100), np.clip(values + errors, 0, 100), color=color, alpha=0.15, linewidth=0)
        if len(histories) == 1 and records:
            _label_ends(ax, steps, values, color)
    for number, (index, accuracy) in enumerate(teachers.items()):
        if shared and number:
            break
        ax.axhline(100 * accuracy, linestyle=(0, (5, 3)), linewidth=1.4, color=TEACHER_COLOR if shared else _color(index))
    if shared:
        accuracy = 100 * next(iter(teachers.values()))
        ax.annotate(
            f"teacher {accuracy:.1f}", (0.01, accuracy), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", color=TEACHER_COLOR
        )
    everything = [100 * value for value in teachers.values()] + [100 * r["accuracy"] for history in histories for r in history.evaluations_of("student")]
    if over_time:
        ax.set_xlim(left=-0.02 * ax.get_xlim()[1])
        ax.set_xlabel("minutes in steps")
    else:
        _limit_steps(ax, histories)
    if not everything:
        _say_nothing(ax, "no evaluation was recorded")
        return
    top, bottom = max(everything), min(everything)
    ax.set_ylim(0 if bottom < 0.6 * top or top == 0 else max(0.0, bottom - 0.5 * (top - bottom) - 2), top * 1.12 or 1)
    ax.set_ylabel("accuracy, %")


def draw_curves(ax: Axes, histories: Sequence[RunHistory], curves: Curves) -> None:
    """Draw one quantity of every run; logarithmic where the values span decades and the quantity allows it."""
    smallest, largest = math.inf, -math.inf
    drawn: list[tuple[str, list[int], list[float]]] = []
    for index, history in enumerate(histories):
        for key, alpha in zip(curves.keys, (1.0, 0.45), strict=False):
            steps, values = history.series(key)
            if not steps:
                continue
            centers, means, lows, highs = _windows(np.array(steps), curves.scale * np.array(values, dtype=float))
            # Where runs have equal curves, such as a learning rate, the first one shows through the gaps of the others.
            style = (0, (4, 4)) if (key, steps, values) in drawn else "-"
            drawn.append((key, steps, values))
            ax.plot(centers, means, alpha=alpha, linewidth=1.5, linestyle=style, color=_color(index), marker="o" if len(steps) == 1 else None, markersize=4)
            if len(centers) < len(steps):
                ax.fill_between(centers, lows, highs, color=_color(index), alpha=0.15, linewidth=0)
            smallest, largest = min(smallest, lows.min()), max(largest, highs.max())
    _limit_steps(ax, histories)
    ax.set_ylabel(_label(histories, curves))
    if smallest > largest:
        _say_nothing(ax, f"{curves.keys[0]} was not recorded")
    elif curves.log_if_decades and smallest > 0 and largest / smallest > 30:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest / smallest < 1000 else (1,)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif smallest >= 0:
        ax.set_ylim(0, largest * 1.08 or 1)


def draw_time(ax: Axes, histories: Sequence[RunHistory]) -> None:
    """Draw seconds per step by part: over the steps for one run, as one bar of means per run for several."""
    parts = [_time_parts(history) for history in histories]
    if not any(steps.size for steps, _ in parts):
        _limit_steps(ax, histories)
        ax.set_ylabel("seconds per step")
        _say_nothing(ax, "no times were recorded")
        return
    if len(histories) == 1:
        _draw_time_over_steps(ax, *parts[0])
        _limit_steps(ax, histories)
    else:
        _draw_time_bars(
            ax, [history.name for history in histories], [seconds.mean(axis=1) if steps.size else np.zeros(len(TIME_PARTS)) for steps, seconds in parts]
        )
    ax.legend(ncols=4, loc="upper right", borderaxespad=0.2, columnspacing=1.2, handlelength=1.0, handleheight=1.0)


def standard_error(record: dict[str, Any]) -> float:
    """Return the binomial standard error of an accuracy over its prompts; samples of one prompt count as one, which errs on the wide side."""
    num_prompts = record.get("prompts")
    accuracy = min(1.0, max(0.0, record["accuracy"]))
    return math.sqrt(accuracy * (1 - accuracy) / num_prompts) if num_prompts else 0.0


def _draw_time_over_steps(ax: Axes, steps: np.ndarray, seconds: np.ndarray) -> None:
    windows = [_windows(steps, row) for row in seconds]
    steps, seconds = windows[0][0], np.stack([means for _, means, _, _ in windows])
    bottom = np.zeros(len(steps))
    if len(steps) > 40:
        drawn = [index for index in range(len(TIME_PARTS)) if seconds[index].any()]
        ax.stackplot(steps, seconds[drawn], labels=[TIME_PARTS[i][1] for i in drawn], colors=[TIME_PARTS[i][2] for i in drawn], linewidth=0)
    else:
        for (_, name, color), row in zip(TIME_PARTS, seconds, strict=True):
            if row.any():
                ax.bar(steps, row, bottom=bottom, width=0.85, color=color, label=name)
            bottom = bottom + row
    totals = seconds.sum(axis=0)
    usual, slowest = float(np.median(totals)), int(totals.argmax())
    shown = totals.max()
    if totals.max() > 2.5 * usual > 0:  # one slow step, mostly the first, must not flatten all others
        shown = 1.5 * usual
        ax.annotate(
            f"cut: {totals[slowest]:.1f} s at step {steps[slowest]:.0f}",
            (0.99, 0.86),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=8,
            color="#5f6368",
        )
    ax.set_ylim(0, 1.4 * shown or 1)
    ax.set_ylabel("seconds per step")


def _draw_time_bars(ax: Axes, names: Sequence[str], means: Sequence[np.ndarray]) -> None:
    left = np.zeros(len(names))
    for index, (_, name, color) in enumerate(TIME_PARTS):
        widths = np.array([mean[index] for mean in means])
        if widths.any():
            ax.barh(range(len(names)), widths, left=left, height=0.5, color=color, label=name)
        left = left + widths
    for row, name in enumerate(names):
        ax.annotate(name, (0, row - 0.26), xytext=(2, 2), textcoords="offset points", fontsize=8, color=_color(row), fontweight="bold")
    ax.set_yticks([])
    ax.set_ylim(len(names) - 0.5, -1.1)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("mean seconds per step")


def _time_parts(history: RunHistory) -> tuple[np.ndarray, np.ndarray]:
    """Return steps [n] and seconds [parts, n]; what no part accounts for is "other"."""
    keys = [key for key, _, _ in TIME_PARTS]
    columns = {key: dict(zip(*history.series(key), strict=True)) for key in [*keys, "step_seconds"]}
    steps = sorted(set().union(*columns.values()))
    seconds = np.array([[columns[key].get(step, 0.0) for step in steps] for key in keys]).reshape(len(keys), len(steps))
    if columns["forward_backward_seconds"]:
        # What else there is in it is little.
        seconds[keys.index("train_seconds")] = 0
    if not columns["other_seconds"]:
        totals = np.array([columns["step_seconds"].get(step, 0.0) for step in steps])
        inside = sum(row for key, row in zip(keys[:-1], seconds[:-1], strict=True) if key not in _BESIDE_THE_STEP)
        seconds[-1] = np.clip(totals - inside, 0, None)
    small = seconds.sum(axis=1) < _SMALL_PART * seconds.sum()
    small[-1] = False
    seconds[-1] += seconds[small].sum(axis=0)
    seconds[small] = 0
    return np.array(steps), seconds


def _windows(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return centers, means, minima and maxima of equal windows, one point each where there are few points."""
    width = 1 if len(steps) <= MAX_POINTS else math.ceil(len(steps) / (MAX_POINTS // 2))
    edges = range(0, len(steps), width)
    centers = np.array([steps[i : i + width].mean() for i in edges])
    pieces = [values[i : i + width] for i in edges]
    return centers, np.array([p.mean() for p in pieces]), np.array([p.min() for p in pieces]), np.array([p.max() for p in pieces])


def _window_caption(histories: Sequence[RunHistory], curves: Curves) -> str:
    longest = max(len(history.series(curves.keys[0])[0]) for history in histories)
    windows = "" if longest <= MAX_POINTS else f" Line: mean of {math.ceil(longest / (MAX_POINTS // 2))} steps; band: minimum to maximum."
    return (curves.caption + windows).strip()


def _has_something_to_show(histories: Sequence[RunHistory], curves: Curves) -> bool:
    values = [value for history in histories for value in history.series(curves.keys[0])[1]]
    return any(value != curves.hide_constant for value in values)


def _label(histories: Sequence[RunHistory], curves: Curves) -> str:
    kinds = {history.setting("loss.kind") for history in histories if history.series(curves.keys[0])[0]}
    if curves.keys[0] == "divergence" and len(kinds) == 1:
        return DIVERGENCE_LABELS.get(kinds.pop(), curves.label)
    return curves.label


def _label_ends(ax: Axes, steps: Sequence[float], values: np.ndarray, color: str) -> None:
    ends = [(0, "left", (4, -13)), (-1, "right", (0, -15))] if len(steps) > 1 else [(0, "left", (6, -4))]
    for index, side, offset in ends:
        ax.annotate(f"{values[index]:.1f}", (steps[index], values[index]), xytext=offset, textcoords="offset points", ha=side, color=color, fontweight="bold")


def _limit_steps(ax: Axes, histories: Sequence[RunHistory]) -> None:
    """Give every panel the same steps, so that they read as small multiples."""
    last = max([record["step"] for history in histories for record in history.steps + history.evaluations], default=1)
    ax.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("training step")


def _say_nothing(ax: Axes, reason: str) -> None:
    ax.text(0.5, 0.5, reason, transform=ax.transAxes, ha="center", va="center", color="#80868b")
    ax.set_yticks([])


def _color(index: int) -> str:
    return RUN_COLORS[index % len(RUN_COLORS)]


@contextmanager
def styled_figure(num_panels: int, inches: tuple[float, float]) -> Iterator[tuple[Figure, list[Axes]]]:
    """Lend a figure with `num_panels` axes in a row, under the style of the report, which ends with the block."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(
            figsize=inches,
        )
        # Fixed margins: axes line up across the report, and a layout solver would double the drawing time.
        left, bottom, top = 0.72 / inches[0], 0.5 / inches[1], 0.34 / inches[1] if num_panels > 1 else 0.22 / inches[1]
        figure.subplots_adjust(left=left, right=1 - 0.1 / inches[0], bottom=bottom, top=1 - top, wspace=0.22)
        yield figure, [figure.add_subplot(1, num_panels, index + 1) for index in range(num_panels)]


def _plot(title: str, caption: str, draw: Callable[[Axes], None]) -> Plot:
    with styled_figure(1, PANEL_INCHES) as (figure, axes):
        draw(axes[0])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Plot(title=title, caption=caption, picture="data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())
