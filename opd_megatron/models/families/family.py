"""What one architecture of transformers is, as data: its own file of this folder fills one `Family` in. Standard library only.

`hf_config.py` reads a config.json by it, `weight_map.py` names tensors by it, and nothing else asks which family a model is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Activation = Literal["silu", "gelu_tanh"]
# Which layers attend to the last `sliding_window` positions alone.
Windows = Literal["no layer", "every layer", "layers from max_window_layers on", "every other layer, first included"]


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """Hugging Face names without their `.weight` and `.bias`; those of a layer follow `model.layers.N.`, an expert's its `mlp.experts.N.`.

    What Megatron-Core fuses of several tensors has several names, in the order query, key, value and gate, up; one name is a tensor that is fused already, its
    parts one after the other in the same order. None is a tensor the family has not.
    """

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{layer}."
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    query_norm: str | None = None
    key_norm: str | None = None
    attention_output: str = "self_attn.o_proj"
    # Norms what attention, or the feed-forward, adds to the residual stream.
    attention_output_norm: str | None = None
    feed_forward_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    feed_forward_output_norm: str | None = None
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{expert}."
    expert_gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"
    final_norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture: how its config.json is read, what its tensors are called, and which parts of a model it has."""

    # `model_type` and the first of `architectures` in a config.json.
    name: str
    class_name: str
    # What transformers assumes where a config.json does not say; null counts as said. A config.json must name all other sizes.
    defaults: Mapping[str, Any]
    # Switches that nothing here expresses: each must be absent, null, or this.
    only: Mapping[str, Any] = field(default_factory=lambda: {"attention_bias": False, "mlp_bias": False})
    activation_key: str = "hidden_act"
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"silu": "silu"})
    # Key-value pairs of rope: `rope_type` values, and whether a part of each head may stay unrotated.
    rope_kinds: tuple[str, ...] = ("default", "linear", "llama3")
    partial_rotary: bool = False
    windows: Windows = "no layer"
    # `sliding_window` counts only where this key is true.
    windows_asked_by: str | None = None
    qkv_bias: bool = False
    # The key whose value to the power of -1/2 scales attention scores; None is the size of a head.
    attention_scalar_key: str | None = None
    attention_softcap_key: str | None = None
    logit_softcap_key: str | None = None
    # A norm multiplies by 1 + weight, and in fp32.
    zero_centered_norms: bool = False
    # Embeddings are multiplied by the square root of the hidden size.
    scaled_embeddings: bool = False
    has_experts: bool = False
    tensors: TensorNames = TensorNames()
