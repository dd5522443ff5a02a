"""One rank's whole life in a run: join, check, load, train, export, report, leave."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from opd_megatron.config import RunConfig
from opd_megatron.conversion.to_hf import export_hf
from opd_megatron.models.allocation import Allocation
from opd_megatron.models.checkpoint_weights import CheckpointWeights
from opd_megatron.parallel.world import Bridge, describe_device, join_world, leave_world, shared_errors, worlds
from opd_megatron.planning.architectures import KnownModel
from opd_megatron.planning.remedies import Catalogue
from opd_megatron.reporting.run_directory import RunDirectory, Status
from opd_megatron.teacher.teacher import Leave
from opd_megatron.training.alignment import describe_alignment
from opd_megatron.training.checkpoint import CheckpointFolder, Progress
from opd_megatron.training.equipment import check_equipment, describe_equipment
from opd_megatron.training.evaluator import Evaluator
from opd_megatron.training.free_memory import check_free_memory, free_gpu_bytes, naming_memory
from opd_megatron.training.measured_modules import measured_choice
from opd_megatron.training.preflight import MAY_CHANGE
from opd_megatron.training.recorder import Recorder
from opd_megatron.training.setup import Parts, Sources, build_parts, describe_data, make_search, open_sources
from opd_megatron.training.signals import StopRequest
from opd_megatron.training.stop_signals import StopSignals
from opd_megatron.training.teacher_ranks import serve
from opd_megatron.training.trainer import Trainer


def run_job(
    recipe: str, config: RunConfig, run_dir: Path, signals: StopSignals | None = None, catalogue: Catalogue | None = None
) -> Literal["finished", "interrupted"]:
    """Join the job, run one configuration into one run directory, leave; ValueError for the user's mistakes, anything else is a crash.

    `catalogue` has what may be named where the GPUs are too small.
    """
    _quiet_libraries()
    signals = signals or StopSignals()
    with signals.ending_a_wait("waiting for the other ranks"):
        device = join_world()
    _note(describe_device(device))
    status = run_in_world(recipe, config, run_dir, device, signals, catalogue)
    # A launcher may end all ranks as soon as one has ended with 75; by then rank 0 has written the status.
    dist.barrier()
    leave_world()
    return status


def run_in_world(
    recipe: str, config: RunConfig, run_dir: Path, device: torch.device, signals: StopSignals | None = None, catalogue: Catalogue | None = None
) -> Literal["finished", "interrupted"]:
    """The same, for ranks that have joined and stay."""
    stop = StopRequest(device, signals)
    check_equipment(config)
    # Models, tokenizers and data are opened before the run directory is touched: a mistake in them leaves nothing behind.
    sources = open_sources(config)
    if device.type == "cuda" and config.training.check_memory:
        models = [KnownModel(source.architecture, source.assets) for source in (sources.student, sources.teacher) if source is not None]
        check_free_memory(config, models[0], models[1] if len(models) > 1 else None, free_gpu_bytes(device), catalogue, _note)
    with worlds(config.num_teacher_ranks) as bridge:
        if bridge.rank not in bridge.student_ranks:
            with naming_memory(lambda: "the phase 'teacher', on a rank of its own"):
                return serve(config, sources, bridge, device)
        try:
            status = _run_student(recipe, config, sources, run_dir, bridge, device, stop)
        except ValueError:
            _let_teacher_go(bridge, "refused")
            raise
        _let_teacher_go(bridge, status)
        return status


def _let_teacher_go(bridge: Bridge, status: Literal["finished", "interrupted", "refused"]) -> None:
    """Tell ranks that hold nothing of the student how the run ended."""
    if bridge.teacher_ranks != bridge.student_ranks:
        bridge.tell_teacher(Leave(status=status))


def _run_student(
    recipe: str, config: RunConfig, sources: Sources, run_dir: Path, bridge: Bridge, device: torch.device, stop: StopRequest
) -> Literal["finished", "interrupted"]:
    directory = _open_directory(recipe, config, run_dir)
    try:
        status = _train(config, sources, directory, bridge, device, stop)
        _write_status(directory, status)
    except ValueError:
        if dist.get_rank() == 0 and not directory.step_back():
            directory.write_status("crashed")
        raise
    except BaseException:
        _write_status(directory, "crashed")
        raise
    finally:
        directory.unlock()
    return status


def _open_directory(recipe: str, config: RunConfig, run_dir: Path) -> RunDirectory:
    directory = RunDirectory(run_dir)
    with shared_errors():
        if dist.get_rank() == 0:
            if not config.checkpoint.resume and any(directory.checkpoints.glob("step_*")):
                raise ValueError(f"{run_dir} holds checkpoints and checkpoint.resume=false; use another --run-dir, or resume")
            directory = RunDirectory.open(run_dir, recipe=recipe, config=config.to_json(), may_change=MAY_CHANGE)
            directory.write_status("running")
    return directory


def _train(
    config: RunConfig, sources: Sources, directory: RunDirectory, bridge: Bridge, device: torch.device, stop: StopRequest
) -> Literal["finished", "interrupted"]:
    """Load, resume, train, and on the last step export and report."""
    checkpoints = CheckpointFolder(directory.checkpoints, sources.student.assets, keep=config.checkpoint.keep)
    latest = checkpoints.latest_whole(_note)
    _note(describe_equipment(config, sources.student.architecture, sources.teacher.architecture if sources.teacher is not None else None))
    _note(describe_data(sources))
    if sources.aligner is not None:
        _note(describe_alignment(sources.aligner))
        with shared_errors():
            if dist.get_rank() == 0:
                sources.aligner.vocabulary.save(directory.shared_vocabulary)
    with naming_memory(lambda: "loading"):
        parts = build_parts(config, sources, directory.path, bridge, device, _note)
    try:
        status, done = _train_parts(config, sources, parts, directory, checkpoints, latest, stop)
    except ValueError:
        if parts.teacher is not None:
            parts.teacher.drain()
        raise
    if parts.teacher is not None:
        parts.teacher.drain()
    if status == "finished":
        _export(checkpoints, directory)
    else:
        _note(f"stopped on request {f'after step {done}, which is saved' if done else 'before the first step'}; start the same command again to go on")
    return status


def _train_parts(
    config: RunConfig, sources: Sources, parts: Parts, directory: RunDirectory, checkpoints: CheckpointFolder, latest: Path | None, stop: StopRequest
) -> tuple[Literal["finished", "interrupted"], int]:
    """Decide what trains, resume, and train; return how it ended and how many steps are done."""
    prompts, ahead = sources.prompts, None
    progress = Progress(data_fingerprint=prompts.fingerprint, search_fingerprint=sources.search_prompts.fingerprint if sources.search_prompts else "")
    if latest is not None:
        began, progress = progress, checkpoints.open(latest, sources.student.architecture)
        _check_data(config, progress, began)
    if config.modules.train == "measured":
        if latest is not None and not progress.trained:
            raise ValueError(f"{latest} is damaged: it does not say what trains under modules.train=measured; move it away and start again")
        if not progress.trained:
            measured = measured_choice(config, parts, prompts, stop.agreed, _note)
            if measured is None:
                return "interrupted", 0
            with shared_errors():
                if dist.get_rank() == 0:
                    directory.modules_path.write_text(measured.as_json())
            progress = replace(progress, trained=measured.train)
        parts.student.train_only(Allocation.of(config.modules, sources.student.architecture, measured=progress.trained))
    _note(parts.student.describe_trained())
    parts = replace(parts, search=make_search(config, sources, parts, _note))
    if latest is not None:
        checkpoints.load(parts.student, latest, progress, parts.search)
        ahead = checkpoints.written_ahead(latest)
        _note(f"resumed from {latest}")
        if progress.step >= config.training.steps:
            _note(f"nothing to train: {progress.step} steps are done, training.steps={config.training.steps}")
    recorder = Recorder(directory, config.tracking, first_step=progress.step + 1, total_steps=config.training.steps)
    status: Status = "crashed"
    try:
        evaluator = Evaluator(config, sources, parts, recorder)
        trainer = Trainer(config, prompts, parts, recorder, evaluator, checkpoints, progress, ahead, stop)
        status = trainer.run()
        return status, trainer.progress.step
    finally:
        recorder.close(status)


def _check_data(config: RunConfig, saved: Progress, now: Progress) -> None:
    """Raise ValueError where a run would go on with other prompts than it began with."""
    for source, found, wanted in (
        (config.data.prompts, saved.data_fingerprint, now.data_fingerprint),
        (f"effopd.prompts={config.effopd.prompts}", saved.search_fingerprint, now.search_fingerprint),
    ):
        if found != wanted:
            raise ValueError(f"{source} is not the data this run began with (hash {found}, now {wanted}); restore it, or use another --run-dir")


def _export(checkpoints: CheckpointFolder, directory: RunDirectory) -> None:
    """Write the trained student as a Hugging Face folder, and the report; rank 0 writes while all wait."""
    with shared_errors():
        if dist.get_rank() == 0:
            from opd_megatron.reporting.report import write_report  # matplotlib: half a second that only this rank needs

            latest = checkpoints.latest()
            assert latest is not None, "a finished run has saved its last step"
            export_hf(CheckpointWeights(latest), directory.hf, replace=True)
            directory.write_status("finished")
            report = write_report([directory.path], directory.report_path)
            _note(f"student  {directory.hf}\nreport   {report}")


def _write_status(directory: RunDirectory, status: Status) -> None:
    if dist.get_rank() == 0:
        directory.write_status(status)


def _note(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def _quiet_libraries() -> None:
    """Keep what Megatron-Core and torch log at start out of the way; warnings that matter here are this project's own."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("megatron", "torch.distributed", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
