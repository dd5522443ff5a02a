"""Hugging Face -> Megatron -> Hugging Face is bit-identical, and both implementations give the same logits, in any layout.

Not covered: weights of published models (none can be downloaded where tests run), bf16 files above 5 GB (several shards).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from opd_megatron.config import ParallelLayout
from opd_megatron.models.compare import megatron_logits, transformers_logits
from opd_megatron.models.convert import write_checkpoint
from opd_megatron.models.gpt import DTYPES, build_gpt
from opd_megatron.models.weights import export_hf, load_model, named_global_parameters, open_weights
from opd_megatron.parallel.groups import forget_student_groups, student_groups, teacher_groups
from tests.pool import RankPool
from tests.tiny import write_tiny_model

FAMILIES = ["qwen2", "qwen3", "qwen3_moe", "llama", "llama3"]
LAYOUTS = [(1, 1), (2, 1), (2, 2)]


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _assert_identical(one: Path, other: Path) -> None:
    left, right = _state(one), _state(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def _convert(folder: Path, checkpoint: Path, back: Path) -> None:
    write_checkpoint(open_weights(hf=str(folder)), checkpoint)
    export_hf(open_weights(checkpoint=str(checkpoint)), back)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_tools_round_trip_bit_for_bit(pool: RankPool, tmp_path: Path, family: str, tied: bool) -> None:
    folder = write_tiny_model(tmp_path / "hf", family, tied=tied, vocab_size=263)
    pool.run(_convert, folder, tmp_path / "checkpoint", tmp_path / "back", world_size=1)
    _assert_identical(folder, tmp_path / "back")


def test_a_mixture_whose_experts_are_stored_in_several_dtypes_keeps_every_value(pool: RankPool, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "hf", "qwen3_moe", vocab_size=263, num_hidden_layers=1)
    tensors = _state(folder)
    for name, tensor in tensors.items():
        tensors[name] = tensor.bfloat16() if "experts.3." in name or "norm" in name else tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    pool.run(_convert, folder, tmp_path / "checkpoint", tmp_path / "back", world_size=1)
    back = _state(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name].float(), tensor.float()), name
        # The experts of a layer are one tensor, which is fp32 where one of them is.
        assert back[name].dtype == (torch.float32 if "experts." in name else tensor.dtype), name


def _loaded(folder: Path, precision: Literal["bf16", "fp32"], as_teacher: bool) -> dict[str, torch.Tensor]:
    source = open_weights(hf=str(folder))
    groups = teacher_groups(ParallelLayout()) if as_teacher else student_groups(ParallelLayout(), seed=1)
    model = build_gpt(source.architecture, groups, precision=precision, vocab_multiple=1)
    load_model(model, groups, source, vocab_multiple=1)
    return {name: parameter.detach() for name, parameter in named_global_parameters(model, source.architecture)}


@pytest.mark.parametrize("as_teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_stored_dtype_decides_nothing(pool: RankPool, tmp_path: Path, precision: Literal["bf16", "fp32"], as_teacher: bool) -> None:
    """A student and a teacher may be stored in different ones: both are cast to what is trained in."""
    folders = [write_tiny_model(tmp_path / name, num_hidden_layers=1) for name in ("bf16", "fp32")]
    for folder, dtype in zip(folders, (torch.bfloat16, torch.float32), strict=True):
        tensors = {name: tensor.bfloat16().to(dtype) for name, tensor in _state(folder).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    short, long = (pool.run(_loaded, folder, precision, as_teacher, world_size=1)[0] for folder in folders)
    assert {tensor.dtype for tensor in short.values()} == {DTYPES[precision]}
    assert all(torch.equal(short[name], tensor) and short[name].dtype == tensor.dtype for name, tensor in long.items())


def _through_layout(folder: Path, out: Path, layout: ParallelLayout, vocab_multiple: int) -> None:
    """Load a folder under a layout, save what the ranks hold as a checkpoint, export that."""
    from megatron.core import dist_checkpointing

    from opd_megatron.models.hf_folder import copy_assets

    source = open_weights(hf=str(folder))
    groups = student_groups(layout, seed=1)
    model = build_gpt(source.architecture, groups, precision="fp32", vocab_multiple=vocab_multiple)
    load_model(model, groups, source, vocab_multiple=vocab_multiple)
    checkpoint = out.with_name(out.name + "-checkpoint")
    if dist.get_rank() == 0:
        checkpoint.mkdir()
    dist.barrier()
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.collection.dp_cp}
    dist_checkpointing.save(model.last.sharded_state_dict(metadata=metadata), str(checkpoint))
    if dist.get_rank() == 0:
        copy_assets(source.assets, checkpoint / "huggingface")
        export_hf(open_weights(checkpoint=str(checkpoint)), out)
    dist.barrier()
    forget_student_groups()


def _tied_then_untied(tied: Path, untied: Path, out: Path, layout: ParallelLayout, vocab_multiple: int) -> None:
    _through_layout(tied, out / "tied", layout, vocab_multiple)
    _through_layout(untied, out / "untied", layout, vocab_multiple)


# A vocabulary that needs no padding: one family here, the others are slow.
SIZES = [(family, size) for family in FAMILIES for size in (264, 263)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"TP{layout[0]}xPP{layout[1]}")
@pytest.mark.parametrize(
    ("family", "vocab_size"), [pytest.param(family, size, marks=[pytest.mark.slow] if size == 264 and family != "qwen3" else []) for family, size in SIZES]
)
def test_a_tied_then_an_untied_model_round_trip_in_one_process(pool: RankPool, tmp_path: Path, family: str, vocab_size: int, layout: tuple[int, int]) -> None:
    tied = write_tiny_model(tmp_path / "tied-hf", family, tied=True, vocab_size=vocab_size, seed=1)
    untied = write_tiny_model(tmp_path / "untied-hf", family, tied=False, vocab_size=vocab_size, seed=2)
    tensor, pipeline = layout
    multiple = 1 if vocab_size == 264 else 16
    pool.run(_tied_then_untied, tied, untied, tmp_path, ParallelLayout(tensor=tensor, pipeline=pipeline), multiple, world_size=tensor * pipeline)
    _assert_identical(tied, tmp_path / "tied")
    _assert_identical(untied, tmp_path / "untied")


EXPERT_LAYOUTS = {
    "EP2": (ParallelLayout(expert=2), 2),
    "EP4": (ParallelLayout(expert=4), 4),
    "EP2xPP2": (ParallelLayout(expert=2, pipeline=2), 4),
    "EP2xTP2": (ParallelLayout(expert=2, tensor=2), 2),
    "EP4xTP2": (ParallelLayout(expert=4, tensor=2), 4),
    "ETP2": (ParallelLayout(expert_tensor=2), 2),
    "TP2xETP2": (ParallelLayout(tensor=2, expert_tensor=2), 2),
    "EP2xETP2": (ParallelLayout(expert=2, expert_tensor=2), 4),
    "TP2xPP2xETP2": (ParallelLayout(tensor=2, pipeline=2, expert_tensor=2), 4),
}


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
def test_a_mixture_of_experts_round_trips_with_its_experts_spread(pool: RankPool, tmp_path: Path, name: str) -> None:
    folder = write_tiny_model(tmp_path / "hf", "qwen3_moe", vocab_size=263)
    layout, world_size = EXPERT_LAYOUTS[name]
    pool.run(_through_layout, folder, tmp_path / "back", layout, 16, world_size=world_size)
    _assert_identical(folder, tmp_path / "back")


SEQUENCES = [torch.arange(3, 90), torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1))]


def _logit_difference(folder: Path, layout: ParallelLayout, as_teacher: bool) -> float | None:
    source = open_weights(hf=str(folder))
    groups = teacher_groups(layout) if as_teacher else student_groups(layout, seed=1)
    model = build_gpt(source.architecture, groups, precision="fp32", vocab_multiple=16)
    load_model(model, groups, source, vocab_multiple=16)
    ours = [megatron_logits(model, groups, sequence[None], source.architecture.vocab_size) for sequence in SEQUENCES]
    if not groups.is_last_stage:
        return None
    theirs = transformers_logits(folder, SEQUENCES, torch.float32)
    return max(float((one[0] - other).abs().max()) for one, other in zip(ours, theirs, strict=True) if one is not None)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"TP{layout[0]}xPP{layout[1]}")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "as_teacher"),
    [*((family, False) for family in FAMILIES), *(pytest.param(family, True, marks=[pytest.mark.slow] if family != "qwen3" else []) for family in FAMILIES)],
)
def test_logits_equal_transformers(pool: RankPool, tmp_path: Path, family: str, tied: bool, layout: tuple[int, int], as_teacher: bool) -> None:
    folder = write_tiny_model(tmp_path / "hf", family, tied=tied, vocab_size=263)
    tensor, pipeline = layout
    differences = pool.run(_logit_difference, folder, ParallelLayout(tensor=tensor, pipeline=pipeline), as_teacher, world_size=tensor * pipeline)
    measured = [difference for difference in differences if difference is not None]
    assert measured
    # fp32 sums in another order over 64 to 96 terms; measured 1e-5 at logits of scale 10.
    assert max(measured) < 1e-4


@pytest.mark.parametrize("as_teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
def test_logits_equal_transformers_with_experts_spread(pool: RankPool, tmp_path: Path, name: str, as_teacher: bool) -> None:
    folder = write_tiny_model(tmp_path / "hf", "qwen3_moe", vocab_size=263)
    layout, world_size = EXPERT_LAYOUTS[name]
    differences = pool.run(_logit_difference, folder, layout, as_teacher, world_size=world_size)
    measured = [difference for difference in differences if difference is not None]
    assert len(measured) == world_size // layout.pipeline
    # As above.
    assert max(measured) < 1e-4


def _global_names(folder: Path, layout: ParallelLayout) -> list[str]:
    source = open_weights(hf=str(folder))
    groups = student_groups(layout, seed=1)
    model = build_gpt(source.architecture, groups, precision="fp32", vocab_multiple=1)
    return [name for name, _ in named_global_parameters(model, source.architecture)]


def test_pipeline_stages_number_their_layers_globally(pool: RankPool, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "hf", "qwen3", tied=True, vocab_size=264)
    first, second = pool.run(_global_names, folder, ParallelLayout(pipeline=2), world_size=2)
    assert "decoder.layers.1.mlp.linear_fc2.weight" in first
    assert "decoder.layers.3.mlp.linear_fc2.weight" in second
    assert set(first) & set(second) == {"embedding.word_embeddings.weight"}, "a tied head is the embedding's second copy"
