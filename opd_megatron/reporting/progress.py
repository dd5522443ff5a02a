"""How far a run is: one line per step in a log, a bar on a terminal. Rank 0 alone owns one."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows the steps of a run on standard output. Close it, crash or not: a bar hides the cursor while it lives."""

    def __init__(self, total_steps: int, first_step: int):
        self._total_steps = total_steps
        self._first_step = first_step
        self._started = time.monotonic()
        self._bar: Bar | None = None
        if sys.stdout.isatty():
            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(file=sys.stdout),
                expand=True,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step - 1, numbers="")
            self._bar.start()

    def step(self, metrics: Mapping[str, float | int]) -> None:
        """Show one finished step; `step` is required, every other key is shown if it is there."""
        step = int(metrics["step"])
        numbers = _numbers(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        steps_done = max(1, step - self._first_step + 1)
        remaining_seconds = (time.monotonic() - self._started) / steps_done * (self._total_steps - step)
        left = f"  {timedelta(seconds=round(remaining_seconds))} left" if step < self._total_steps else ""
        print(f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  {numbers}{left}", flush=True)

    def note(self, text: str) -> None:
        """Print one line of text, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _numbers(metrics: Mapping[str, float | int]) -> str:
    """Return the few numbers that tell whether a run is well, in the same order each step."""
    parts = []
    for key, label, form in (
        ("loss", "loss", ".4f"),
        ("divergence", "divergence", ".4f"),
        ("student_entropy", "entropy", ".3f"),
        ("grad_norm", "grad", ".3g"),
        ("response_tokens", "tokens", ".0f"),
        ("step_seconds", "", ".2f"),
    ):
        value = metrics.get(key)
        if value is not None:
            parts.append(f"{label} {value:{form}}" if label else f"{value:{form}} s")
    return "  ".join(parts)
