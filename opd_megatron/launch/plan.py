"""What a launch consists of, and what is refused before anything starts. Standard library only: nothing here knows nemo-run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.reporting.run_directory import RunDirectory

# Every step runs here: recipes name their assets, and users their data, relative to it.
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command, without its interpreter, the ranks it runs on, and the folders it needs inside a container besides the project's.

    `gpus_per_node` is 0 where none are asked for.
    """

    name: str
    arguments: tuple[str, ...]
    folders: tuple[Path, ...]
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A training run, with a conversion before it and an export after it where they are asked for."""

    recipe: str
    overrides: tuple[str, ...]
    run_dir: Path
    convert_from: Path | None = None
    export: Path | None = None

    @property
    def start(self) -> Path:
        """Where the converted student lies."""
        return self.run_dir / "start"

    def check(self) -> dict[str, Any]:
        """Return the resolved config; raise ValueError for folders that are in the way, and for what `recipes.run --check` refuses."""
        overrides = list(self.overrides)
        if self.convert_from is not None:
            if named := [word for word in overrides if word.startswith(("student.hf=", "student.checkpoint="))]:
                raise ValueError(f"--convert-from names the student, and so does {named[0]}; leave one of them out")
            if self.start.exists():
                raise ValueError(f"{self.start} exists; to go on with it, put student.hf=null student.checkpoint={self.start} in the place of --convert-from")
            # The same architecture and tokenizer as those of the checkpoint that does not exist yet.
            overrides += [f"student.hf={self.convert_from}", "student.checkpoint=null"]
        if self.export is not None:
            if self.export.exists():
                raise ValueError(f"--export {self.export} exists; choose another folder, or move it away")
            if not self.export.parent.is_dir():
                raise ValueError(f"--export {self.export}: there is no folder {self.export.parent}; make it first")
        # A new student is no change of the run's that a chain goes on with: it begins one.
        folder = [] if self.convert_from is not None else ["--run-dir", str(self.run_dir)]
        return _resolve(self.recipe, [*folder, *overrides])

    def steps(self, config: dict[str, Any], nodes: int, tasks_per_node: int, gpus_per_node: int, *, launcher: Sequence[str] = ()) -> list[Step]:
        """Return the steps in their order; `launcher` is what makes `recipes.run` start the ranks itself."""
        steps, overrides = [], list(self.overrides)
        if self.convert_from is not None:
            convert = ("tools/convert_hf_to_megatron.py", "--hf", str(self.convert_from), "--out", str(self.start))
            steps.append(Step(name="convert", arguments=convert, folders=(self.convert_from, self.run_dir)))
            overrides += ["student.hf=null", f"student.checkpoint={self.start}"]
        train = ("-m", "recipes.run", self.recipe, *launcher, "--run-dir", str(self.run_dir), *overrides)
        steps.append(Step(name="train", arguments=train, folders=(self.run_dir,), nodes=nodes, tasks_per_node=tasks_per_node, gpus_per_node=gpus_per_node))
        if self.export is not None:
            # A finished run has saved its last step.
            last = RunDirectory(self.run_dir).checkpoints / f"step_{config['training']['steps']}"
            export = ("tools/convert_megatron_to_hf.py", "--checkpoint", str(last), "--out", str(self.export))
            steps.append(Step(name="export", arguments=export, folders=(self.run_dir, self.export.parent)))
        return steps


def fit_nodes(world_size: int, gpus_per_node: int, nodes: int | None = None) -> tuple[int, int]:
    """Return how many nodes a recipe fills, and the ranks on each; raise ValueError where they are not equal, or where `nodes` contradicts."""
    if gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node {gpus_per_node} must be at least 1")
    tasks_per_node = min(world_size, gpus_per_node)
    if world_size % tasks_per_node:
        usable = max(size for size in range(1, gpus_per_node + 1) if world_size % size == 0)
        raise ValueError(f"world_size={world_size} does not fill nodes of {gpus_per_node} GPUs; use --gpus-per-node {usable}, or another world_size=")
    needed = world_size // tasks_per_node
    if nodes is not None and nodes != needed:
        raise ValueError(
            f"--nodes {nodes} contradicts the recipe: world_size={world_size} is {needed} node{'s' * (needed > 1)} of {tasks_per_node} ranks; "
            f"leave --nodes out, or set world_size={max(nodes, 1) * gpus_per_node}"
        )
    return needed, tasks_per_node


def check_writable(folder: Path, option: str) -> None:
    """Make the folder; raise ValueError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror or error}; choose another {option}") from None


def check_idle(run_dir: Path) -> None:
    """Raise ValueError for a run directory in which a job is at work."""
    if RunDirectory(run_dir).is_in_use():
        raise ValueError(f"another job is running in {run_dir}; wait for it, stop it, or use another --run-dir")


def _resolve(recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's config as the only way to run it prints it."""
    # A shell within a job is no rank of it.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE") and not name.startswith("SLURM_")}
    command = [sys.executable, "-m", "recipes.run", recipe, "--check", *overrides]
    checked = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if checked.returncode == 2:
        raise ValueError(checked.stderr.strip().rpartition("error: ")[2])
    if checked.returncode:
        raise RuntimeError(f"recipes.run {recipe} --check ended with {checked.returncode}:\n{checked.stderr}")
    return json.loads(checked.stdout)
