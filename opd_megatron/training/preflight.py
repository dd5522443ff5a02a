"""What can be refused before a process group exists or torch is imported: `recipes.run --check`, and the first act of every rank."""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opd_megatron.config import RunConfig, StudentConfig, TeacherConfig, TrackingConfig, TrainingConfig
from opd_megatron.config.tracking import refuse_secrets
from opd_megatron.data.sources import check_source
from opd_megatron.data.templates import check_templates
from opd_megatron.models.allocation import check_modules
from opd_megatron.models.architecture import Architecture, present_modules
from opd_megatron.models.hf_folder import open_hf_folder, read_architecture
from opd_megatron.models.limits import check_length
from opd_megatron.models.paging import check_budget, model_block_bytes, why_not_paged
from opd_megatron.reporting.run_directory import RunDirectory
from opd_megatron.training.layouts import check_layouts

# What a continued run may set anew: where and how fast it runs, how often it looks, how long it goes on. Not what it learns.
MAY_CHANGE = (
    "world_size",
    "student.layout",
    "student.vocab_multiple",
    "teacher.layout",
    "teacher.placement",
    "teacher.num_ranks",
    "teacher.staleness",
    "teacher.self_test",
    "teacher.micro_batch",
    "teacher.transfer_rounds",
    "rollout.batch_sequences",
    "rollout.engine",
    "rollout.kv_cache_gib",
    "rollout.cuda_graphs",
    "rollout.layout",
    "rollout.record",
    "loss.chunk_tokens",
    "training.steps",
    "training.micro_batch",
    "training.micro_batch_tokens",
    "training.layers",
    "training.gradient_accumulation_fusion",
    "training.overlap_grad_reduce",
    "training.recompute",
    "training.recompute_modules",
    "training.offload_optimizer",
    "training.check_memory",
    "training.max_skipped_steps",
    "training.watchdog_seconds",
    "training.peak_tflops",
    "checkpoint",
    "evaluation",
    "tracking",
)


def check_run(config: RunConfig, world_size: int) -> None:
    """Raise ValueError, with the values and the way out, for layouts, models or data that do not fit together. Reads headers only."""
    check_layouts(config, world_size, _peek(config.student), _peek(config.teacher_source))
    _check_trackers(config.tracking)
    check_source(config.data.prompts)
    check_templates(config.data, config.privileged)
    if isinstance(config.evaluation.prompts, str):
        check_source(config.evaluation.prompts, "evaluation.prompts")
    if config.effopd.enabled and isinstance(config.effopd.prompts, str):
        check_source(config.effopd.prompts, "effopd.prompts")
    if config.rollout.replay:
        _check_replay(RunDirectory(config.rollout.replay), config.training.steps)
    student = _open_model("student", config.student)
    check_length(config, "student", student)
    check_engine(config, student)
    check_recomputation(config.training, student)
    check_modules(config.modules, config.effopd.modules if config.effopd.enabled else None, student)
    if config.loss.top_k is not None and config.loss.top_k > student.vocab_size:
        raise ValueError(f"loss.top_k={config.loss.top_k} exceeds the student's vocabulary of {student.vocab_size}; lower it, or use a kind without top-k")
    teacher = config.teacher_source
    if teacher is None:
        return
    check_length(config, "teacher", _open_model("teacher", teacher))
    if config.alignment.is_identity:
        _check_tokenizer_files(_assets(config.student), _assets(teacher))


def _check_replay(run: RunDirectory, steps: int) -> None:
    for step in range(1, steps + 1):
        file = run.rollout_file(step)
        if not file.is_file():
            raise ValueError(f"rollout.replay={str(run.path)!r} has no record of step {step}: {file} is missing; record with rollout.record=true")


def check_engine(config: RunConfig, student: Architecture) -> None:
    """Raise ValueError where the dynamic engine is asked for and cannot write with the student, or not with these pages."""
    rollout, layout = config.rollout, config.writing_layout
    problem = why_not_paged(student, layout, config.training.precision)
    if rollout.engine == "dynamic" and problem is not None:
        raise ValueError(f"rollout.engine=dynamic cannot write with the student: {problem}; set it to auto or static")
    if rollout.kv_cache_gib is not None and problem is None:
        response = max(rollout.max_response_tokens, config.evaluation.max_response_tokens or 0)
        # Two bytes a number: no other precision is written in pages.
        check_budget(rollout.kv_cache_gib, model_block_bytes(student, layout, 2), config.data.max_prompt_tokens, response)
    if not rollout.cuda_graphs:
        return
    if layout.pipeline > 1:
        raise ValueError(
            f"rollout.cuda_graphs=true records steps of one stage, and the student writes in {layout.pipeline}; set rollout.layout.pipeline=1, or it to false"
        )
    if student.experts is not None:
        raise ValueError("rollout.cuda_graphs=true cannot record a mixture of experts, whose messages depend on where tokens go; set it to false")


def check_recomputation(training: TrainingConfig, student: Architecture) -> None:
    """Raise ValueError where the modules that are to be computed again are none of the student's."""
    modules = training.recomputed_modules
    if modules and not present_modules(modules, has_experts=student.experts is not None):
        raise ValueError(f"training.recompute_modules={','.join(modules)} are parts of experts, and the student has none; add mlp or core_attn")


def _check_trackers(tracking: TrackingConfig) -> None:
    """Raise ValueError for a tracker that is not installed, or that could not be reached by anybody. Imports and asks none."""
    for key, package, distribution in (("wandb_project", "wandb", "wandb"), ("mlflow_experiment", "mlflow", "mlflow-skinny")):
        if getattr(tracking, key) is not None and not _is_installed(package):
            raise ValueError(f"tracking.{key} needs {package}, which is not installed: pip install {distribution}, or both by the extra `tracking`")
    if tracking.wandb_project is not None and tracking.wandb_mode == "online" and not _has_wandb_key():
        raise ValueError("tracking.wandb_project needs a key: export WANDB_API_KEY, or run `wandb login`, or set tracking.wandb_mode=offline")
    if tracking.mlflow_experiment is None:
        return
    source = "tracking.mlflow_uri" if tracking.mlflow_uri else "MLFLOW_TRACKING_URI"
    uri = tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    refuse_secrets(source, uri)
    database = uri.partition(":")[0].partition("+")[0]
    if database in ("sqlite", "postgresql", "mysql", "mssql") and not _is_installed("sqlalchemy"):
        raise ValueError(f"{source} is a {database} database, which needs the whole of MLflow: pip install mlflow, or name a server or a folder")


def _is_installed(package: str) -> bool:
    """Return whether a package can be imported; a folder of that name, such as W&B leaves where it ran, is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def _has_wandb_key() -> bool:
    """Return whether W&B would find a key where it looks without asking: the environment, or what `wandb login` wrote."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _assets(model: StudentConfig | TeacherConfig) -> Path:
    return Path(model.hf) if model.hf else Path(model.checkpoint or "") / "huggingface"


def _peek(model: StudentConfig | TeacherConfig | None) -> Architecture | None:
    """Return a model's architecture; None where it cannot be read, which `_open_model` says."""
    try:
        return read_architecture(_assets(model)) if model is not None else None
    except ValueError:
        return None


def _open_model(role: str, model: StudentConfig | TeacherConfig) -> Architecture:
    """Return the architecture of a model whose files are whole."""
    if model.hf:
        return open_hf_folder(model.hf).architecture
    if not (Path(model.checkpoint or "") / "metadata.json").is_file():
        raise ValueError(f"{role}.checkpoint={model.checkpoint!r} is not a Megatron checkpoint: no metadata.json in it")
    return read_architecture(_assets(model))


def _check_tokenizer_files(student: Path, teacher: Path) -> None:
    """Compare the two vocabularies as far as tokenizer.json shows them; the run compares the loaded tokenizers as well."""
    ours, theirs = _vocabulary(student / "tokenizer.json"), _vocabulary(teacher / "tokenizer.json")
    if ours is None or theirs is None or ours == theirs:
        return
    name = min(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    raise ValueError(
        f"student and teacher tokenizers differ: token {name!r} is {ours.get(name, 'absent')} in {student} and {theirs.get(name, 'absent')} in {teacher} "
        f"({len(ours)} and {len(theirs)} in all); choose a teacher with the student's tokenizer, or set alignment.kind=strict"
    )


def _vocabulary(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    vocabulary = content.get("model", {}).get("vocab")
    if isinstance(vocabulary, list):
        vocabulary = {piece[0]: index for index, piece in enumerate(vocabulary)}
    return {**(vocabulary or {}), **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}
