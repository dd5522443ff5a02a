"""The report of tools/gpu_check.py: what it ran on, what came out against which bar, and what was not run; as Markdown and as JSON."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench_common import environment

from opd_megatron import driver

_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "apex", "flash-attn", "transformers", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
_IN_ITS_PLACE = "**CPU in the GPU's place**: this report tests the check itself. Nothing in it says anything about a GPU."


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number that was measured. Above its `bar` it fails its step; a `target` is for speed, which depends on the GPU, and fails nothing."""

    name: str
    value: float
    bar: float | None = None
    target: float | None = None

    @property
    def fails(self) -> bool:
        # Not a number is above every bar.
        return self.bar is not None and not self.value <= self.bar


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step; `record` is all that it told, `tail` the end of what it printed if it failed."""

    name: str
    what: str
    command: str
    status: Literal["passed", "failed", "skipped"]
    reason: str = ""
    seconds: float = 0.0
    figures: Sequence[Figure] = field(default_factory=list)
    record: Any = None
    tail: str = ""


def hardware(device: str) -> dict[str, Any]:
    """Return what is checked: GPUs and their memory, driver, CUDA, NCCL, the CPU, and versions."""
    import torch

    machine, build = driver.find_machine(), driver.find_torch()
    gpus = [] if device == "cpu" else [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus else None  # type: ignore[no-untyped-call]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "gpus": [{"name": gpu.name, "gib": gpu.total_memory / 2**30, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in gpus],
        "gpu_memory_gib": min((gpu.total_memory / 2**30 for gpu in gpus), default=0.0),
        "driver": machine.driver,
        "torch": str(build),
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "host_gib": memory / 2**30,
        **environment(_PACKAGES),
    }


def names_of(parameters: Mapping[str, int]) -> str:
    """Return two models by their sizes: 0.60B from 1.72B."""
    student, teacher = (f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M" for number in (parameters["student"], parameters["teacher"]))
    return f"{student} from {teacher}"


def has_passed(outcomes: Sequence[Outcome]) -> bool:
    """Return whether something ran, and nothing failed."""
    statuses = {outcome.status for outcome in outcomes}
    return "passed" in statuses and "failed" not in statuses


def write_report(
    folder: Path, facts: Mapping[str, Any], outcomes: Sequence[Outcome], *, seconds: float, device: str, left_out: Sequence[str] = ()
) -> list[Path]:
    """Write gpu_check_<gpu>.md and .json, and return them. An earlier one of the same GPU is replaced.

    If the user left out steps, the names end in `_partial`: such a report never replaces a whole one.
    """
    name = facts["gpus"][0]["name"] if facts["gpus"] else "cpu"
    stem = f"gpu_check_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}{'_partial' if left_out else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "device": device,
        "is_gpu": device == "cuda",
        "passed": has_passed(outcomes),
        "left_out": list(left_out),
        "made_utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "seconds": seconds,
        "hardware": facts,
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    files = [folder / f"{stem}.md", folder / f"{stem}.json"]
    files[0].write_text("\n".join(_lines(record, outcomes)) + "\n")
    files[1].write_text(json.dumps(record, indent=1) + "\n")
    return files


def _lines(record: Mapping[str, Any], outcomes: Sequence[Outcome]) -> Iterator[str]:
    facts = record["hardware"]
    gpus = ", ".join(f"{gpu['name']} ({gpu['gib']:.0f} GiB, {gpu['capability']})" for gpu in facts["gpus"]) or "none"
    partial = f" (partial: without {', '.join(record['left_out'])})" if record["left_out"] else ""
    yield f"# GPU check: {facts['gpus'][0]['name'] if facts['gpus'] else facts['cpu']}{partial}\n"
    if not record["is_gpu"]:
        yield f"{_IN_ITS_PLACE}\n"
    has_run = any(outcome.status != "skipped" for outcome in outcomes)
    result = "Passed" if record["passed"] else "**Failed**" if has_run else "**Nothing ran**"
    yield f"{result} in {record['seconds']:.0f} s, {record['made_utc']} UTC, by `python tools/gpu_check.py`.\n"
    yield "| | |\n|---|---|"
    yield f"| GPUs | {gpus} |"
    yield f"| driver, CUDA, NCCL | {facts['driver']}, {facts['cuda']}, {facts['nccl']} |"
    yield f"| CPU | {facts['cpu']}, {facts['cores']} cores, {facts['host_gib']:.0f} GiB |"
    yield f"| Python | {facts['python']}, {', '.join(f'{name} {version}' for name, version in facts['versions'].items() if version)} |\n"
    yield "| step | what | result | s |\n|---|---|---|---|"
    for outcome in outcomes:
        yield f"| {outcome.name} | {outcome.what} | {outcome.status}{': ' + outcome.reason if outcome.reason else ''} | {outcome.seconds:.0f} |"
    figures = [figure for outcome in outcomes for figure in outcome.figures]
    yield "\n## Parity\n\n| figure | value | bar | |\n|---|---|---|---|"
    for figure in figures:
        if figure.bar is not None:
            yield f"| {figure.name} | {figure.value:.2e} | {figure.bar:.0e} | {'**above**' if figure.fails else 'ok'} |"
    yield "\n## Speed and memory\n\n| figure | value | target |\n|---|---|---|"
    for figure in figures:
        if figure.bar is None:
            yield f"| {figure.name} | {figure.value:,.4g} | {'' if figure.target is None else f'at most {figure.target}'} |"
    yield "\n## Not run\n"
    skipped = [f"- {outcome.name}: {outcome.reason}" for outcome in outcomes if outcome.status == "skipped"]
    skipped += [f"- {line}" for outcome in outcomes if isinstance(outcome.record, dict) for line in outcome.record.get("skipped", [])]
    yield from skipped or ["Nothing was left out."]
    yield "\n## Commands\n"
    for outcome in outcomes:
        yield f"- {outcome.name}: `{outcome.command}`"
    for outcome in outcomes:
        if outcome.tail:
            yield f"\n## The end of what {outcome.name} printed\n\n```\n{outcome.tail}\n```"
