"""Which layers a machine gets, what is refused there, and that a parameter of either kind of layer has the name that checkpoints give it.

Not covered: Transformer Engine's modules, which need a GPU; the probe of packages (test_packages.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from opd_megatron.config import ParallelLayout, TrainingConfig, apply_overrides, fp8_multiple
from opd_megatron.data.batch_plan import TrainingBatches
from opd_megatron.models.chunk_state import is_extra_state
from opd_megatron.models.layer_options import LayerOptions, choose_layers, own_attention_reason
from opd_megatron.models.weight_map import is_expert, name_in_layer, weight_map
from opd_megatron.packages import Package
from recipes.quickstart import quickstart
from tests.model_configs import architecture_of

HOPPER, BLACKWELL = (9, 0), (10, 0)


def packages(*working: str) -> Callable[[str], Package]:
    """Return a probe that finds these."""
    return lambda name: Package(name=name, version="1.0", problem=None if name in working else "importing it raises OSError: no library")


NOTHING, ALL = packages(), packages("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda")


@pytest.mark.parametrize(
    ("layers", "has_device", "found", "kind"),
    [
        ("auto", False, ALL, "local"),
        ("auto", True, NOTHING, "local"),
        ("auto", True, ALL, "te"),
        ("te", True, ALL, "te"),
        ("local", True, ALL, "local"),
    ],
)
def test_layers_are_transformer_engines_where_it_works_on_a_device(layers: str, has_device: bool, found: Callable[[str], Package], kind: str) -> None:
    options = choose_layers(TrainingConfig(layers=layers), has_device=has_device, package=found)  # type: ignore[arg-type]
    assert options.kind == kind
    assert options.frozen == LayerOptions(kind=kind)  # type: ignore[arg-type]


def test_on_a_cpu_nothing_is_chosen_and_nothing_is_probed() -> None:
    def probe(name: str) -> Package:
        raise AssertionError(name)

    assert choose_layers(TrainingConfig(), has_device=False, package=probe) == LayerOptions()


REFUSED = [
    ({"layers": "te"}, False, ALL, "needs a CUDA device"),
    ({"layers": "te"}, True, NOTHING, "training.layers=te: transformer-engine 1.0: importing it raises OSError: no library"),
    ({"fp8": "tensorwise"}, True, NOTHING, "training.fp8=tensorwise needs Transformer Engine's layers, and these are local ones"),
    ({"fp8": "mxfp8"}, True, ALL, "no kernels on a GPU of compute capability 9.0; set training.fp8=tensorwise or blockwise"),
    ({"gradient_accumulation_fusion": "on"}, True, NOTHING, "apex 1.0: importing it raises OSError"),
    ({"gradient_accumulation_fusion": "on"}, False, ALL, "there is no CUDA device"),
    ({"recompute": "selective", "recompute_modules": ("layernorm",)}, True, NOTHING, "has layernorm, which needs Transformer Engine's layers"),
    ({"recompute": "selective", "recompute_modules": ("mlp", "moe_act")}, False, ALL, "has moe_act, which needs"),
]


@pytest.mark.parametrize(("training", "has_device", "found", "message"), REFUSED)
def test_what_is_not_there_is_refused_with_a_way_out(training: dict[str, object], has_device: bool, found: Callable[[str], Package], message: str) -> None:
    with pytest.raises(ValueError, match="; ") as refusal:
        choose_layers(TrainingConfig(**training), has_device=has_device, capability=HOPPER, package=found)  # type: ignore[arg-type]
    assert message in str(refusal.value)


IMPOSSIBLE = [
    (["training.fp8=tensorwise", "training.layers=local"], "training.fp8=tensorwise needs Transformer Engine's layers"),
    (["training.fp8=blockwise", "training.precision=fp32"], "needs training.precision=bf16"),
    (["training.fp8=delayed"], "must be one of tensorwise, blockwise, mxfp8 or null"),
    (["training.recompute=selective", "training.recompute_modules=[]"], "training.recompute_modules is empty"),
    (["training.recompute=selective", "training.recompute_modules=mlp,mlp"], "names a module twice"),
    (["training.recompute=selective", "training.recompute_modules=layernorm", "training.layers=local"], "has layernorm, which needs"),
    (["training.recompute_modules=attention"], "must be one of core_attn, layernorm, mlp, moe, moe_act"),
]


@pytest.mark.parametrize(("overrides", "message"), IMPOSSIBLE)
def test_what_no_machine_has_is_refused_by_the_configuration(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides(quickstart(), overrides)


@pytest.mark.parametrize("words", ["core_attn,moe", '["core_attn", "moe"]'])
def test_modules_are_named_by_words_or_as_json(words: str) -> None:
    training = apply_overrides(quickstart(), ["training.recompute=selective", f"training.recompute_modules={words}"]).training
    assert training.recomputed_modules == ("core_attn", "moe")
    assert dataclasses.replace(training, recompute="full").recomputed_modules == ()


def test_a_fused_gradient_needs_the_layers_or_apexs_kernel() -> None:
    def fused(wanted: str, layers: str, *working: str) -> bool:
        training = TrainingConfig(gradient_accumulation_fusion=wanted, layers=layers)  # type: ignore[arg-type]
        return choose_layers(training, has_device=True, package=packages(*working)).fused_gradients

    assert fused("auto", "te", "transformer_engine")
    assert fused("auto", "local", "fused_weight_gradient_mlp_cuda")
    assert not fused("auto", "local", "apex")
    assert not fused("off", "te", "transformer_engine")


@pytest.mark.parametrize(
    ("family", "windows", "context", "reason"),
    [
        ("qwen3", (), 2, None),
        ("phi3", (), 2, None),
        ("mistral", (16, 16), 1, None),
        ("qwen2", (None, 16), 1, None),
        ("qwen2", (None, 16), 2, "it has no windows over context ranks"),
        ("qwen2", (8, 16), 1, "it takes one window size, not [8, 16]"),
        ("gemma2", (16, None), 1, "it caps no scores"),
    ],
)
def test_our_attention_stays_where_transformer_engines_does_not_compute_a_model(
    family: str, windows: tuple[int | None, ...], context: int, reason: str | None
) -> None:
    architecture = dataclasses.replace(architecture_of(family), windows=windows)
    assert own_attention_reason(architecture, ParallelLayout(context=context), "bf16") == reason
    assert own_attention_reason(architecture, ParallelLayout(context=context), "fp32") is not None


EXPERTS = [7, 8]
# What Megatron-Core's parameters of a layer are called, of local layers and of Transformer Engine's, in the order of the same tensors.
DENSE = [
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight"),
    ("self_attention.q_layernorm.weight", "self_attention.q_layernorm.weight"),
    ("self_attention.linear_proj.post_layernorm.weight", "self_attention.linear_proj.post_layernorm.weight"),
    ("mlp.linear_fc2.weight", "mlp.linear_fc2.weight"),
]
MIXTURE = [
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "pre_mlp_layernorm.weight"),
    ("mlp.router.weight", "mlp.router.weight"),
    ("mlp.experts.local_experts.1.linear_fc1.weight", "mlp.experts.linear_fc1.weight1"),
    ("mlp.experts.local_experts.0.linear_fc2.weight", "mlp.experts.linear_fc2.weight0"),
]


@pytest.mark.parametrize(
    ("family", "local", "te"), [*(("gemma2", *pair) for pair in DENSE if "q_layernorm" not in pair[0]), *(("qwen3_moe", *pair) for pair in MIXTURE)]
)
def test_both_kinds_of_layers_have_the_names_of_the_weight_map(family: str, local: str, te: str) -> None:
    architecture = architecture_of(family, **({"num_experts": 9} if family == "qwen3_moe" else {}))
    name = name_in_layer(local, architecture, EXPERTS)
    assert name_in_layer(te, architecture, EXPERTS) == name
    assert f"decoder.layers.0.{name}" in {row.name for row in weight_map(architecture)}
    assert is_expert(f"decoder.layers.0.{local}") == is_expert(f"decoder.layers.0.{te}") == ("experts." in local)


def test_norms_of_queries_have_one_name() -> None:
    names = {row.name for row in weight_map(architecture_of("qwen3"))}
    assert f"decoder.layers.0.{name_in_layer('self_attention.q_layernorm.weight', architecture_of('qwen3'), [])}" in names


def test_only_extra_state_is_left_out_of_a_checkpoint() -> None:
    assert is_extra_state("decoder.layers.0.self_attention.linear_qkv._extra_state")
    assert is_extra_state("decoder.layers.0.mlp.experts.linear_fc1._extra_state12")
    assert not is_extra_state("decoder.layers.0.mlp.experts.linear_fc1.weight12")
    assert not is_extra_state("decoder.final_layernorm.weight")


@pytest.mark.parametrize("max_tokens", [None, 512])
@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(context=2, tensor=2, sequence=True)])
@pytest.mark.parametrize("scaling", ["tensorwise", "mxfp8"])
def test_a_rank_has_as_many_tokens_as_8_bit_products_take(scaling: str, layout: ParallelLayout, max_tokens: int | None) -> None:
    batches = TrainingBatches(
        layout=layout, num_replicas=2, micro_batch=2 if max_tokens is None else 1, max_tokens=max_tokens, rank_multiple=fp8_multiple(scaling)
    )
    plan = batches.plan([100, 37, 81, 5, 64])
    parts = layout.context * (layout.tensor if layout.sequence else 1)
    assert plan.row_length % parts == 0
    assert plan.num_rows * plan.row_length // parts % fp8_multiple(scaling) == 0
    assert plan.row_length >= max(plan.lengths)
    if max_tokens is not None:
        assert plan.row_length <= max_tokens


def test_sizes_that_8_bit_products_do_not_take_are_refused_with_the_numbers() -> None:
    architecture = dataclasses.replace(architecture_of("qwen3"), hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_hidden_size=96)
    architecture.check_fp8("student", ParallelLayout(tensor=2), "tensorwise")
    architecture.check_fp8("student", ParallelLayout(tensor=8), None)
    with pytest.raises(ValueError, match=r"training.fp8=mxfp8 takes .* multiples of 32 .* the student's feed-forward has 96 / 2 = 48; use fewer tensor ranks"):
        architecture.check_fp8("student", ParallelLayout(tensor=2), "mxfp8")
