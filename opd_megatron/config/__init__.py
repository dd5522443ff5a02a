"""What a run is. Frozen dataclasses and their checks; standard library only, never torch."""

from opd_megatron.config.alignment import AlignmentConfig
from opd_megatron.config.data import DataConfig, PrivilegedConfig
from opd_megatron.config.effopd import EffOPDConfig
from opd_megatron.config.loss import ImportanceConfig, LossConfig, PositionWeightsConfig
from opd_megatron.config.models import ParallelLayout, StudentConfig, TeacherConfig
from opd_megatron.config.modules import ModulesConfig
from opd_megatron.config.nearest import name_changes, nearest_layouts
from opd_megatron.config.overrides import all_keys, apply_overrides
from opd_megatron.config.run import CheckpointConfig, EvaluationConfig, RolloutConfig, RunConfig, TrainingConfig, fp8_multiple
from opd_megatron.config.stored import from_json
from opd_megatron.config.tracking import TrackingConfig

__all__ = [
    "AlignmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "EffOPDConfig",
    "EvaluationConfig",
    "ImportanceConfig",
    "LossConfig",
    "ModulesConfig",
    "ParallelLayout",
    "PositionWeightsConfig",
    "PrivilegedConfig",
    "RolloutConfig",
    "RunConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainingConfig",
    "all_keys",
    "apply_overrides",
    "fp8_multiple",
    "from_json",
    "name_changes",
    "nearest_layouts",
]
