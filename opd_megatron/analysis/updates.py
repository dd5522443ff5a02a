"""A run's update, tensor by tensor: the weights that it began with, and what its checkpoints add to them.

Checkpoints of any layout are read without ranks, one Megatron tensor at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from opd_megatron.config import RunConfig, from_json
from opd_megatron.models.checkpoint_weights import CheckpointWeights
from opd_megatron.models.gpt import DTYPES
from opd_megatron.models.weight_map import MappedTensor
from opd_megatron.models.weight_slices import to_hf
from opd_megatron.models.weights import WeightSource, open_weights
from opd_megatron.reporting.run_directory import RunDirectory

# The early checkpoint is the one nearest to this share of the run, as in the paper.
EARLY_PROGRESS = 0.1


@dataclass(frozen=True, kw_only=True)
class AnalyzedRun:
    """A run directory, opened: its configuration, the weights it began with, a checkpoint, and an earlier one where there is one."""

    directory: RunDirectory
    recipe: str
    config: RunConfig
    base: WeightSource
    base_path: str
    final_step: int
    final: CheckpointWeights
    early_step: int | None
    early: CheckpointWeights | None

    def base_of(self, row: MappedTensor) -> torch.Tensor:
        """Return a tensor before step 1 in fp32: of a run in bf16 what was left of it in bf16, from which its master weights were made."""
        return self.base.read(row).to(DTYPES[self.config.training.precision]).float()

    def update_of(self, row: MappedTensor, base: torch.Tensor, *, is_early: bool = False) -> torch.Tensor:
        """Return what training added to `base`, in fp32; ValueError if it is not finite."""
        source = self.early if is_early else self.final
        assert source is not None
        update = source.read_exact(row) - base
        damaged = update.numel() - int(update.isfinite().sum())
        if damaged:
            raise ValueError(f"{source.path}: the update of {row.name} from {self.base_path} holds {damaged} values that are not finite: damaged weights")
        return update

    def parts_of(self, row: MappedTensor, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the Hugging Face tensors that Megatron-Core fuses into one: query, key and value; gate and up."""
        return to_hf(row, tensor, self.final.architecture)


def open_run(path: Path, *, base: str | None = None, early: int | None = None, final: int | None = None) -> AnalyzedRun:
    """Open a run directory; ValueError for whatever is not there or does not fit. `base` names another Hugging Face folder than the run's student."""
    directory = RunDirectory(path)
    if not directory.config_path.is_file():
        raise ValueError(f"{path} is not a run directory: no {directory.config_path.name} in it")
    description = directory.read_description()
    config = from_json(RunConfig, description["config"])
    if base is not None:
        config = replace(config, student=replace(config.student, hf=base, checkpoint=None))
    checkpoints = _checkpoints(directory)
    final_step = _chosen_step("--final", final, checkpoints) if final is not None else max(checkpoints)
    earlier = {step: place for step, place in checkpoints.items() if step < final_step}
    early_step = _early_step(early, earlier, final_step, directory)
    # A base that is absent says so under the name that the user can change.
    try:
        base_weights = open_weights(hf=config.student.hf, checkpoint=config.student.checkpoint)
    except ValueError as error:
        raise ValueError(f"the weights that the run began with: {error}; name their folder with --base") from None
    run = AnalyzedRun(
        directory=directory,
        recipe=description["recipe"],
        config=config,
        base=base_weights,
        base_path=config.student.hf or str(config.student.checkpoint),
        final_step=final_step,
        final=CheckpointWeights(checkpoints[final_step]),
        early_step=early_step,
        early=CheckpointWeights(earlier[early_step]) if early_step is not None else None,
    )
    for source in (run.final, *([run.early] if run.early is not None else [])):
        if source.architecture != run.base.architecture:
            raise ValueError(f"{run.base_path} has another architecture than {source.path}: {run.base.architecture} instead of {source.architecture}")
    return run


def _checkpoints(directory: RunDirectory) -> dict[int, Path]:
    found = {int(name[1]): place for place in directory.checkpoints.glob("step_*") if (name := re.fullmatch(r"step_(\d+)", place.name))}
    if not found:
        raise ValueError(f"{directory.path} has no checkpoints: let the run save one (it does at its end)")
    return dict(sorted(found.items()))


def _chosen_step(option: str, step: int, checkpoints: dict[int, Path]) -> int:
    if step not in checkpoints:
        raise ValueError(f"{option} {step}: there is no such checkpoint; there are {', '.join(map(str, checkpoints))}")
    return step


def _early_step(wanted: int | None, earlier: dict[int, Path], final_step: int, directory: RunDirectory) -> int | None:
    """Return the earlier checkpoint that is asked for, else the one nearest to a tenth of the run, else None."""
    if not earlier:
        if wanted is not None:
            raise ValueError(
                f"--early {wanted}: {directory.checkpoints} has no checkpoint before step {final_step}; "
                "let the run keep its early ones: checkpoint.every_steps=10 checkpoint.keep=100"
            )
        return None
    if wanted is not None:
        return _chosen_step("--early", wanted, earlier)
    return min(earlier, key=lambda step: (abs(step - EARLY_PROGRESS * final_step), step))
