"""What a Hugging Face `config.json` says, reduced to the facts a Megatron-Core GPTModel is built from. Standard library only.

Everything this project cannot express exactly is refused here, on every rank alike, before any weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_megatron.config import ParallelLayout

SUPPORTED = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe", "LlamaForCausalLM": "llama"}


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
class Experts:
    """The mixture of experts that is the feed-forward of every layer: each token visits `experts_per_token` of `num_experts`."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    # Whether the weights of a token's experts are scaled to a sum of one.
    norm_topk_prob: bool
    # What the model was pre-trained with; distillation adds no such term.
    aux_loss_coefficient: float


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder of the Qwen2, Qwen3 or Llama 3 family, dense where `experts` is None."""

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
    experts: Experts | None = None

    def padded_vocab_size(self, tensor: int, multiple: int) -> int:
        """Return the vocabulary size rounded up so that every tensor rank holds the same multiple of `multiple` rows."""
        unit = tensor * multiple
        return math.ceil(self.vocab_size / unit) * unit

    def check_layout(self, role: str, layout: ParallelLayout) -> None:
        """Raise ValueError unless heads, layers, and feed-forward width or experts divide over the layout."""
        if self.experts is None:
            for axis, size in (("expert", layout.expert), ("expert_tensor", layout.expert_tensor)):
                if size > 1:
                    raise ValueError(f"{role}.layout.{axis}={size} spreads experts, and the {role} is a dense {self.family} model without any; use 1")
        for what, count, axis, size in (
            ("attention heads", self.num_heads, "tensor", layout.tensor),
            ("key-value heads", self.num_kv_heads, "tensor", layout.tensor),
            ("layers", self.num_layers, "pipeline", layout.pipeline),
            (f"layers of a stage (layout.pipeline={layout.pipeline})", self.num_layers // layout.pipeline, "virtual", layout.virtual),
            *self._split_feed_forward(layout),
        ):
            if count % size:
                fits = [n for n in range(1, count + 1) if count % n == 0 and n <= 64]
                raise ValueError(f"{role}.layout.{axis}={size} does not divide the {role}'s {count} {what}; use one of {fits}")

    def _split_feed_forward(self, layout: ParallelLayout) -> list[tuple[str, int, str, int]]:
        """Return what of the feed-forward is split: its columns, or the set of experts and each expert's columns."""
        if self.experts is None:
            return [("feed-forward columns", self.ffn_hidden_size, "tensor", layout.tensor)]
        return [
            ("experts", self.experts.num_experts, "expert", layout.expert),
            ("columns of an expert", self.experts.ffn_hidden_size, "expert_tensor", layout.expert_tensor),
        ]

    def check_training(self, role: str, layout: ParallelLayout) -> None:
        """Raise ValueError where Megatron-Core runs a model under a layout but does not train it."""
        if self.experts is not None and layout.tensor > 1 and not layout.sequence:
            raise ValueError(
                f"{role}.layout.tensor={layout.tensor} trains a mixture of experts only under sequence parallelism: every tensor rank would send the same "
                f"tokens to the experts; set {role}.layout.sequence=true, or tensor=1"
            )


def parse_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Return the architecture of a parsed `config.json`; raise ValueError naming `where` and the field for anything unsupported."""
    name = (config.get("architectures") or [None])[0]
    if name not in SUPPORTED:
        raise ValueError(f"{where}: architecture {name!r} is not supported; supported are {', '.join(SUPPORTED)}")
    family = SUPPORTED[name]
    _refuse_unsupported(config, family, where)
    experts = _parse_experts(config, where) if family == "qwen3_moe" else None
    hidden, heads = _integer(config, "hidden_size", where), _integer(config, "num_attention_heads", where)
    return Architecture(
        family=family,
        num_layers=_integer(config, "num_hidden_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=_integer(config, "intermediate_size", where),
        num_heads=heads,
        num_kv_heads=_integer(config, "num_key_value_heads", where, default=heads),
        # transformers' Qwen3Config defaults to 128 whatever the hidden size; the others, Qwen3MoeConfig too, derive it.
        head_dim=_integer(config, "head_dim", where, default=128 if family == "qwen3" else hidden // heads),
        vocab_size=_integer(config, "vocab_size", where),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        norm_eps=_positive(config, "rms_norm_eps", where, default=1e-6),
        rope=_parse_rope(config, where),
        max_positions=_integer({"max_position_embeddings": _DEFAULT_POSITIONS[family], **config}, "max_position_embeddings", where),
        init_std=_positive(config, "initializer_range", where, default=0.02),
        experts=experts,
    )


# What transformers assumes where a config.json does not say.
_DEFAULT_POSITIONS = {"qwen2": 32768, "qwen3": 32768, "qwen3_moe": 32768, "llama": 2048}


def _integer(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """Return a positive integer; `default` stands for an absent key and for null, both of which published configs use."""
    value = config.get(key) if config.get(key) is not None else default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where}: {key}={config.get(key)!r} is missing or not an integer")
    if value < 1:
        raise ValueError(f"{where}: {key}={value} must be at least 1")
    return value


def _positive(config: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {key}={value!r} is not a positive number")
    return float(value)


def _refuse_unsupported(config: Mapping[str, Any], family: str, where: str) -> None:
    def refuse(key: str, wanted: str) -> None:
        raise ValueError(f"{where}: {key}={config.get(key)!r} is not supported; only {wanted}")

    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "'silu'")
    if config.get("attention_bias") and family != "qwen2":
        refuse("attention_bias", "false for this family")
    if config.get("mlp_bias"):
        refuse("mlp_bias", "false")
    if config.get("use_sliding_window"):
        refuse("use_sliding_window", "false")
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        refuse("layer_types", "'full_attention' in every layer")
    if config.get("quantization_config"):
        refuse("quantization_config", "unquantized weights")
    heads = _integer(config, "num_attention_heads", where)
    if heads % _integer(config, "num_key_value_heads", where, default=heads):
        refuse("num_key_value_heads", f"a divisor of num_attention_heads={heads}")


def _parse_experts(config: Mapping[str, Any], where: str) -> Experts:
    """Return the experts of a Qwen3-MoE configuration; ValueError unless every layer has them and a router that can be expressed."""
    for key, value, wanted in (("decoder_sparse_step", config.get("decoder_sparse_step", 1), 1), ("mlp_only_layers", config.get("mlp_only_layers") or [], [])):
        if value != wanted:
            raise ValueError(f"{where}: {key}={value!r} is not supported; only {wanted}, which makes every layer a mixture of experts")
    # transformers 5 writes num_local_experts, earlier versions num_experts.
    num_experts = _integer(config, "num_local_experts" if "num_local_experts" in config else "num_experts", where, default=128)
    per_token = _integer(config, "num_experts_per_tok", where, default=8)
    if per_token > num_experts:
        raise ValueError(f"{where}: num_experts_per_tok={per_token} exceeds the model's {num_experts} experts")
    normalized = config.get("norm_topk_prob", False)
    if not isinstance(normalized, bool):
        raise ValueError(f"{where}: norm_topk_prob={normalized!r} is neither true nor false")
    if per_token == 1 and normalized:
        raise ValueError(
            f"{where}: norm_topk_prob=True with num_experts_per_tok=1 is not supported: the only expert's weight is always 1, so its router learns nothing; "
            "only false, or more experts per token"
        )
    coefficient = config.get("router_aux_loss_coef", 0.001)
    if not isinstance(coefficient, int | float) or isinstance(coefficient, bool) or not 0 <= coefficient < math.inf:
        raise ValueError(f"{where}: router_aux_loss_coef={coefficient!r} is not a number of at least 0")
    return Experts(
        num_experts=num_experts,
        experts_per_token=per_token,
        ffn_hidden_size=_integer(config, "moe_intermediate_size", where, default=768),
        norm_topk_prob=normalized,
        aux_loss_coefficient=float(coefficient),
    )


def _parse_rope(config: Mapping[str, Any], where: str) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        section = config.get(key) or {}
        if not isinstance(section, Mapping):
            raise ValueError(f"{where}: {key}={section!r} is not an object")
        merged.update(section)
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
