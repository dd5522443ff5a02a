"""The architectures that are understood, one file each."""

from opd_megatron.models.families import gemma2, llama, mistral, phi3, qwen2, qwen3, qwen3_moe
from opd_megatron.models.families.family import Activation, Family, TensorNames

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (qwen2, qwen3, qwen3_moe, llama, mistral, gemma2, phi3)}
FAMILY_OF_CLASS: dict[str, Family] = {family.class_name: family for family in FAMILIES.values()}

__all__ = ["FAMILIES", "FAMILY_OF_CLASS", "Activation", "Family", "TensorNames"]
