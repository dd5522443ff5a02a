"""Where a run's numbers go besides its own folder. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from opd_megatron.config.checks import require

_SECRET = re.compile(r"[?&;][^=&]*(password|passwd|pwd|token|secret|key)[^=&]*=", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Weights & Biases and MLflow, each off while its first field is null. Keys and passwords come from the environment: no field holds one."""

    # What trackers call the run; null: the name of the run directory.
    run_name: str | None = None
    wandb_project: str | None = None
    wandb_entity: str | None = None
    # offline: everything stays in the run directory until `wandb sync`.
    wandb_mode: Literal["online", "offline"] = "online"
    mlflow_experiment: str | None = None
    # Null: what MLFLOW_TRACKING_URI says where the run starts, or else the folder `mlruns` of the run directory.
    mlflow_uri: str | None = None

    def __post_init__(self) -> None:
        require(self.run_name != "", "tracking.run_name is empty; give a name, or null for that of the run directory")
        require(self.wandb_project != "", "tracking.wandb_project is empty; give a name, or null for no Weights & Biases")
        require(self.mlflow_experiment != "", "tracking.mlflow_experiment is empty; give a name, or null for no MLflow")
        for name, value, needed in (("wandb_entity", self.wandb_entity, "wandb_project"), ("mlflow_uri", self.mlflow_uri, "mlflow_experiment")):
            # The address stays out of the message: it may hold a password.
            require(value is None or getattr(self, needed) is not None, f"tracking.{name} is without effect while tracking.{needed} is null; set that as well")
        project = self.wandb_project or ""
        require(
            len(project) <= 128 and not set(project) & set("/\\#?%:"),
            f"tracking.wandb_project={project!r} is no name of a project: at most 128 characters, none of / \\ # ? % :",
        )
        if self.mlflow_uri is not None:
            refuse_secrets("tracking.mlflow_uri", self.mlflow_uri)


def refuse_secrets(name: str, uri: str) -> None:
    """Raise ValueError, without repeating it, for an address with a user, a password or a key in it: it would stay in files and logs."""
    scheme, _, rest = uri.partition("://")
    require(
        not ("@" in rest and scheme and scheme != "file") and not _SECRET.search(uri),
        f"{name} has a user, a password or a key in its address, which would be written into the run directory and logs: take it out, and export "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    )
