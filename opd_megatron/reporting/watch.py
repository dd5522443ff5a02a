"""How a run stands right now: one frame for a terminal, from what `following.py` reads. Neither torch nor the run itself is needed.

Every text of a run directory is foreign: whoever wrote a prompt or a log must not get to command the terminal.
"""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from opd_megatron.reporting.following import RunView, finite_number, modified

_LOG_LINES = 8
_STATUS_STYLES = {"running": "bold blue", "finished": "bold green", "interrupted": "bold yellow", "crashed": "bold red"}
_BAR_COLORS = ("blue", "yellow", "green", "magenta", "cyan", "red")
# Sequences that command a terminal: CSI, then strings up to their end, then the two-letter ones.
_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]).*?(?:\x1b\\|\x07|\x9c|$)|\x1b[ -/]*[0-~]")


def frame(view: RunView, now: float) -> RenderableType:
    """Return everything there is to show at the time `now`, in seconds since the epoch."""
    parts = [_header(view, now), _progress(view), _numbers(view, now), _phases(view), _log(view)]
    return Group(*(line for part in parts if part is not None for line in (part, "")))


def plain(text: Any) -> str:
    """Return foreign text as one line of what can be seen: no commands to a terminal, no signs that control or reorder others."""
    shown = _ESCAPES.sub("", str(text)).replace("\t", "    ")
    return "".join(sign for sign in shown if unicodedata.category(sign)[0] != "C")


def span(seconds: float) -> str:
    """Return a time as it is said: "12 s", "3 min", or h:mm:ss."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else str(timedelta(seconds=round(seconds)))


def _header(view: RunView, now: float) -> RenderableType:
    status = view.status
    line = Text(plain(view.run.path.resolve().name), style="bold")
    line.append("  ").append(status or "not begun", style=_STATUS_STYLES.get(status or "", "bold"))
    if (silent := view.silent_seconds(now)) is not None:
        line.append(f", and silent for {span(silent)}", style="bold red")
    about = Text(overflow="ellipsis", no_wrap=True, style="dim")
    if view.description is None:
        about.append("no config.json yet")
    else:
        models = [plain(Path(str(view.setting(key))).name) for key in ("student.hf", "teacher.hf") if view.setting(key)]
        about.append(" · ".join([plain(view.description["recipe"]), *([" from ".join(models)] if models else [])]))
    return Group(line, about)


def _progress(view: RunView) -> RenderableType:
    total, seconds = view.setting("training.steps"), view.lately("step_seconds")
    row = Table.grid(padding=(0, 2))
    if type(total) is not int or total < 1:
        row.add_row(f"step {view.step}")
        return row
    left = f"{span(statistics.fmean(seconds) * (total - view.step))} of steps left" if seconds and view.step < total else ""
    row.add_row(f"step {view.step}/{total}", ProgressBar(total=total, completed=min(view.step, total), width=40), left)
    return row


def _numbers(view: RunView, now: float) -> RenderableType:
    """What the last steps say beside the first ones, accuracy, and what the run left behind last."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    has_passed = bool(view.steps) and view.steps[0] is not view.first_steps[0]
    for title in ("last step", f"mean of last {len(view.steps)}", *([f"mean of first {len(view.first_steps)}"] if has_passed else [])):
        table.add_column(title, justify="right")
    for key in _shown_keys(view):
        means = (statistics.fmean(values) if values else None for values in (view.lately(key), *([view.at_first(key)] if has_passed else [])))
        table.add_row(Text(plain(key)), *(_number(value) for value in (finite_number(view.steps[-1], key), *means)))
    facts = Table.grid(padding=(0, 2))
    for who in ("student", "teacher"):
        if accuracies := view.accuracies(who):
            (step, last), best = accuracies[-1], max(accuracy for _, accuracy in accuracies)
            before = f", {accuracies[0][1]:.1%} at step {accuracies[0][0]}, best {best:.1%}" if len(accuracies) > 1 else ""
            facts.add_row(f"{who} accuracy", Text(f"{last:.1%} at step {step}{before}"))
    if (written := modified(view.run.metrics_path)) is not None and view.steps:
        facts.add_row("last step", f"{span(now - written)} ago")
    saved = view.last_checkpoint()
    facts.add_row("last checkpoint", f"step {saved[0]}, {span(now - saved[1])} ago" if saved else "none yet")
    return Group(*([table] if view.steps else ["no training step is recorded yet"]), facts)


def _shown_keys(view: RunView) -> list[str]:
    keys = ["loss", "divergence", "student_entropy", "kept_fraction", "grad_norm", "lr", "response_length_mean", "truncated_fraction", "skipped_steps"]
    recorded = {key: None for record in view.steps for key in record}
    speeds = [key for key in recorded if key.startswith(("tokens_per_second", "model_flop"))]
    return [key for key in (*keys, *speeds) if key in recorded]


def _phases(view: RunView) -> RenderableType | None:
    """Where the time of the last steps goes, and the memory: whatever phases the run names."""
    keys = {key: None for record in view.steps for key in record}
    seconds = {key.removesuffix("_seconds"): view.lately(key) for key in keys if key.endswith("_seconds") and not key.endswith("_spread_seconds")}
    whole = seconds.pop("step", [])
    phases = {name: statistics.fmean(values) for name, values in seconds.items() if values}
    if not phases:
        return None
    size = max([*phases.values(), statistics.fmean(whole) if whole else 0.0, 1e-9])
    has_ranks = any(key.endswith("_slowest_rank") for key in keys)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"a step takes {statistics.fmean(whole):.2f} s" if whole else None, title_justify="left")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("", width=30)
    table.add_column("peak memory", justify="right")
    if has_ranks:
        table.add_column("slowest rank", justify="right")
        table.add_column("ranks differ by", justify="right")
    for index, (name, mean) in enumerate(phases.items()):
        peaks, spreads = view.lately(f"{name}_peak_bytes"), view.lately(f"{name}_spread_seconds")
        cells: list[RenderableType] = [Text(plain(name)), f"{mean:.2f}", Bar(size, 0, mean, width=30, color=_BAR_COLORS[index % len(_BAR_COLORS)])]
        cells.append(f"{max(peaks) / 2**30:.2f} GiB" if peaks else "")
        if has_ranks:
            cells += [_slowest(view.lately(f"{name}_slowest_rank")), f"{statistics.fmean(spreads):.2f} s" if spreads else ""]
        table.add_row(*cells)
    return table


def _slowest(ranks: Sequence[float]) -> str:
    """Return the rank that others wait for most often, and how often that is."""
    if not ranks:
        return ""
    [(rank, times)] = Counter(ranks).most_common(1)
    return f"{rank:.0f} ({times} of {len(ranks)})"


def _log(view: RunView) -> RenderableType | None:
    if (tail := view.log_tail(_LOG_LINES)) is None:
        return None
    attempt, lines = tail
    text = Text("\n".join(plain(line) for line in lines), overflow="ellipsis", no_wrap=True)
    return Panel(text, title=Text(f"logs/{plain(attempt)}/rank_0.log"), title_align="left", box=box.ROUNDED, border_style="dim")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
