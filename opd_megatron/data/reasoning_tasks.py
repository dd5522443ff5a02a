"""reasoning-gym tasks as a prompt source: procedurally generated, verifiable, no download."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from opd_megatron.config import DataConfig
from opd_megatron.data.rows import Row, plain_row

PREFIX = "reasoning_gym:"
# Entry i is drawn from seed + i alone, so a fixed seed makes the source a fixed list. `data.task_options.seed` overrides it.
DEFAULT_SEED = 42


def is_reasoning_task(prompts: str) -> bool:
    """Return whether `data.prompts` names a reasoning-gym task."""
    return prompts.startswith(PREFIX)


def open_reasoning_task(data: DataConfig) -> Any:
    """Return the reasoning-gym dataset of `data.prompts`, which also grades; ValueError for an unknown task or bad options."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise ValueError(f"data.prompts={data.prompts!r} needs reasoning-gym: pip install opd-megatron[demo]") from None
    task = data.prompts.removeprefix(PREFIX)
    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=5, cutoff=0.5) or sorted(DATASETS)
        raise ValueError(f"data.prompts={data.prompts!r}: reasoning-gym has no task {task!r}; did you mean one of {', '.join(close)}?")
    allowed = sorted({field.name for field in fields(DATASETS[task][1])} - {"size"})
    for option in data.task_options:
        if option not in allowed:
            raise ValueError(f"data.task_options.{option} is not an option of {task}, which has {', '.join(allowed)}; the number of prompts is data.task_size")
    options = {"seed": DEFAULT_SEED, **data.task_options, "size": data.task_size}
    try:
        return create_dataset(task, **options)
    except (AssertionError, TypeError, ValueError) as error:
        # reasoning-gym validates its options with assertions.
        raise ValueError(
            f"data.task_options={dict(data.task_options)} do not fit {task}: {error or type(error).__name__}; it has {', '.join(allowed)}"
        ) from None


def read_reasoning_task(data: DataConfig) -> Iterator[Row]:
    """Yield `data.task_size` questions; the whole entry goes along for the task's own grader."""
    dataset = open_reasoning_task(data)
    for index in range(data.task_size):
        entry = dataset[index]
        answer = None if entry["answer"] is None else str(entry["answer"])
        # Tasks come without worked solutions.
        yield plain_row(entry["question"], index=index, where=f"{data.prompts} entry {index}", answer=answer, target=answer, solution=answer, entry=entry)
