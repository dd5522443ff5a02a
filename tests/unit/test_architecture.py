"""A config.json is understood as transformers understands it, or refused with file and field; layouts that fit it; rotary frequencies.

Not covered: configurations of published models as such; logits (tests/distributed/test_conversion.py); files around it (test_hf_folder.py).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from opd_megatron.config import ParallelLayout
from opd_megatron.models.architecture import Experts, Rope
from opd_megatron.models.families import FAMILY_OF_CLASS
from opd_megatron.models.gpt import inverse_frequencies
from opd_megatron.models.hf_config import parse_architecture
from tests.model_configs import FAMILIES, LLAMA3, SIZES, architecture_of, config_of, refusal

# The same rotary embedding as transformers 4 and transformers 5 write it.
ROPE_FORMS = {
    "default": (
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        Rope(kind="default", theta=1e6),
    ),
    "linear, old key": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
        Rope(kind="linear", theta=5e5, factor=4.0),
    ),
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        Rope(kind="llama3", theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32),
    ),
    "llama3, both keys": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "type": "llama3", **LLAMA3}},
        {"rope_scaling": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        Rope(kind="llama3", theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32),
    ),
    "absent": ({}, {"rope_parameters": None}, Rope(kind="default", theta=10000.0)),
}


# 256 positions are 4 times 64.
LENGTHENED = math.sqrt(1 + math.log(4) / math.log(64))
PHI_ROPE = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 4.0, 9.0]}
ROPE_FORMS_OF_PHI3 = {
    "longrope": (
        {"rope_theta": 1e4, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64, "rope_scaling": {"type": "longrope", **PHI_ROPE}},
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "factor": 4.0, "original_max_position_embeddings": 64},
                **PHI_ROPE,
            },
        },
        Rope(kind="longrope", theta=1e4, fraction=0.75, original_max_positions=64, short_factors=(1.0, 1.5, 2.0), attention_factor=LENGTHENED),
    ),
    "longrope, first name": (
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64, "rope_scaling": {"type": "su", **PHI_ROPE}},
        {"original_max_position_embeddings": 64, "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.75, **PHI_ROPE}},
        Rope(kind="longrope", theta=1e4, fraction=0.75, original_max_positions=64, short_factors=(1.0, 1.5, 2.0), attention_factor=LENGTHENED),
    ),
    "partial": (
        {"rope_theta": 1e6, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        Rope(kind="default", theta=1e6, fraction=0.5),
    ),
}
FORMS = [
    *((family, *form) for family in FAMILIES for form in ROPE_FORMS.values() if form[2].kind in FAMILY_OF_CLASS[FAMILIES[family]].rope_kinds),
    *(("phi3", *form) for form in ROPE_FORMS_OF_PHI3.values()),
]


@pytest.mark.parametrize(("family", "four", "five", "rope"), FORMS)
def test_both_ways_of_writing_a_config_give_one_architecture(family: str, four: dict[str, Any], five: dict[str, Any], rope: Rope) -> None:
    older = architecture_of(family, torch_dtype="bfloat16", **four)
    newer = architecture_of(family, dtype="bfloat16", **five)
    assert older == newer
    assert older.rope == rope


CONFIG_CLASSES: dict[str, Any] = {
    **{"qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig},
    **{"llama": LlamaConfig, "mistral": MistralConfig, "gemma2": Gemma2Config, "phi3": Phi3Config},
}


@pytest.mark.parametrize(("family", "config_class"), CONFIG_CLASSES.items())
def test_fields_are_what_transformers_understands(family: str, config_class: Any) -> None:
    """transformers' own objects are the reference; what it writes itself is read back as it is."""
    written = config_class(**{**SIZES, "tie_word_embeddings": True, "architectures": [FAMILIES[family]]})
    architecture = parse_architecture(json.loads(written.to_json_string()), "config.json")
    assert architecture.family == family
    assert architecture.norm_eps == written.rms_norm_eps
    assert (architecture.qkv_bias, architecture.qk_norm) == (family == "qwen2", family in ("qwen3", "qwen3_moe"))
    assert (architecture.num_layers, architecture.hidden_size, architecture.ffn_hidden_size) == (2, 64, 96)
    assert (architecture.num_heads, architecture.num_kv_heads) == (8, 4)
    assert architecture.head_dim == getattr(written, "head_dim", 64 // 8)
    assert (architecture.vocab_size, architecture.max_positions, architecture.tied) == (263, 256, True)
    assert (architecture.norm_eps, architecture.init_std) == (1e-6, written.initializer_range)


def test_fields_that_may_be_absent_take_the_familys_defaults() -> None:
    assert architecture_of("llama", num_key_value_heads=...).num_kv_heads == 8
    assert architecture_of("llama", head_dim=None).head_dim == 8
    # transformers' Qwen3Config has 128 whatever the hidden size.
    assert architecture_of("qwen3", head_dim=...).head_dim == Qwen3Config().head_dim == 128
    assert architecture_of("qwen3", head_dim=24).head_dim == 24
    # Qwen3MoeConfig has no head size of its own.
    assert architecture_of("qwen3_moe", head_dim=...).head_dim == 8
    assert not architecture_of("llama").tied


# What transformers 4.57.3 wrote for these arguments: `Config(**arguments).to_json_string()`.
WRITTEN_BY_4 = json.loads((Path(__file__).parents[1] / "configs_of_transformers_4.json").read_text())


@pytest.mark.parametrize("name", WRITTEN_BY_4)
def test_transformers_4_and_5_write_one_architecture(name: str) -> None:
    """The older file is one that the older version wrote; the newer one is written here, by the version that is installed."""
    older = WRITTEN_BY_4[name]["config.json"]
    family = FAMILY_OF_CLASS[older["architectures"][0]].name
    ids = {"eos_token_id": 258, "bos_token_id": None, "pad_token_id": 256}
    newer = CONFIG_CLASSES[family](**WRITTEN_BY_4[name]["arguments"], **ids, architectures=older["architectures"])
    assert parse_architecture(older, "4") == parse_architecture(json.loads(newer.to_json_string()), "5")


WINDOWS: dict[str, tuple[str, dict[str, Any], tuple[int | None, ...]]] = {
    "llama": ("llama", {"sliding_window": 64}, ()),
    "qwen2, not asked": ("qwen2", {"sliding_window": 64, "max_window_layers": 0}, ()),
    "qwen2, upper layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, (None, 64)),
    "qwen2, no layer so high": ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, ()),
    "qwen3, by name": ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}, (64, None)),
    "qwen3_moe": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, (64, 64)),
    "mistral": ("mistral", {"sliding_window": 64}, (64, 64)),
    "mistral, whole": ("mistral", {"sliding_window": None}, ()),
    "mistral, silent": ("mistral", {"max_position_embeddings": 8192}, (4096, 4096)),
    "mistral, no longer than a window": ("mistral", {"sliding_window": 256}, ()),
    "gemma2": ("gemma2", {"sliding_window": 64}, (64, None)),
    "gemma2, by name": ("gemma2", {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}, (None, 64)),
    "gemma2, silent": ("gemma2", {"max_position_embeddings": 8192}, (4096, None)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_layer_has_the_window_that_transformers_gives_it(name: str) -> None:
    family, changes, windows = WINDOWS[name]
    assert architecture_of(family, **changes).windows == windows
    config = CONFIG_CLASSES[family](**{key: value for key, value in {**SIZES, **changes}.items() if key != "hidden_act"})
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 2
    size = config.sliding_window if family != "llama" else None
    has_effect = size is not None and size < config.max_position_embeddings
    assert tuple(size if kind == "sliding_attention" and has_effect else None for kind in kinds) == (windows or (None, None))


def test_what_gemma2_has_besides() -> None:
    gemma = architecture_of("gemma2", query_pre_attn_scalar=64, final_logit_softcapping=20.0)
    assert (gemma.attention_scale, gemma.attention_softcap, gemma.logit_softcap) == (1 / 8, 50.0, 20.0)
    assert (gemma.activation, gemma.embedding_scale, gemma.zero_centered_norms, gemma.norms_outputs) == ("gelu_tanh", 8.0, True, True)
    # Null switches a cap off; a file that is silent means the published one.
    assert architecture_of("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None).attention_softcap is None
    assert (architecture_of("gemma2").logit_softcap, architecture_of("gemma2").tied, architecture_of("gemma2", head_dim=...).head_dim) == (30.0, True, 256)
    plain = architecture_of("llama")
    assert (plain.attention_scale, plain.attention_softcap, plain.logit_softcap, plain.activation, plain.embedding_scale) == (None, None, None, "silu", 1.0)


def test_longrope_holds_for_the_length_of_its_first_training() -> None:
    """Longer sequences have other frequencies at every position."""
    _, five, _ = ROPE_FORMS_OF_PHI3["longrope"]
    assert architecture_of("phi3", **five).max_positions == 64
    assert architecture_of("phi3").max_positions == 256


def _experts_of(config: Qwen3MoeConfig) -> Experts:
    return Experts(
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        ffn_hidden_size=config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        aux_loss_coefficient=config.router_aux_loss_coef,
    )


MIXTURE = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True, "router_aux_loss_coef": 0.01}


def test_experts_are_what_transformers_understands() -> None:
    written = Qwen3MoeConfig(**SIZES, **MIXTURE, architectures=[FAMILIES["qwen3_moe"]])
    architecture = parse_architecture(json.loads(written.to_json_string()), "config.json")
    assert (
        architecture.experts
        == _experts_of(written)
        == Experts(num_experts=12, experts_per_token=3, ffn_hidden_size=40, norm_topk_prob=True, aux_loss_coefficient=0.01)
    )
    # Published files say num_experts, transformers 5 writes num_local_experts.
    assert architecture_of("qwen3_moe", **MIXTURE) == architecture
    assert architecture_of("qwen3_moe").experts == _experts_of(Qwen3MoeConfig())
    assert architecture_of("qwen3").experts is None


REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "other architecture": ("llama", {"architectures": ["GPT2LMHeadModel"]}, ["'GPT2LMHeadModel' is not supported", *FAMILIES.values()]),
    "other mixture of experts": ("qwen3", {"architectures": ["Qwen2MoeForCausalLM"]}, ["'Qwen2MoeForCausalLM' is not supported"]),
    "sparse step": ("qwen3_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step=2", "only 1 for this family"]),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, ["mlp_only_layers=[0]", "only [] for this family"]),
    "more experts per token than experts": ("qwen3_moe", {**MIXTURE, "num_experts_per_tok": 13}, ["num_experts_per_tok=13 exceeds the model's 12 experts"]),
    "one expert of weight 1": ("qwen3_moe", {**MIXTURE, "num_experts_per_tok": 1}, ["norm_topk_prob=True with num_experts_per_tok=1", "only false, or more"]),
    "no experts": ("qwen3_moe", {"num_experts": 0}, ["num_experts=0 must be at least 1"]),
    "weights of what sum": ("qwen3_moe", {"norm_topk_prob": "yes"}, ["norm_topk_prob='yes' is neither true nor false"]),
    "auxiliary loss": ("qwen3_moe", {"router_aux_loss_coef": -1}, ["router_aux_loss_coef=-1 is not a number of at least 0"]),
    "attention bias of qwen3_moe": ("qwen3_moe", {"attention_bias": True}, ["attention_bias=True", "only false"]),
    "no architecture": ("llama", {"architectures": ...}, ["architecture None is not supported"]),
    "empty architectures": ("llama", {"architectures": []}, ["architecture None is not supported"]),
    "rope type": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type='yarn'", "'default', 'linear' and 'llama3'"]),
    "old rope type": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["rope_type='dynamic'"]),
    "linear without factor": ("llama", {"rope_scaling": {"type": "linear"}}, ["rope_type='linear' needs factor"]),
    "llama3 without its fields": ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["needs low_freq_factor, high_freq_factor, original_"]),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    "partial rotary, new": ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
    "activation": ("llama", {"hidden_act": "gelu"}, ["hidden_act='gelu'", "only 'silu'"]),
    "attention bias of llama": ("llama", {"attention_bias": True}, ["attention_bias=True", "only false"]),
    "attention bias of qwen3": ("qwen3", {"attention_bias": True}, ["attention_bias=True", "only false"]),
    "mlp bias": ("llama", {"mlp_bias": True}, ["mlp_bias=True", "only false"]),
    "layer types of llama": ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types=", "'full_attention' in every layer"]),
    "layers of Ministral": ("mistral", {"layer_types": ["full_attention"] * 2}, ["layer_types=", "only null for this family"]),
    "another model type": ("llama", {"model_type": "mistral"}, ["model_type='mistral' contradicts architectures=['LlamaForCausalLM']"]),
    "two rotary embeddings": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_parameters": {"rope_type": "default"}},
        ["rope_scaling={'rope_type': 'linear'", "contradicts rope_parameters="],
    ),
    "two first lengths": (
        "llama",
        {"original_max_position_embeddings": 64, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
        ["original_max_position_embeddings is 64", "and 32 of the rotary embedding"],
    ),
    "a first length that is not Phi's own": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "original_max_position_embeddings": 128}},
        ["original_max_position_embeddings is 4096", "and 128 of the rotary embedding"],
    ),
    "tied, as a word": ("llama", {"tie_word_embeddings": "false"}, ["tie_word_embeddings='false' is neither true nor false"]),
    "windows, as a word": ("qwen2", {"use_sliding_window": "x"}, ["use_sliding_window='x' is neither true nor false"]),
    "weights elsewhere": ("llama", {"transformers_weights": "other.safetensors"}, ["transformers_weights='other.safetensors'"]),
    "compression": ("llama", {"compression_config": {"format": "int-quantized"}}, ["compression_config=", "only unquantized"]),
    **{
        f"rope_theta={value!r}": ("llama", {"rope_theta": value}, [f"rope_theta={value!r} is not a positive number"])
        for value in (0, -1, "", True, float("nan"), float("inf"), {"a": 1})
    },
    **{
        f"factor={value!r}": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": value}}, [f"factor={value!r} is not a positive number"])
        for value in (0, -1, True, float("nan"), [])
    },
    "no factor": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": None}}, ["needs factor"]),
    **{f"hidden_act={value!r}": ("llama", {"hidden_act": value}, [f"hidden_act={value!r} is not supported"]) for value in (0, "", [])},
    "windows that are switched off": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types=", "use_sliding_window is False"]),
    "windows of some layers": ("gemma2", {"layer_types": ["sliding_attention"]}, ["layer_types=", "of each of 2 layers"]),
    "unknown layer type": ("gemma2", {"layer_types": ["sliding_attention", "chunked_attention"]}, ["layer_types=", "'sliding_attention'"]),
    "no window": ("mistral", {"sliding_window": 0}, ["sliding_window=0 must be at least 1"]),
    "attention of gemma2 to what follows": ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention=True", "only false"]),
    "other activation of gemma2": ("gemma2", {"hidden_activation": "gelu"}, ["hidden_activation='gelu'", "only 'gelu_pytorch_tanh'"]),
    "no cap but zero": ("gemma2", {"final_logit_softcapping": 0.0}, ["final_logit_softcapping=0.0 is not a positive number"]),
    "rope of phi3": ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type='linear'", "'default' and 'longrope'"]),
    "longrope of llama": ("llama", {"rope_scaling": {"type": "longrope"}}, ["rope_type='longrope'"]),
    "longrope without factors": ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 4}}, ["rope_type='longrope' needs short_factor"]),
    "longrope of other length": ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3}}, ["is not a list of 4 positive numbers"]),
    "odd part of a head": ("phi3", {"partial_rotary_factor": 0.4}, ["partial_rotary_factor=0.4", "even number of a head's 8"]),
    "shrinking rotation": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "attention_factor": 0.5}},
        ["attention_factor=0.5 is not supported"],
    ),
    "quantization": ("llama", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config=", "'fp8'", "only unquantized"]),
    "head groups": ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads=3", "divisor of num_attention_heads=8"]),
    **{
        f"no {field}": ("llama", {field: ...}, [f"{field}=None is missing or not an integer"])
        for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    },
    "text for a number": ("llama", {"hidden_size": "64"}, ["hidden_size='64' is missing or not an integer"]),
    "fraction for a number": ("llama", {"vocab_size": 263.5}, ["vocab_size=263.5 is missing or not an integer"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_with_file_and_field(name: str) -> None:
    family, changes, parts = REFUSED[name]
    message = refusal(parse_architecture, config_of(family, **changes), "folder/config.json")
    assert message.startswith("folder/config.json: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"hidden_size": True},
        {"num_key_value_heads": "4"},
        {"head_dim": "8"},
        {"max_position_embeddings": None},
        {"rms_norm_eps": None},
        {"rope_scaling": "linear"},
        {"architectures": -1},
        {"architectures": [["x"]]},
        {"hidden_act": {"a": 1}},
        {"layer_types": 0},
        {"rope_theta": {"a": 1}},
        {"tie_word_embeddings": None},
    ],
    ids=str,
)
def test_nonsense_is_refused_with_the_file(changes: dict[str, Any]) -> None:
    message = refusal(parse_architecture, config_of("llama", **changes), "folder/config.json")
    assert message.startswith("folder/config.json: ")
    assert next(iter(changes)).removesuffix("s") in message


def test_harmless_fields_of_published_configs_are_no_obstacle() -> None:
    changes = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 2, "quantization_config": None, "mlp_bias": False}
    assert architecture_of("qwen2", layer_types=["full_attention"] * 2, **changes) == architecture_of("qwen2")
    assert architecture_of("llama", attention_bias=False, pretraining_tp=1) == architecture_of("llama")


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        ({"tensor": 8}, ["tensor=8", "4 key-value heads", "[1, 2, 4]"]),
        ({"tensor": 3}, ["tensor=3", "8 attention heads", "[1, 2, 4, 8]"]),
        ({"pipeline": 3}, ["pipeline=3", "2 layers", "[1, 2]"]),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(layout: dict[str, int], parts: list[str]) -> None:
    message = refusal(architecture_of().check_layout, "teacher", ParallelLayout(**layout))
    assert f"teacher.layout.{parts[0]} does not divide the teacher's {parts[1]}; use one of {parts[2]}" in message


def test_virtual_stages_divide_the_layers_of_a_stage() -> None:
    deep = architecture_of(num_hidden_layers=12)
    for pipeline, virtual in ((1, 1), (2, 1), (2, 2), (2, 3), (2, 6), (3, 4)):
        deep.check_layout("student", ParallelLayout(pipeline=pipeline, virtual=virtual))
    message = refusal(deep.check_layout, "student", ParallelLayout(pipeline=3, virtual=3))
    assert "student.layout.virtual=3 does not divide the student's 4 layers of a stage (layout.pipeline=3); use one of [1, 2, 4]" in message


def test_feed_forward_columns_must_divide_too() -> None:
    assert "90 feed-forward columns" in refusal(architecture_of(intermediate_size=90).check_layout, "student", ParallelLayout(tensor=4))


def test_experts_and_their_columns_divide_over_axes_of_their_own() -> None:
    mixture = architecture_of("qwen3_moe", **MIXTURE, intermediate_size=90)
    mixture.check_layout("student", ParallelLayout(tensor=4, pipeline=2, expert=4))
    mixture.check_layout("teacher", ParallelLayout(tensor=2, expert=3, expert_tensor=8))
    message = refusal(mixture.check_layout, "teacher", ParallelLayout(expert=8))
    assert "teacher.layout.expert=8 does not divide the teacher's 12 experts; use one of [1, 2, 3, 4, 6, 12]" in message
    message = refusal(mixture.check_layout, "teacher", ParallelLayout(tensor=2, expert_tensor=3))
    assert "teacher.layout.expert_tensor=3 does not divide the teacher's 40 columns of an expert; use one of [1, 2, 4, 5, 8, 10, 20, 40]" in message


@pytest.mark.parametrize("axis", ["expert", "expert_tensor"])
def test_a_dense_model_has_no_experts_to_spread(axis: str) -> None:
    message = refusal(architecture_of().check_layout, "student", ParallelLayout(**{axis: 2}))
    assert f"student.layout.{axis}=2 spreads experts, and the student is a dense llama model without any; use 1" in message


def test_a_mixture_trains_under_tensor_parallelism_only_with_sequence_parallelism() -> None:
    mixture = architecture_of("qwen3_moe")
    message = refusal(mixture.check_training, "student", ParallelLayout(tensor=2))
    assert "student.layout.tensor=2 " in message
    assert message.endswith("; set student.layout.sequence=true, or tensor=1")
    mixture.check_training("student", ParallelLayout(tensor=2, sequence=True))
    mixture.check_training("student", ParallelLayout())
    architecture_of().check_training("student", ParallelLayout(tensor=2))


@pytest.mark.parametrize("tensor", [1, 2, 3, 4])
@pytest.mark.parametrize("multiple", [1, 8, 128])
def test_the_padded_vocabulary_is_the_smallest_that_divides(tensor: int, multiple: int) -> None:
    naive = next(size for size in range(263, 10_000) if size % (tensor * multiple) == 0)
    assert architecture_of().padded_vocab_size(tensor, multiple) == naive


@pytest.mark.parametrize("head_dim", [16, 24, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_frequencies_are_those_of_transformers(kind: str, theta: float, head_dim: int) -> None:
    # Trained for 512 positions, some frequencies of every case lie in each of Llama 3's three bands.
    scaling: dict[str, Any] = {"default": {}, "linear": {"factor": 4.0}, "llama3": {**LLAMA3, "original_max_position_embeddings": 512}}[kind]
    parameters = {"rope_type": kind, "rope_theta": theta, **scaling}
    config = LlamaConfig(**{**SIZES, "head_dim": head_dim, "rope_parameters": parameters})
    # What transformers' model itself computes, by the entry of ROPE_INIT_FUNCTIONS where the kind is scaled.
    reference = LlamaRotaryEmbedding(config)
    assert reference.attention_scaling == 1.0
    ours = inverse_frequencies(architecture_of(head_dim=head_dim, rope_parameters=parameters).rope, head_dim)
    assert ours.dtype == torch.float32
    # The same operations in the same precision: equal to the last bit.
    assert torch.equal(ours, reference.inv_freq)


def test_frequencies_of_longrope_are_those_of_transformers() -> None:
    short = [1.0 + 0.25 * number for number in range(9)]
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "short_factor": short, "long_factor": [9.0] * 9}
    config = Phi3Config(**{**SIZES, "hidden_size": 192, "original_max_position_embeddings": 64, "rope_parameters": parameters}, pad_token_id=0)
    reference = Phi3RotaryEmbedding(config)
    rope = parse_architecture({"architectures": ["Phi3ForCausalLM"], **json.loads(config.to_json_string())}, "config.json").rope
    assert torch.equal(inverse_frequencies(rope, 24), reference.inv_freq)
    assert rope.attention_factor == reference.attention_scaling == LENGTHENED
