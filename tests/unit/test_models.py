"""Hugging Face folders are understood or refused, and weights keep every bit on their way to Megatron-Core's layout and back.

Not covered: logits, and layouts of several processes (tests/distributed/test_conversion.py); configurations of published models as such;
checkpoints of this project.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from opd_megatron.models import weights
from opd_megatron.models.architecture import Architecture, Rope, parse_architecture
from opd_megatron.models.gpt import inverse_frequencies
from opd_megatron.models.hf_folder import copy_assets, open_hf_folder, read_architecture, stop_token_ids
from opd_megatron.models.weight_map import MappedTensor, local_slice, to_hf, to_megatron, weight_map
from opd_megatron.models.weights import export_hf, open_weights
from tests.tiny import write_tiny_model

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
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def config_of(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json; a change to `...` removes the field."""
    config = {"architectures": [FAMILIES[family]], **SIZES, **changes}
    return {key: value for key, value in config.items() if value is not ...}


def architecture_of(family: str = "llama", **changes: Any) -> Architecture:
    return parse_architecture(config_of(family, **changes), "config.json")


def refusal(action: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ValueError) as caught:
        action(*arguments)
    return str(caught.value)


# --- config.json -> Architecture ---------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ROPE_FORMS)
def test_both_ways_of_writing_a_config_give_one_architecture(family: str, form: str) -> None:
    four, five, rope = ROPE_FORMS[form]
    older = architecture_of(family, torch_dtype="bfloat16", **four)
    newer = architecture_of(family, dtype="bfloat16", **five)
    assert older == newer
    assert older.rope == rope


@pytest.mark.parametrize(("family", "config_class"), [("qwen2", Qwen2Config), ("qwen3", Qwen3Config), ("llama", LlamaConfig)])
def test_fields_are_what_transformers_understands(family: str, config_class: Any) -> None:
    """transformers' own objects are the reference; what it writes itself is read back as it is."""
    written = config_class(**{**SIZES, "tie_word_embeddings": True, "architectures": [FAMILIES[family]]})
    architecture = parse_architecture(json.loads(written.to_json_string()), "config.json")
    assert architecture.family == family
    assert (architecture.qkv_bias, architecture.qk_norm) == (family == "qwen2", family == "qwen3")
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
    assert not architecture_of("llama").tied


REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "other architecture": ("llama", {"architectures": ["GPT2LMHeadModel"]}, ["'GPT2LMHeadModel' is not supported", *FAMILIES.values()]),
    "mixture of experts": ("qwen3", {"architectures": ["Qwen3MoeForCausalLM"]}, ["'Qwen3MoeForCausalLM' is not supported"]),
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
    "sliding window": ("qwen2", {"use_sliding_window": True}, ["use_sliding_window=True", "only false"]),
    "layer types": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types=", "'full_attention' in every layer"]),
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
    ],
    ids=str,
)
def test_nonsense_is_refused_with_the_file(changes: dict[str, Any]) -> None:
    message = refusal(parse_architecture, config_of("llama", **changes), "folder/config.json")
    assert message.startswith("folder/config.json: ")
    assert next(iter(changes)) in message


def test_harmless_fields_of_published_configs_are_no_obstacle() -> None:
    changes = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 2, "quantization_config": None, "mlp_bias": False}
    assert architecture_of("qwen2", layer_types=["full_attention"] * 2, **changes) == architecture_of("qwen2")
    assert architecture_of("llama", attention_bias=False, pretraining_tp=1) == architecture_of("llama")


@pytest.mark.parametrize(
    ("axis", "size", "parts"),
    [
        ("tensor", 8, ["4 key-value heads", "[1, 2, 4]"]),
        ("tensor", 3, ["8 attention heads", "[1, 2, 4, 8]"]),
        ("pipeline", 3, ["2 layers", "[1, 2]"]),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(axis: str, size: int, parts: list[str]) -> None:
    sizes = {"tensor": 1, "pipeline": 1, axis: size}
    with pytest.raises(ValueError) as caught:
        architecture_of().check_layout("teacher", **sizes)
    assert f"teacher.layout.{axis}={size} does not divide the teacher's {parts[0]}; use one of {parts[1]}" in str(caught.value)


def test_feed_forward_columns_must_divide_too() -> None:
    with pytest.raises(ValueError, match="90 feed-forward columns"):
        architecture_of(intermediate_size=90).check_layout("student", tensor=4, pipeline=1)


@pytest.mark.parametrize("tensor", [1, 2, 3, 4])
@pytest.mark.parametrize("multiple", [1, 8, 128])
def test_the_padded_vocabulary_is_the_smallest_that_divides(tensor: int, multiple: int) -> None:
    naive = next(size for size in range(263, 10_000) if size % (tensor * multiple) == 0)
    assert architecture_of().padded_vocab_size(tensor, multiple) == naive


# --- Folders -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("whole"), "qwen3", num_hidden_layers=2)


@pytest.fixture
def folder(whole_folder: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole_folder, tmp_path / "folder"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same weights in three files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names[number::3], file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_whole_folder_is_accepted(folder: Path) -> None:
    opened = open_hf_folder(str(folder))
    assert opened.path == folder
    assert opened.architecture == read_architecture(folder)
    assert set(opened.tensor_files) == set(load_file(folder / "model.safetensors"))


def test_a_sharded_folder_gives_the_same_tensors(whole_folder: Path, sharded: Path) -> None:
    assert len(set(open_hf_folder(sharded).tensor_files.values())) == 3
    one, three = open_weights(hf=str(whole_folder)), open_weights(hf=str(sharded))
    assert one.architecture == three.architecture
    assert all(torch.equal(one.read(row), three.read(row)) for row in weight_map(one.architecture))


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert f"{folder} is not a Hugging Face model folder: no config.json in it; give a local folder" in refusal(open_hf_folder, folder)
    assert "no config.json" in refusal(open_hf_folder, folder / "nowhere")


@pytest.mark.parametrize("content", [b"", b'{"architectures": [', b"\xff\xfe\x00"], ids=["empty", "cut", "binary"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_that_is_no_json_is_refused(sharded: Path, name: str, content: bytes) -> None:
    (sharded / name).write_bytes(content)
    assert f"{sharded / name} is not valid JSON" in refusal(open_hf_folder, sharded)


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert f"{folder / 'model.safetensors'} is missing; the folder's download may be incomplete" in refusal(open_hf_folder, folder)


def test_a_missing_shard_is_refused(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert f"{shard} is missing" in refusal(open_hf_folder, sharded)


@pytest.mark.parametrize("keep", ["0", "4", "20", "half", "all but one byte", "one byte more"])
def test_a_shard_of_another_length_is_refused(sharded: Path, keep: str) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    size = {"half": len(content) // 2, "all but one byte": len(content) - 1, "one byte more": len(content) + 1}.get(keep) or int(keep if keep.isdigit() else 0)
    shard.write_bytes((content + b"\0")[:size])
    message = refusal(open_hf_folder, sharded)
    assert str(shard) in message
    assert str(size) in message
    assert "download it again" in message


@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x08\0\0\0\0\0\0\0not json"])
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert f"{folder / 'model.safetensors'} is not a whole safetensors file ({len(content)} bytes)" in refusal(open_hf_folder, folder)


def test_an_index_that_promises_more_than_a_file_holds_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    promised = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**promised, "extra.weight": "model-00001-of-00003.safetensors"})
    message = refusal(open_hf_folder, sharded)
    assert f"{sharded / 'model-00001-of-00003.safetensors'}: the index promises 'extra.weight'" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[]"),
        ("model.safetensors.index.json", b"[]"),
        ("model.safetensors.index.json", b"{}"),
        ("model-00001-of-00003.safetensors", b"\x02\0\0\0\0\0\0\x00[]"),
        ("model-00001-of-00003.safetensors", b"\x07\0\0\0\0\0\0\x00" + b'{"a":1}'),
    ],
)
def test_json_of_another_shape_is_refused(sharded: Path, name: str, content: bytes) -> None:
    (sharded / name).write_bytes(content)
    assert str(sharded / name) in refusal(open_hf_folder, sharded)


def test_a_generation_config_names_the_stop_tokens_before_the_config(folder: Path) -> None:
    edit_json(folder / "config.json", eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert stop_token_ids(folder) == (7, 9)
    (folder / "generation_config.json").write_text("{}")
    assert stop_token_ids(folder) == (5,)
    edit_json(folder / "config.json", eos_token_id=None)
    assert stop_token_ids(folder) == ()


def test_assets_are_copied_without_weights(folder: Path, tmp_path: Path) -> None:
    copy_assets(folder, tmp_path / "copy" / "deep")
    assert {path.name for path in (tmp_path / "copy" / "deep").iterdir()} == {path.name for path in folder.iterdir()} - {"model.safetensors"}


# --- The weight map ----------------------------------------------------------------------------------------------------------------------

MAPPED = {
    "qwen2": architecture_of("qwen2"),
    "qwen2 tied": architecture_of("qwen2", tie_word_embeddings=True),
    "qwen3": architecture_of("qwen3", head_dim=24),
    "llama": architecture_of("llama"),
    "llama, one query head a group": architecture_of("llama", num_key_value_heads=8),
}


def random_parts(row: MappedTensor, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in row.part_shapes]


def rows_of(architecture: Architecture) -> list[tuple[MappedTensor, torch.Tensor]]:
    """Every row with its global Megatron tensor made of random parts."""
    return [(row, to_megatron(row, random_parts(row, seed), architecture)) for seed, row in enumerate(weight_map(architecture))]


@pytest.mark.parametrize("family", MAPPED)
def test_to_hf_inverts_to_megatron_in_every_row(family: str) -> None:
    architecture = MAPPED[family]
    for seed, row in enumerate(weight_map(architecture)):
        parts = random_parts(row, seed)
        tensor = to_megatron(row, parts, architecture)
        assert tuple(tensor.shape) == row.shape, row.megatron
        back = to_hf(row, tensor, architecture)
        assert tuple(back) == row.hf
        assert all(torch.equal(one, other) for one, other in zip(parts, back.values(), strict=True)), row.megatron


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_map_names_every_tensor_of_transformers_model_once(family: str, tied: bool, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", family, tied=tied, num_hidden_layers=2)
    rows = weight_map(read_architecture(folder))
    stored = load_file(folder / "model.safetensors")
    named = [name for row in rows for name in row.hf]
    assert sorted(named) == sorted(stored)
    assert len({row.megatron for row in rows}) == len(rows)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        name: shape for row in rows for name, shape in zip(row.hf, row.part_shapes, strict=True)
    }


def naive_interleaving(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Megatron's order, row by row: for each group its query heads, its key head, its value head."""
    size, per_group = architecture.head_dim, architecture.num_heads // architecture.num_kv_heads
    rows = []
    for group in range(architecture.num_kv_heads):
        for head in range(group * per_group, (group + 1) * per_group):
            rows += [query[head * size + i] for i in range(size)]
        rows += [key[group * size + i] for i in range(size)]
        rows += [value[group * size + i] for i in range(size)]
    return torch.stack(rows)


@pytest.mark.parametrize("family", MAPPED)
def test_query_key_and_value_are_interleaved_by_group(family: str) -> None:
    architecture = MAPPED[family]
    rows = [row for row in weight_map(architecture) if row.kind == "qkv"]
    assert len(rows) == architecture.num_layers * (2 if architecture.qkv_bias else 1)
    for row in rows:
        query, key, value = random_parts(row)
        assert torch.equal(to_megatron(row, [query, key, value], architecture), naive_interleaving(query, key, value, architecture))


def test_a_part_of_another_shape_is_refused_by_name() -> None:
    architecture = MAPPED["llama"]
    row = next(row for row in weight_map(architecture) if row.kind == "qkv")
    parts = random_parts(row)
    parts[1] = parts[1][:-1]
    message = refusal(to_megatron, row, parts, architecture)
    assert f"{row.hf[1]} has shape (31, 64) where config.json implies (32, 64)" in message


def reassembled(row: MappedTensor, slices: list[torch.Tensor]) -> torch.Tensor:
    """What Megatron's tensor parallelism means by these slices, before vocabulary padding is cut."""
    if row.split_dim is None:
        assert all(torch.equal(piece, slices[0]) for piece in slices)
        return slices[0]
    if row.kind == "gate_up":
        # Every rank holds its rows of the gate above its rows of the up projection.
        halves = [(piece[: len(piece) // 2], piece[len(piece) // 2 :]) for piece in slices]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(slices, dim=row.split_dim)


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
@pytest.mark.parametrize("family", MAPPED)
def test_the_slices_of_all_tensor_ranks_make_the_whole_tensor(family: str, tensor_size: int) -> None:
    architecture = MAPPED[family]
    padded = architecture.padded_vocab_size(tensor_size, 8)
    for row, tensor in rows_of(architecture):
        slices = [local_slice(row, tensor, tensor_rank=rank, tensor_size=tensor_size, padded_vocab=padded) for rank in range(tensor_size)]
        assert len({piece.shape for piece in slices}) == 1, row.megatron
        whole = reassembled(row, slices)
        if row.is_vocab:
            assert len(whole) == padded > architecture.vocab_size
            assert not whole[architecture.vocab_size :].any()
            whole = whole[: architecture.vocab_size]
        assert torch.equal(whole, tensor), row.megatron


def test_a_slice_of_query_key_and_value_is_a_smaller_attention_of_its_own() -> None:
    """Rank r of 2 holds what a model of half the heads would, made of heads r * 4 to r * 4 + 3 and groups r * 2, r * 2 + 1."""
    architecture = MAPPED["qwen3"]
    half = dataclasses.replace(architecture, num_heads=4, num_kv_heads=2)
    row = next(row for row in weight_map(architecture) if row.kind == "qkv")
    parts = random_parts(row)
    for rank in range(2):
        piece = local_slice(row, to_megatron(row, parts, architecture), tensor_rank=rank, tensor_size=2, padded_vocab=0)
        assert torch.equal(piece, naive_interleaving(*(part.chunk(2)[rank] for part in parts), half))


def test_padding_may_fill_whole_ranks() -> None:
    architecture = architecture_of(vocab_size=5)
    row, tensor = next((row, tensor) for row, tensor in rows_of(architecture) if row.is_vocab)
    slices = [local_slice(row, tensor, tensor_rank=rank, tensor_size=4, padded_vocab=16) for rank in range(4)]
    assert torch.equal(torch.cat(slices)[:5], tensor)
    assert not torch.cat(slices)[5:].any()


# --- Rotary frequencies ------------------------------------------------------------------------------------------------------------------


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


# --- Weights in and out ------------------------------------------------------------------------------------------------------------------


def test_missing_and_unknown_tensors_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    without = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    save_file(without, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors of a qwen3 model are missing, first 'model\.layers\.1\.mlp\.up_proj\.weight'") as caught:
        open_weights(hf=str(folder))
    assert str(folder) in str(caught.value)
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are unknown to a qwen3 model, first 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        open_weights(hf=str(folder))


def test_stored_rotary_buffers_are_passed_over(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}, folder / "model.safetensors")
    open_weights(hf=str(folder))


def test_a_tied_head_may_be_stored_a_second_time_and_an_untied_one_must_be_there(tmp_path: Path) -> None:
    tied = write_tiny_model(tmp_path / "tied", "qwen2", tied=True, num_hidden_layers=1)
    tensors = load_file(tied / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tied / "model.safetensors")
    names = {name for row in weight_map(open_weights(hf=str(tied)).architecture) for name in row.hf}
    assert "lm_head.weight" not in names
    edit_json(tied / "config.json", tie_word_embeddings=False)
    save_file(tensors, tied / "model.safetensors")
    with pytest.raises(ValueError, match=r"first 'lm_head\.weight'"):
        open_weights(hf=str(tied))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3"])
@pytest.mark.parametrize("shard_bytes", [1, 40_000, 10**9], ids=["one tensor a shard", "some shards", "one file"])
def test_an_export_in_shards_is_bit_equal_and_loads_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, shard_bytes: int) -> None:
    folder = write_tiny_model(tmp_path / "hf", family, vocab_size=263, num_hidden_layers=2)
    monkeypatch.setattr(weights, "_MAX_SHARD_BYTES", shard_bytes)
    export_hf(open_weights(hf=str(folder)), tmp_path / "out")
    original = load_file(folder / "model.safetensors")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    shards = [load_file(file) for file in files]
    exported = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert sum(map(len, shards)) == len(exported)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    largest = max(tensor.nbytes for tensor in original.values())
    assert all(sum(tensor.nbytes for tensor in shard.values()) <= max(shard_bytes, largest) for shard in shards)
    if shard_bytes == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    else:
        assert len(files) > 1
        assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == sum(t.nbytes for t in original.values())
    assert {path.name for path in folder.iterdir()} - {"model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}
    loaded, reference = (AutoModelForCausalLM.from_pretrained(path, local_files_only=True).state_dict() for path in (tmp_path / "out", folder))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in reference.items())
    # Our own reader takes it too.
    open_weights(hf=str(tmp_path / "out"))


def test_an_export_in_another_dtype_says_so_in_its_config(folder: Path, tmp_path: Path) -> None:
    export_hf(open_weights(hf=str(folder)), tmp_path / "out", dtype=torch.bfloat16)
    original = load_file(folder / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor.bfloat16()) for name, tensor in original.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    edit_json(folder / "config.json", torch_dtype="float32")
    export_hf(open_weights(hf=str(folder)), tmp_path / "older", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "older" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_export_refuses_to_overwrite_unless_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    source = open_weights(hf=str(folder))
    assert f"{out} exists; name another folder or remove it" in refusal(export_hf, source, out)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    export_hf(source, out, replace=True)
    assert (out / "model.safetensors").is_file()
    assert not (out / "precious.txt").exists()


def test_an_export_that_breaks_off_leaves_no_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    source = open_weights(hf=str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", disk_full)
        with pytest.raises(OSError, match="no space left"):
            export_hf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # What it left behind does not stop the next attempt.
    export_hf(source, tmp_path / "out")
    open_weights(hf=str(tmp_path / "out"))
