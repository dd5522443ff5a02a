"""Saving and resuming a run: weights, optimizer and progress in Megatron-Core's distributed format, any layout to any layout.

Randomness needs no state: prompts, their order and every random number of a rollout are functions of (seed, step), and the supported
architectures have no dropout. A checkpoint appears whole under `step_N` or not at all.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.checkpoint_weights import ASSETS_FOLDER, CheckpointWeights
from opd_megatron.models.chunk_state import load_weights, sharded_weights
from opd_megatron.models.damage import DAMAGE, damage_in
from opd_megatron.models.hf_folder import copy_assets
from opd_megatron.models.origin import write_origin
from opd_megatron.parallel.megatron import load_checkpoint
from opd_megatron.parallel.world import agreed_by_rank_0, shared_errors
from opd_megatron.rollout.rollouts import Rollouts, record_rollouts, replay_rollouts
from opd_megatron.training.background_write import BackgroundWrite
from opd_megatron.training.checksums import damage_in_files, write_checksums
from opd_megatron.training.effopd import EffOPD, Search
from opd_megatron.training.kept_weights import loaded_beside, sharded_beside
from opd_megatron.training.optimizer import has_finite_state, optimizer_state, prime_adam, unshare_adam_step
from opd_megatron.training.student import Student

logger = logging.getLogger(__name__)

_PROGRESS_FILE = "progress.json"
_REPLACED, _PARTIAL = ".replaced", ".partial"
# With teacher.staleness=1: the next step's samples, which the weights before this checkpoint's last update wrote.
_AHEAD_FILE = "written_ahead.jsonl"
# Optimizer state takes the shape of the parameters, so that any layout loads it; one tensor per layer keeps a reader's memory small.
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: `step` steps are done, `skipped_steps` of them changed nothing.

    `trained` is the choice of modules that `modules.train=measured` came to; `searches` are EffOPD's, and `search_fingerprint` is of the prompts they ask.
    """

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    data_fingerprint: str = ""
    trained: str = ""
    searches: tuple[Search, ...] = ()
    search_fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "searches": [search.to_json() for search in self.searches]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Progress:
        """Return what `to_json` was made of, or an older version's; TypeError or KeyError for another record."""
        progress = cls(**{**record, "searches": tuple(Search.from_json(search) for search in record.get("searches", ()))})
        if [type(value) for value in asdict(progress).values()] != [type(value) for value in asdict(cls()).values()]:
            raise TypeError(f"{progress} has fields of the wrong type")
        return progress


class CheckpointFolder:
    """The `checkpoints/` folder of one run; `save` and `load` are called by every rank."""

    def __init__(self, path: Path, assets: Path, *, keep: int) -> None:
        self.path = path
        self.assets = assets
        self.keep = keep
        # Under its last name, what is being written.
        self._unpublished: tuple[Path, BackgroundWrite] | None = None

    def latest(self) -> Path | None:
        """Return the newest checkpoint; one under construction has another name."""
        steps = self._steps()
        return steps[-1] if steps else None

    def latest_whole(self, note: Callable[[str], None]) -> Path | None:
        """Return the newest checkpoint whose files are as they were written, the same on every rank; damaged ones are noted and set aside as `step_N.damaged`.

        ValueError if there are checkpoints and all are damaged.
        """
        with shared_errors():
            if dist.get_rank() == 0:
                self._recover()
        damaged: list[str] = []
        for path in reversed(agreed_by_rank_0(self._steps())):
            damage = damage_in_files(path)
            if damage is None:
                return path
            damaged.append(f"{path.name}: {damage}")
            note(f"{path} is damaged: {damage}; it is set aside as {path.name}.damaged")
            with shared_errors():
                if dist.get_rank() == 0:
                    aside = path.with_name(f"{path.name}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
        if damaged:
            raise ValueError(f"all checkpoints of {self.path} are damaged ({'; '.join(damaged)}); restore one, or move the run away and begin again")
        return None

    def save(self, student: Student, progress: Progress, ahead: Rollouts | None = None, search: EffOPD | None = None, *, in_background: bool = False) -> None:
        """Write `step_N`, with the samples that wait for the next step and EffOPD's anchor, then drop all but the newest `keep`.

        With `in_background` it is copied, and appears in a later call of `publish` or of this. ValueError on every rank, there or here, if the disk does
        not take it; older ones stay.
        """
        self.publish(wait=True)
        final, partial = self.path / f"step_{progress.step}", self.path / f"step_{progress.step}{_PARTIAL}"
        needed_bytes = _checkpoint_bytes(student, search)
        with shared_errors():
            if dist.get_rank() == 0:
                self._make_room(partial, needed_bytes)
        with student.optimizer_on_device():
            changes = _live_tensors(student, search) if in_background else []
            writing = BackgroundWrite(_sharded_state(student, search, is_loading=False), partial, dict(_SHARDING), changes=changes)
            self._unpublished = final, writing
            with shared_errors():
                if dist.get_rank() == 0:
                    self._complete(partial, student, progress, ahead)
            if not in_background:
                self.publish(wait=True)

    def publish(self, *, wait: bool) -> None:
        """Give the checkpoint that is being written its name, once every rank has written it; every rank calls this. ValueError as for `save`."""
        if self._unpublished is None:
            return
        final, writing = self._unpublished
        if not wait and not writing.is_written_everywhere():
            return
        self._unpublished = None
        partial = final.with_name(f"{final.name}{_PARTIAL}")
        try:
            writing.finish()
            write_checksums(partial, writing.digests)
            with shared_errors():
                if dist.get_rank() == 0:
                    self._rename(partial, final)
        except CheckpointException as error:
            # Megatron-Core tells every rank when any of them could not write; the reason is known where it happened.
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(f"cannot write checkpoint {final}: {damage_in(error)}; {self._what_is_kept()}") from error

    def _make_room(self, partial: Path, needed_bytes: int) -> None:
        """Make the folder of a checkpoint under construction; ValueError if the disk will not hold it."""
        for unfinished in self.path.glob(f"step_*{_PARTIAL}"):
            shutil.rmtree(unfinished)
        partial.mkdir(parents=True)
        free_bytes = shutil.disk_usage(partial).free
        if free_bytes < needed_bytes:
            partial.rmdir()
            final = partial.with_name(partial.name.removesuffix(_PARTIAL))
            raise ValueError(f"cannot write checkpoint {final}: it needs about {needed_bytes:,} bytes and {free_bytes:,} are free; {self._what_is_kept()}")

    def load(self, student: Student, checkpoint: Path, progress: Progress, search: EffOPD | None = None) -> None:
        """Fill the student's weights and optimizer, and the search's anchor, with those of a checkpoint that was opened; ValueError if it is damaged."""
        with student.optimizer_on_device():
            self._fill(student, checkpoint, progress, search)
        student.scheduler.step(increment=progress.step)

    def written_ahead(self, checkpoint: Path) -> Rollouts | None:
        """Return the samples that were waiting for the step after this checkpoint; ValueError if they are damaged."""
        file = checkpoint / _AHEAD_FILE
        with shared_errors():
            try:
                return replay_rollouts(file) if file.is_file() else None
            except ValueError as error:
                raise ValueError(f"{checkpoint} is damaged: {error}; {self._way_out(checkpoint)}") from None

    def _fill(self, student: Student, checkpoint: Path, progress: Progress, search: EffOPD | None) -> None:
        wanted = _sharded_state(student, search, is_loading=True)
        with shared_errors():
            try:
                state = load_checkpoint(wanted, checkpoint)
            except DAMAGE as error:
                raise ValueError(f"{checkpoint} is damaged: {damage_in(error)}; {self._way_out(checkpoint)}") from error
        for chunk, tensors in zip(student.model, state["model"], strict=True):
            load_weights(chunk, tensors)
        student.optimizer.load_state_dict(state["optimizer"])
        if student.average is not None:
            slices = student.average.slices
            for parameter, tensor in loaded_beside(student.model, state.get("average", {})):
                slices[parameter].copy_(tensor)
        if search is not None:
            search.resume(progress.searches, dict(loaded_beside(student.model, state.get("anchor", {}))))
        unshare_adam_step(student.optimizer)
        with shared_errors():
            if not (has_finite_state(student.optimizer) and all(bool(parameter.isfinite().all()) for parameter in student.model.parameters())):
                raise ValueError(f"{checkpoint} is damaged: weights or moments in it are not finite; {self._way_out(checkpoint)}")

    def open(self, checkpoint: Path, architecture: Architecture) -> Progress:
        """Return where the run stood, after a look at the headers; ValueError on every rank if the checkpoint is another model's, or damaged."""
        with shared_errors():
            return self._open(checkpoint, architecture)

    def _open(self, checkpoint: Path, architecture: Architecture) -> Progress:
        try:
            found = CheckpointWeights(checkpoint).architecture
            progress = Progress.from_json(json.loads((checkpoint / _PROGRESS_FILE).read_text()))
        except FileNotFoundError as error:
            raise ValueError(f"{checkpoint} is damaged: {error.filename} is missing; {self._way_out(checkpoint)}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{checkpoint / _PROGRESS_FILE} is damaged: {error}; {self._way_out(checkpoint)}") from None
        except ValueError as error:
            raise ValueError(f"{error}; {self._way_out(checkpoint)}") from None
        if found != architecture:
            raise ValueError(f"{checkpoint} holds another model than the student: {found} instead of {architecture}")
        return progress

    def _way_out(self, damaged: Path) -> str:
        older = [path for path in self._steps() if path != damaged]
        after = f"resume from {older[-1].name}" if older else "begin at step 1: there is no older one"
        return f"move {damaged} away and start again to {after}"

    def _what_is_kept(self) -> str:
        latest = self.latest()
        return f"{latest.name} is untouched: make room and start again to resume from it" if latest else "this run has no earlier checkpoint"

    def _complete(self, partial: Path, student: Student, progress: Progress, ahead: Rollouts | None) -> None:
        """Add what rank 0 writes alone."""
        copy_assets(self.assets, partial / ASSETS_FOLDER)
        write_origin(partial, "training", layout=student.groups.layout.describe(), world_size=dist.get_world_size())
        if ahead is not None:
            record_rollouts(ahead, partial / _AHEAD_FILE)
        (partial / _PROGRESS_FILE).write_text(json.dumps(progress.to_json(), indent=2) + "\n")

    def _rename(self, partial: Path, final: Path) -> None:
        """Give a whole checkpoint its name, and drop the old ones."""
        # A search that was made after a resume saves its step again: until the new one is there, the old one is, under one name or another.
        replaced = final.with_name(final.name + _REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old)

    def _recover(self) -> None:
        """Give a checkpoint its name back that was about to be replaced when its job ended. Rank 0 calls it."""
        for old in self.path.glob(f"step_*{_REPLACED}"):
            final = old.with_name(old.name.removesuffix(_REPLACED))
            if final.exists():
                shutil.rmtree(old)
            else:
                old.rename(final)

    def _steps(self) -> list[Path]:
        found = [(int(name[1]), path) for path in self.path.glob("step_*") if (name := re.fullmatch(r"step_(0|[1-9]\d*)", path.name)) and path.is_dir()]
        return [path for _, path in sorted(found)]


def _sharded_state(student: Student, search: EffOPD | None, *, is_loading: bool) -> dict[str, Any]:
    # Adam has no state before its first update, which a run of skipped steps never makes; a load lays the checkpoint over what is there.
    prime_adam(student.optimizer)
    metadata = {**_SHARDING, "dp_cp_group": student.groups.collection.dp_cp}
    model = [sharded_weights(chunk, metadata) for chunk in student.model]
    state = {"model": model, "optimizer": student.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)}

    def entries() -> list[dict[str, Any]]:
        """Return the model's own again: what is made of them changes them."""
        return [sharded_weights(chunk, metadata) for chunk in student.model]

    if student.average is not None:
        state["average"] = sharded_beside(student.model, entries(), student.average.slices, "teacher_average.", only_copy=True)
    if search is not None:
        slices = search.empty_slices() if is_loading else search.anchor_slices()
        state["anchor"] = sharded_beside(student.model, entries(), slices, "effopd_anchor.", only_copy=False)
    # What a rank has nothing of would look like a value that ranks disagree on.
    return {name: part for name, part in state.items() if part}


def _live_tensors(student: Student, search: EffOPD | None) -> list[torch.Tensor]:
    """Return what the steps after a save change of what it saves."""
    average = student.average.tensors.values() if student.average is not None else ()
    anchor = search.anchor.values() if search is not None else ()
    return [*student.model.parameters(), *optimizer_state(student.optimizer), *average, *anchor]


def _checkpoint_bytes(student: Student, search: EffOPD | None) -> int:
    """Return about how much the whole job will write: weights once, three fp32 tensors of optimizer state per weight that trains, and 5 % beside."""
    is_first_copy = {True: student.groups.writer == 0, False: student.groups.collection.expt_dp.rank() == 0}
    # Megatron-Core marks the weights of experts, which have copies on ranks of their own, with `allreduce = False`.
    written = [parameter for parameter in student.model.parameters() if is_first_copy[getattr(parameter, "allreduce", True)]]
    weights = sum(parameter.numel() * (parameter.element_size() + 12 * parameter.requires_grad) for parameter in written)
    if search is not None:
        weights += sum(shard.nbytes for shard in search.anchor.values())
    if student.average is not None:
        weights += sum(tensor.nbytes for tensor in student.average.tensors.values())
    total = torch.tensor([weights], dtype=torch.int64, device=student.device)
    dist.all_reduce(total)
    return int(int(total) * 1.05) + (1 << 20)
