"""What a Hugging Face `config.json` says, reduced to the facts a Megatron-Core GPTModel is built from. Standard library only.

Everything this project cannot express exactly is refused here, on every rank alike, before any weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding: `kind` is default, linear or llama3; the other fields follow transformers' `rope_parameters`."""

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense decoder of the Qwen2, Qwen3 or Llama 3 family."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    rope: Rope
    max_positions: int
    init_std: float

    def padded_vocab_size(self, tensor: int, multiple: int) -> int:
        """Return the vocabulary size rounded up so that every tensor rank holds the same multiple of `multiple` rows."""
        unit = tensor * multiple
        return math.ceil(self.vocab_size / unit) * unit

    def check_layout(self, role: str, *, tensor: int, pipeline: int) -> None:
        """Raise ValueError unless heads, feed-forward width and layers divide over the layout."""
        for what, count, axis, size in (
            ("attention heads", self.num_heads, "tensor", tensor),
            ("key-value heads", self.num_kv_heads, "tensor", tensor),
            ("feed-forward columns", self.ffn_hidden_size, "tensor", tensor),
            ("layers", self.num_layers, "pipeline", pipeline),
        ):
            if count % size:
                fits = [n for n in range(1, count + 1) if count % n == 0 and n <= 64]
                raise ValueError(f"{role}.layout.{axis}={size} does not divide the {role}'s {count} {what}; use one of {fits}")


def parse_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Return the architecture of a parsed `config.json`; raise ValueError naming `where` and the field for anything unsupported."""
    name = (config.get("architectures") or [None])[0]
    if name not in SUPPORTED:
        raise ValueError(f"{where}: architecture {name!r} is not supported; supported are {', '.join(SUPPORTED)}")
    family = SUPPORTED[name]
    _refuse_unsupported(config, family, where)
    hidden, heads = _number(config, "hidden_size", where), _number(config, "num_attention_heads", where)
    return Architecture(
        family=family,
        num_layers=_number(config, "num_hidden_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=_number(config, "intermediate_size", where),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        # transformers' Qwen3Config defaults to 128 whatever the hidden size; the others derive it.
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else hidden // heads),
        vocab_size=_number(config, "vocab_size", where),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_parse_rope(config, where),
        max_positions=int(config.get("max_position_embeddings", 32768)),
        init_std=float(config.get("initializer_range", 0.02)),
    )


def _number(config: Mapping[str, Any], key: str, where: str) -> int:
    if not isinstance(config.get(key), int):
        raise ValueError(f"{where}: {key}={config.get(key)!r} is missing or not an integer")
    return int(config[key])


def _refuse_unsupported(config: Mapping[str, Any], family: str, where: str) -> None:
    def refuse(key: str, wanted: str) -> None:
        raise ValueError(f"{where}: {key}={config.get(key)!r} is not supported; only {wanted}")

    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "'silu'")
    if config.get("attention_bias", family == "qwen2") not in (False, None) and family != "qwen2":
        refuse("attention_bias", "false for this family")
    if config.get("mlp_bias"):
        refuse("mlp_bias", "false")
    if config.get("use_sliding_window"):
        refuse("use_sliding_window", "false")
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        refuse("layer_types", "'full_attention' in every layer")
    if config.get("quantization_config"):
        refuse("quantization_config", "unquantized weights")
    if config.get("num_attention_heads") and config.get("num_key_value_heads") and config["num_attention_heads"] % config["num_key_value_heads"]:
        refuse("num_key_value_heads", f"a divisor of num_attention_heads={config['num_attention_heads']}")


def _parse_rope(config: Mapping[str, Any], where: str) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    parameters = dict(config.get("rope_parameters") or {})
    scaling = dict(config.get("rope_scaling") or {})
    merged = {**scaling, **parameters}
    kind = merged.get("rope_type") or merged.get("type") or "default"
    theta = float(merged.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = merged.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor={partial} is not supported; only 1.0")
    if kind == "default":
        return Rope(kind="default", theta=theta)
    if kind not in ("linear", "llama3"):
        raise ValueError(f"{where}: rope_type={kind!r} is not supported; supported are 'default', 'linear' and 'llama3'")
    missing = [key for key in _ROPE_FIELDS[kind] if key not in merged]
    if missing:
        raise ValueError(f"{where}: rope_type={kind!r} needs {', '.join(missing)}")
    if kind == "linear":
        return Rope(kind="linear", theta=theta, factor=float(merged["factor"]))
    return Rope(
        kind="llama3",
        theta=theta,
        factor=float(merged["factor"]),
        low_freq_factor=float(merged["low_freq_factor"]),
        high_freq_factor=float(merged["high_freq_factor"]),
        original_max_positions=int(merged["original_max_position_embeddings"]),
    )


_ROPE_FIELDS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
