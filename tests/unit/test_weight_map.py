"""The weight map keeps every bit on the way to Megatron-Core's layout and back, and its slices are those of tensor parallelism.

Not covered: logits, and layouts of several processes (tests/distributed/test_conversion.py); files (test_weights.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.hf_folder import read_architecture
from opd_megatron.models.weight_map import MappedTensor, weight_map
from opd_megatron.models.weight_slices import local_slice, to_hf, to_megatron
from tests.model_configs import architecture_of, refusal
from tests.tiny import write_tiny_model

MAPPED = {
    "qwen2": architecture_of("qwen2"),
    "qwen2 tied": architecture_of("qwen2", tie_word_embeddings=True),
    "qwen3": architecture_of("qwen3", head_dim=24),
    "qwen3_moe": architecture_of("qwen3_moe", head_dim=24, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=40),
    "llama": architecture_of("llama"),
    "mistral": architecture_of("mistral", head_dim=24),
    "gemma2": architecture_of("gemma2", head_dim=24),
    "phi3": architecture_of("phi3"),
    "llama, one query head a group": architecture_of("llama", num_key_value_heads=8),
}


def random_parts(row: MappedTensor, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in row.hf_shapes]


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


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "gemma2", "phi3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_map_names_every_tensor_of_transformers_model_once(family: str, tied: bool, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", family, tied=tied, num_hidden_layers=2)
    rows = weight_map(read_architecture(folder))
    stored = load_file(folder / "model.safetensors")
    named = [name for row in rows for name in row.hf]
    assert sorted(named) == sorted(stored)
    assert len({row.name for row in rows}) == len(rows)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        name: shape for row in rows for name, shape in zip(row.hf, row.hf_shapes, strict=True)
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
        tensors = random_parts(row)
        # phi3 stores the three in one tensor, all queries first.
        query, key, value = tensors if len(tensors) == 3 else tensors[0].split([shape[0] for shape in row.part_shapes])
        assert torch.equal(to_megatron(row, tensors, architecture), naive_interleaving(query, key, value, architecture))


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
