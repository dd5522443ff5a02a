"""A Hugging Face `config.json`, of transformers 4 or 5, -> an `Architecture`. Standard library only.

Everything this project cannot express exactly is refused here, on every rank alike, before any weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from opd_megatron.models.architecture import Architecture, Experts, Rope
from opd_megatron.models.families import FAMILY_OF_CLASS, Family


def parse_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Return the architecture of a parsed `config.json`; raise ValueError naming `where` and the field for anything unsupported."""
    try:
        return _parse(config, where)
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{where} is not understood: one of its values is of another kind than it should be ({error})") from error


def _parse(config: Mapping[str, Any], where: str) -> Architecture:
    names = config.get("architectures") or [None]
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or name not in FAMILY_OF_CLASS:
        raise ValueError(f"{where}: architecture {name!r} is not supported; supported are {', '.join(FAMILY_OF_CLASS)}")
    family = FAMILY_OF_CLASS[name]
    said = _Said({**family.defaults, **config}, where)
    _refuse_unsupported(said, family)
    hidden, heads = said.integer("hidden_size"), said.integer("num_attention_heads")
    head_dim = said.integer("head_dim", default=family.defaults.get("head_dim", hidden // heads))
    rope, max_positions = _parse_rope(said, family, head_dim), said.integer("max_position_embeddings")
    if rope.kind == "longrope":
        # Longer sequences have other frequencies at every position, which a key-value cache that began with these cannot follow.
        max_positions = min(max_positions, rope.original_max_positions)
    num_layers = said.integer("num_hidden_layers")
    return Architecture(
        family=family.name,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=said.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=said.integer("num_key_value_heads", default=heads),
        head_dim=head_dim,
        vocab_size=said.integer("vocab_size"),
        tied=said.boolean("tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.tensors.query_norm is not None,
        norm_eps=said.positive("rms_norm_eps"),
        rope=rope,
        max_positions=max_positions,
        init_std=said.positive("initializer_range", default=0.02),
        experts=_parse_experts(said) if family.has_experts else None,
        activation=family.activations[said[family.activation_key] or "silu"],
        attention_scale=said.positive(family.attention_scalar_key) ** -0.5 if family.attention_scalar_key else None,
        attention_softcap=said.optional(family.attention_softcap_key),
        logit_softcap=said.optional(family.logit_softcap_key),
        windows=_parse_windows(said, family, num_layers, max_positions),
        zero_centered_norms=family.zero_centered_norms,
        scaled_embeddings=family.scaled_embeddings,
    )


class _Said:
    """What a config.json says, with what transformers assumes where it is silent."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self.where = config, where

    def __getitem__(self, key: str) -> Any:
        return self._config.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._config

    def refuse(self, key: str, wanted: str) -> NoReturn:
        self.fail(f"{key}={self[key]!r} is not supported; only {wanted}")

    def fail(self, message: str) -> NoReturn:
        raise ValueError(f"{self.where}: {message}")

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; `default` stands for an absent key and for null, both of which published configs use."""
        value = self[key] if self[key] is not None else default
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(f"{key}={self[key]!r} is missing or not an integer")
        if value < 1:
            self.fail(f"{key}={value} must be at least 1")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self._config.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            self.fail(f"{key}={value!r} is not a positive number")
        return float(value)

    def section(self, key: str) -> dict[str, Any]:
        value = self[key]
        if not isinstance(value, Mapping):
            self.fail(f"{key}={value!r} is not an object")
        return dict(value)

    def boolean(self, key: str) -> bool:
        value = self[key]
        if not isinstance(value, bool):
            self.fail(f"{key}={value!r} is neither true nor false")
        return value

    def optional(self, key: str | None) -> float | None:
        """Return a positive number, or None where the family has no such key, or null switches it off."""
        return None if key is None or self[key] is None else self.positive(key)


def _refuse_unsupported(said: _Said, family: Family) -> None:
    # By this name transformers chooses what it makes of a folder.
    if said["model_type"] not in (None, family.name):
        said.fail(f"model_type={said['model_type']!r} contradicts architectures=['{family.class_name}'], which is {family.name!r}")
    for key, wanted in family.only.items():
        if said[key] is not None and said[key] != wanted:
            said.refuse(key, f"{json.dumps(wanted)} for this family")
    if said[family.activation_key] not in (None, *family.activations):
        said.refuse(family.activation_key, " or ".join(repr(name) for name in family.activations))
    for key in ("quantization_config", "compression_config"):
        if said[key]:
            said.refuse(key, "unquantized weights")
    if said["transformers_weights"]:
        said.refuse("transformers_weights", "weights in model.safetensors, or in files that its index names")
    heads = said.integer("num_attention_heads")
    if heads % said.integer("num_key_value_heads", default=heads):
        said.refuse("num_key_value_heads", f"a divisor of num_attention_heads={heads}")


def _parse_windows(said: _Said, family: Family, num_layers: int, max_positions: int) -> tuple[int | None, ...]:
    """Return each layer's window; empty where no layer has one, or none that is shorter than the longest sequence."""
    kinds = said["layer_types"]
    if kinds is not None and not isinstance(kinds, list):
        said.refuse("layer_types", "a list")
    is_windowed: Sequence[bool]
    if kinds is not None and family.windows in ("layers from max_window_layers on", "every other layer, first included"):
        if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            said.refuse("layer_types", f"'full_attention' or 'sliding_attention' of each of {num_layers} layers")
        is_windowed = [kind == "sliding_attention" for kind in kinds]
    elif kinds is not None and any(kind != "full_attention" for kind in kinds):
        said.refuse("layer_types", "'full_attention' in every layer")
    elif family.windows == "layers from max_window_layers on":
        is_windowed = [layer >= (said["max_window_layers"] or 0) for layer in range(num_layers)]
    elif family.windows == "every other layer, first included":
        is_windowed = [layer % 2 == 0 for layer in range(num_layers)]
    else:
        is_windowed = [family.windows == "every layer"] * num_layers
    is_asked = said["sliding_window"] is not None and (family.windows_asked_by is None or said.boolean(family.windows_asked_by))
    if kinds is not None and any(is_windowed) and not is_asked:
        said.refuse(
            "layer_types", f"'full_attention' in every layer where {family.windows_asked_by or 'sliding_window'} is {said[family.windows_asked_by or '']}"
        )
    if not is_asked or not any(is_windowed):
        return ()
    size = said.integer("sliding_window")
    return tuple(size if windowed else None for windowed in is_windowed) if size < max_positions else ()


def _parse_experts(said: _Said) -> Experts:
    """Return the experts of a mixture; ValueError unless its router can be expressed."""
    # transformers 5 writes num_local_experts, earlier versions num_experts.
    num_experts = said.integer("num_local_experts" if "num_local_experts" in said else "num_experts")
    per_token = said.integer("num_experts_per_tok")
    if per_token > num_experts:
        said.fail(f"num_experts_per_tok={per_token} exceeds the model's {num_experts} experts")
    normalized = said["norm_topk_prob"]
    if not isinstance(normalized, bool):
        said.fail(f"norm_topk_prob={normalized!r} is neither true nor false")
    if per_token == 1 and normalized:
        said.fail(
            "norm_topk_prob=True with num_experts_per_tok=1 is not supported: the only expert's weight is always 1, so its router learns nothing; "
            "only false, or more experts per token"
        )
    coefficient = said["router_aux_loss_coef"]
    if not isinstance(coefficient, int | float) or isinstance(coefficient, bool) or not 0 <= coefficient < math.inf:
        said.fail(f"router_aux_loss_coef={coefficient!r} is not a number of at least 0")
    return Experts(
        num_experts=num_experts,
        experts_per_token=per_token,
        ffn_hidden_size=said.integer("moe_intermediate_size"),
        norm_topk_prob=normalized,
        aux_loss_coefficient=float(coefficient),
    )


_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor",),
}


def _parse_rope(said: _Said, family: Family, head_dim: int) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    sections = [said.section(key) for key in ("rope_scaling", "rope_parameters") if said[key]]
    if len(sections) == 2 and sections[0] != sections[1]:
        said.fail(f"rope_scaling={sections[0]!r} contradicts rope_parameters={sections[1]!r}; keep one of them")
    merged = sections[0] if sections else {}
    kind = merged.get("rope_type") or merged.get("type") or "default"
    if kind in ("su", "yarn") and "longrope" in family.rope_kinds:
        # Its names in the first files of Phi-3.
        kind = "longrope"
    numbers = _Said({"rope_theta": 10000.0 if said["rope_theta"] is None else said["rope_theta"], **merged}, said.where)
    theta = numbers.positive("rope_theta")
    fraction = merged.get("partial_rotary_factor") or said["partial_rotary_factor"] or 1.0
    if fraction != 1.0 and not family.partial_rotary:
        said.fail(f"partial_rotary_factor={fraction} is not supported; only 1.0 for this family")
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1 or int(head_dim * fraction) % 2:
        said.fail(f"partial_rotary_factor={fraction!r} is not a fraction of 1 that leaves an even number of a head's {head_dim} dimensions")
    if kind not in family.rope_kinds:
        *others, last = (repr(name) for name in family.rope_kinds)
        said.fail(f"rope_type={kind!r} is not supported; supported are {', '.join(others)} and {last}")
    missing = [key for key in _ROPE_FIELDS[kind] if merged.get(key) is None]
    if missing:
        said.fail(f"rope_type={kind!r} needs {', '.join(missing)}")
    rope = Rope(kind=kind, theta=theta, fraction=float(fraction))
    if kind == "longrope":
        return _parse_longrope(said, numbers, rope, rope.rotated_dims(head_dim) // 2)
    if kind == "llama3":
        return replace(
            rope,
            factor=numbers.positive("factor"),
            low_freq_factor=numbers.positive("low_freq_factor"),
            high_freq_factor=numbers.positive("high_freq_factor"),
            original_max_positions=_original_positions(said, numbers),
        )
    return replace(rope, factor=numbers.positive("factor")) if kind == "linear" else rope


def _original_positions(said: _Said, rope: _Said) -> int:
    """Return how long the texts of a model's first training were: transformers prefers the key beside `rope_parameters` to that in it."""
    outer, inner = (one["original_max_position_embeddings"] for one in (said, rope))
    if None not in (outer, inner) and outer != inner:
        said.fail(
            f"original_max_position_embeddings is {outer!r} by itself, or by this family's default, and {inner!r} of the rotary embedding; name one in both"
        )
    return (rope if outer is None else said).integer("original_max_position_embeddings")


def _parse_longrope(said: _Said, numbers: _Said, rope: Rope, num_frequencies: int) -> Rope:
    """Add the numbers of LongRoPE (https://arxiv.org/abs/2402.13753), for sequences of the length that a model was first trained with."""
    factors = numbers["short_factor"]
    if not isinstance(factors, list) or len(factors) != num_frequencies or not all(isinstance(one, int | float) and one > 0 for one in factors):
        said.fail(f"short_factor={factors!r:.80} is not a list of {num_frequencies} positive numbers, one for each frequency")
    original = _original_positions(said, numbers)
    factor = said.integer("max_position_embeddings") / original if numbers["factor"] is None else numbers.positive("factor")
    attention = numbers["attention_factor"]
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if not isinstance(attention, int | float) or not 1 <= attention < math.inf:
        said.fail(f"attention_factor={attention!r} is not supported; only numbers of at least 1")
    short = tuple(float(one) for one in factors)
    return replace(rope, original_max_positions=original, short_factors=short, attention_factor=float(attention))
