"""What a run says of its equipment, and what Megatron-Core is told of layers that this machine does not have.

Not covered: a GPU's lines as they are printed there; Transformer Engine's modules.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opd_megatron.config import ParallelLayout, apply_overrides
from opd_megatron.models.gpt import LOCAL, _transformer_config
from opd_megatron.models.layer_options import LayerOptions
from opd_megatron.training.equipment import _attention, _missing, describe_equipment
from recipes.quickstart import quickstart
from tests.model_configs import architecture_of

TE = LayerOptions(kind="te")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
def test_a_cpu_needs_two_lines() -> None:
    config, architecture = quickstart(), architecture_of("qwen3")
    first, second = describe_equipment(config, architecture, architecture).splitlines()
    assert first.startswith(f"equipment: CPU, torch {torch.__version__}, megatron-core ")
    assert "Megatron-Core's local ones" in second
    again = apply_overrides(config, ["training.recompute=selective"])
    assert "of which mlp again in the backward" in describe_equipment(again, architecture, None)


def test_the_attention_of_each_model_is_named_with_its_reason() -> None:
    one, two = ParallelLayout(), ParallelLayout(context=2)
    windowed = dataclasses.replace(architecture_of("qwen3"), windows=(16, None))
    assert _attention(TE, "bf16", architecture_of("qwen3"), two) == "Transformer Engine's"
    assert _attention(TE, "bf16", windowed, one) == "Transformer Engine's"
    assert _attention(TE, "bf16", windowed, two) == "ours by PyTorch's kernels, as to Transformer Engine's: it has no windows over context ranks"
    assert _attention(TE, "bf16", architecture_of("gemma2"), one) == "ours in chunks, as to Transformer Engine's: it caps no scores"
    assert _attention(LOCAL, "bf16", architecture_of("llama"), one) == "ours by PyTorch's kernels"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without the packages")
def test_each_missing_package_has_its_cost_where_it_would_be_of_use() -> None:
    local = _missing(LOCAL)
    assert len(local) == 4
    assert all(line.count(": ") >= 2 for line in local)
    assert not any("apex" in line for line in _missing(TE))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "gemma2", "phi3", "qwen3_moe"])
def test_megatron_core_takes_what_it_is_told_of_transformer_engines_layers(family: str) -> None:
    architecture = architecture_of(family)
    local, te = (_transformer_config(architecture, ParallelLayout(), "bf16", options) for options in (LOCAL, TE))
    assert (local.moe_grouped_gemm, te.moe_grouped_gemm) == (False, architecture.experts is not None)
    assert local.window_size is None
    # Megatron's switch is for its own modules, which would ask for Apex.
    fused = dataclasses.replace(TE, fused_gradients=True)
    assert not _transformer_config(architecture, ParallelLayout(), "bf16", fused).gradient_accumulation_fusion
    assert _transformer_config(architecture, ParallelLayout(), "bf16", dataclasses.replace(LOCAL, fused_gradients=True)).gradient_accumulation_fusion


def test_windows_are_told_in_megatron_cores_words() -> None:
    """A window of W positions ends with the query's own: W - 1 are before it."""
    architecture = dataclasses.replace(architecture_of("qwen2"), windows=(None, 16))
    config = _transformer_config(architecture, ParallelLayout(), "bf16", TE)
    assert config.window_size == (15, 0)
    assert config.window_attn_skip_freq == [0, 1]
    assert _transformer_config(architecture, ParallelLayout(context=2), "bf16", TE).window_size is None
    assert _transformer_config(architecture, ParallelLayout(), "bf16", LOCAL).window_size is None


def test_8_bit_products_are_told_in_megatron_cores_words() -> None:
    config = _transformer_config(architecture_of("llama"), ParallelLayout(), "bf16", dataclasses.replace(TE, fp8="tensorwise"))
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", "tensorwise", False)
    assert _transformer_config(architecture_of("llama"), ParallelLayout(), "bf16", LOCAL).fp8 is None


def test_dense_layers_are_not_asked_to_recompute_activations_of_experts() -> None:
    options = dataclasses.replace(TE, recompute="selective", recompute_modules=("mlp", "moe_act"))
    assert _transformer_config(architecture_of("llama"), ParallelLayout(), "bf16", options).recompute_modules == ["mlp"]
    assert _transformer_config(architecture_of("qwen3_moe"), ParallelLayout(), "bf16", options).recompute_modules == ["mlp", "moe_act"]
