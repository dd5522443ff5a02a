"""What the tests of models share: a small config.json to change, what it is understood as, and the words of a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.hf_config import parse_architecture

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 263,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    **{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"},
    **{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "gemma2": "Gemma2ForCausalLM", "phi3": "Phi3ForCausalLM"},
}
_OWN_WORDS = {"gemma2": {"hidden_act": ..., "hidden_activation": "gelu_pytorch_tanh"}}


def config_of(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json; a change to `...` removes the field."""
    config = {"architectures": [FAMILIES[family]], **SIZES, **_OWN_WORDS.get(family, {}), **changes}
    return {key: value for key, value in config.items() if value is not ...}


def architecture_of(family: str = "llama", **changes: Any) -> Architecture:
    return parse_architecture(config_of(family, **changes), "config.json")


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(action: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:
        action(*arguments)
    return str(caught.value)
