"""Choices of modules name the tensors that they say, in dense models and mixtures of experts, under Megatron-Core's and Hugging Face's names."""

from __future__ import annotations

import pytest

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.modules import chosen_rows, layer_of, module_kind
from opd_megatron.models.weight_map import weight_map
from tests.model_configs import architecture_of

QWEN2 = architecture_of("qwen2", num_hidden_layers=1)
QWEN3 = architecture_of("qwen3", head_dim=24, num_hidden_layers=1)
MIXTURE = architecture_of("qwen3_moe", head_dim=24, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=40, num_hidden_layers=1)

ATTENTION = ["self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"]
DENSE = [*ATTENTION, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
EXPERTS = [f"mlp.experts.experts.linear_fc{number}.weight[{expert}]" for expert in range(2) for number in (1, 2)]
FUSED_NORM = "self_attention.linear_qkv.layer_norm_weight"
QK_NORMS = ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]

# What effopd.modules moves, and what the released code's match on Hugging Face names would.
MOVED = {
    "paper, biases": ("paper", QWEN2, [ATTENTION[0], ATTENTION[1], "self_attention.linear_qkv.bias", *DENSE[2:]]),
    "paper, q and k norms": ("paper", QWEN3, DENSE),
    "paper, experts": ("paper", MIXTURE, [*ATTENTION, *EXPERTS]),
    # post_attention_layernorm has "attention" in its name, q_norm stands under self_attn; input_layernorm is spared.
    "released": ("released", QWEN3, [*ATTENTION, *QK_NORMS, "mlp.linear_fc1.layer_norm_weight", *DENSE[2:]]),
    "released, router": ("released", MIXTURE, [*ATTENTION, *QK_NORMS, "pre_mlp_layernorm.weight", "mlp.router.weight", *EXPERTS]),
}


def named(choice: str, architecture: Architecture) -> list[str]:
    return [row.name for row in chosen_rows(choice, weight_map(architecture))]


@pytest.mark.parametrize(("choice", "architecture", "expected"), MOVED.values(), ids=MOVED)
def test_a_choice_names_exactly_these(choice: str, architecture: Architecture, expected: list[str]) -> None:
    assert sorted(named(choice, architecture)) == sorted(f"decoder.layers.0.{name}" for name in expected)


def test_kinds_share_the_model_among_them() -> None:
    for architecture in (QWEN2, QWEN3, MIXTURE):
        rows = weight_map(architecture)
        kinds = sorted({module_kind(row) for row in rows})
        by_kind = [name for kind in kinds for name in named(kind, architecture)]
        assert sorted(by_kind) == sorted(row.name for row in rows)
        assert named("all", architecture) == [row.name for row in rows]
    assert set(named("norm", MIXTURE)) >= {f"decoder.layers.0.{FUSED_NORM}", "decoder.final_layernorm.weight"}


def test_words_add_and_take_away() -> None:
    assert named("attention,mlp", QWEN3) == named("paper", QWEN3)
    assert set(named("!embedding,!head", QWEN3)) == set(named("all", QWEN3)) - set(named("embedding,head", QWEN3))
    assert named("paper, !attention", QWEN3) == named("mlp", QWEN3)


def test_both_name_sets_are_understood() -> None:
    by_megatron = named("decoder.layers.0.mlp.linear_fc2.weight", QWEN3)
    assert by_megatron == named("model.layers.*.mlp.down_proj.weight", QWEN3) == ["decoder.layers.0.mlp.linear_fc2.weight"]
    assert named("*.mlp.experts.1.*", MIXTURE) == [name for name in named("mlp", MIXTURE) if name.endswith("[1]")]
    assert named("decoder.layers.0.mlp.experts.experts.linear_fc2.weight", MIXTURE) == [f"decoder.layers.0.{name}" for name in EXPERTS if "fc2" in name]


def test_words_may_name_a_fused_tensor_part_by_part() -> None:
    fused = ["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert named("*.q_proj.weight,*.k_proj.weight,*.v_proj.weight", QWEN3) == named("*.[qkv]_proj.weight", QWEN3) == fused
    assert named("mlp,!*.up_proj.weight,!*.gate_proj.weight", QWEN3) == ["decoder.layers.0.mlp.linear_fc2.weight"]


def test_layers_count_from_0() -> None:
    deep = architecture_of("qwen3", head_dim=24, num_hidden_layers=3)
    assert sorted({layer_of(row) for row in weight_map(deep)} - {None}) == [0, 1, 2]
    assert {row.name for row in weight_map(deep) if layer_of(row) is None} == {row.name for row in weight_map(deep) if "layers." not in row.name}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("attn", r"'attn' names no tensor of this model"),
        ("decoder.layers.0.mlp.linear_fc3.weight", r"did you mean .*linear_fc[12]"),
        ("model.layers.0.self_attn.q_proj.weight", r"1 of .*k_proj.weight.*which Megatron-Core keeps in one tensor.*name all of them"),
        ("!router", r"'!router' names no tensor"),
        ("*.q_proj.weight,*.k_proj.weight", r"2 of .*which Megatron-Core keeps in one tensor.*name all of them"),
        ("!*.up_proj.weight", r"1 of .*gate_proj.*name all of them"),
        ("attention,", r"'' names no tensor"),
    ],
)
def test_a_choice_of_nothing_or_half_a_tensor_is_refused(choice: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named(choice, QWEN3)
