"""The architecture of a model that may not have been downloaded yet. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.config import StudentConfig, TeacherConfig
from opd_megatron.models.architecture import Architecture
from opd_megatron.models.hf_folder import read_architecture


@dataclass(frozen=True)
class KnownModel:
    """An architecture and the folder whose config.json told it."""

    architecture: Architecture
    source: Path


def find_model(role: str, settings: StudentConfig | TeacherConfig, published: Sequence[Path]) -> KnownModel:
    """Return the model that a configuration names; of a Hugging Face folder that is absent, the architecture `published` under its name.

    `published` are folders of folders with a config.json. The name is that of the absent folder (Qwen3-8B), or its parent's and its own (tiny_teacher).
    Raises ValueError if neither is there, or if config.json is not understood.
    """
    folder = Path(settings.hf) if settings.hf else Path(settings.checkpoint or "") / "huggingface"
    if not folder.exists():
        known = {path.name: path for shelf in published for path in sorted(shelf.iterdir()) if path.is_dir()}
        named = [known[name] for name in (folder.name, f"{folder.parent.name}_{folder.name}") if name in known]
        if settings.hf is None or not named:
            key, value = ("hf", settings.hf) if settings.hf else ("checkpoint", settings.checkpoint)
            raise ValueError(f"{role}.{key}={value!r} is not on this machine, and no architecture of that name is; there are {', '.join(known)}")
        folder = named[0]
    return KnownModel(read_architecture(folder), folder)


def know_model(role: str, settings: StudentConfig | TeacherConfig, published: Sequence[Path]) -> KnownModel:
    """Return what `find_model` does; raise ValueError as well if the layout does not divide the sizes or cannot train the model."""
    known = find_model(role, settings, published)
    known.architecture.check_layout(role, settings.layout)
    if role == "student":
        known.architecture.check_training(role, settings.layout)
    return known
