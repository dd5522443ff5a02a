"""The conversion tools as a user has them: several files each way, what loads them, what they print and hold.

Not covered: models larger than memory (tools/bench_convert.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_megatron.config import ParallelLayout
from opd_megatron.models.file_digests import Record, digest_of, read_record
from opd_megatron.models.gpt import build_gpt
from opd_megatron.models.weights import WeightSource, load_model, named_global_parameters, open_weights
from opd_megatron.parallel.groups import forget_student_groups, student_groups
from tests.converting import PARTS, SHARDS, TO_HF, TO_MEGATRON, assert_same_weights, convert, converted, flip_a_bit, refused, shards_of, state_of
from tests.hf_loaders import assert_loadable_by_rule
from tests.pool import RankPool
from tests.programs import ROOT
from tests.tiny import write_tiny_model

PAIRS = [("qwen3", False), ("qwen3_moe", True), ("llama3", True), ("gemma2", True), ("phi3", False)]


@pytest.mark.parametrize(("family", "tied"), PAIRS, ids=[family for family, _ in PAIRS])
def test_many_files_each_way_are_bit_equal_and_load_everywhere(tmp_path: Path, family: str, tied: bool) -> None:
    hf, checkpoint, back = (tmp_path / name for name in ("hf", "checkpoint", "back"))
    write_tiny_model(hf, family, tied=tied, vocab_size=263)
    shards_of(hf)
    converted(TO_MEGATRON, hf, checkpoint, *PARTS, "--workers", 3)
    assert len(list(checkpoint.glob("*.distcp"))) >= 3
    converted(TO_HF, checkpoint, back, *SHARDS, "--workers", 3)
    assert len(list(back.glob("*.safetensors"))) >= 3
    assert_same_weights(hf, back)
    assert_loadable_by_rule(back)
    theirs, ours = (AutoModelForCausalLM.from_pretrained(folder, local_files_only=True) for folder in (hf, back))
    assert ours.config.to_dict() == {**theirs.config.to_dict(), "_name_or_path": ours.config.to_dict()["_name_or_path"]}
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert AutoTokenizer.from_pretrained(back).chat_template == AutoTokenizer.from_pretrained(hf).chat_template
    # What is beside the weights travels as it is.
    beside = {file.name for file in hf.iterdir() if "safetensors" not in file.name}
    assert beside >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert all((back / name).read_bytes() == (hf / name).read_bytes() for name in beside)
    for folder in (checkpoint, back):
        record = read_record(folder)
        assert isinstance(record, Record)
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert files == record.files.keys() | {"checksums.json"}
        assert all(digest_of(folder / name, record.algorithm) == entry for name, entry in record.files.items())


def test_one_file_is_named_as_one(sharded_checkpoint: Path, tmp_path: Path) -> None:
    converted(TO_HF, sharded_checkpoint, tmp_path / "back")
    assert_loadable_by_rule(tmp_path / "back")


def test_several_dtypes_lie_where_every_loader_finds_them(tmp_path: Path) -> None:
    """An odd number of 16-bit values before 32-bit ones would put these between their places."""
    hf = write_tiny_model(tmp_path / "hf", vocab_size=263, hidden_size=65, num_hidden_layers=1)
    tensors = {name: tensor.bfloat16() if "norm" in name or "embed" in name else tensor for name, tensor in state_of(hf).items()}
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    converted(TO_MEGATRON, hf, tmp_path / "checkpoint")
    converted(TO_HF, tmp_path / "checkpoint", tmp_path / "back")
    assert_same_weights(hf, tmp_path / "back")


def test_a_checkpoint_knows_where_it_came_from(sharded_folder: Path, sharded_checkpoint: Path) -> None:
    origin = json.loads((sharded_checkpoint / "origin.json").read_text())
    assert origin["made_by"] == "convert_hf_to_megatron"
    assert origin["source"] == str(sharded_folder)
    # Nobody said what these files are: their hash is noted for whoever asks later.
    assert origin["source_digests"] == {file.name: f"crc32:{digest_of(file, 'crc32')[1]}" for file in sorted(sharded_folder.glob("*.safetensors"))}
    assert origin["versions"].keys() == {"megatron-core", "torch", "opd-megatron"}


def _loaded_by_megatron(hf: Path, checkpoint: Path, layout: ParallelLayout) -> bool:
    """Load a checkpoint as Megatron-Core does, and compare with what the folder's own weights make of the model."""
    from megatron.core import dist_checkpointing

    groups = student_groups(layout, seed=1)
    source: WeightSource = open_weights(hf=str(hf))
    models = [build_gpt(source.architecture, groups, precision="fp32", vocab_multiple=16) for _ in range(2)]
    load_model(models[0], groups, source, vocab_multiple=16)
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.collection.dp_cp}
    # Without what a layer of Transformer Engine keeps beside its weights, which a folder has nothing of.
    wanted = {name: entry for name, entry in models[1].last.sharded_state_dict(metadata=metadata).items() if "_extra_state" not in name}
    models[1].last.load_state_dict(dist_checkpointing.load(wanted, str(checkpoint)), strict=False)
    ours, theirs = (dict(named_global_parameters(model, source.architecture)) for model in models)
    forget_student_groups()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("family", "layout", "ranks"),
    [
        ("qwen3", ParallelLayout(), 1),
        ("llama3", ParallelLayout(tensor=2, pipeline=2), 4),
        ("qwen3_moe", ParallelLayout(expert=2, pipeline=2), 4),
        ("qwen3_moe", ParallelLayout(expert=2, tensor=2), 2),
    ],
    ids=["TP1", "TP2xPP2", "EP2xPP2", "EP2xTP2"],
)
def test_megatron_core_loads_a_checkpoint_under_any_layout(pool: RankPool, tmp_path: Path, family: str, layout: ParallelLayout, ranks: int) -> None:
    hf = write_tiny_model(tmp_path / "hf", family, vocab_size=263)
    converted(TO_MEGATRON, hf, tmp_path / "checkpoint", *PARTS)
    assert all(pool.run(_loaded_by_megatron, hf, tmp_path / "checkpoint", layout, world_size=ranks))


def _saved_by_megatron(hf: Path, out: Path, layout: ParallelLayout, homogeneous: bool) -> None:
    """Save a model as Megatron-LM does: layers that are alike stacked in one tensor, nothing of Hugging Face beside them."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    groups = student_groups(layout, seed=1)
    source = open_weights(hf=str(hf))
    model = build_gpt(source.architecture, groups, precision="fp32", vocab_multiple=16)
    load_model(model, groups, source, vocab_multiple=16)
    if dist.get_rank() == 0:
        out.mkdir()
    dist.barrier()
    metadata = {"non_homogeneous_layers": not homogeneous, "dp_cp_group": groups.collection.dp_cp}
    dist_checkpointing.save(model.last.sharded_state_dict(metadata=metadata), str(out))
    forget_student_groups()


@pytest.mark.parametrize("homogeneous", [True, False], ids=["layers stacked", "layers apart"])
@pytest.mark.parametrize(
    ("family", "layout", "ranks"),
    [("qwen3", ParallelLayout(tensor=2, pipeline=2), 4), ("qwen3_moe", ParallelLayout(expert=2, pipeline=2), 4)],
    ids=["TP2xPP2", "EP2xPP2"],
)
def test_a_checkpoint_of_megatron_lm_is_converted(pool: RankPool, tmp_path: Path, family: str, layout: ParallelLayout, ranks: int, homogeneous: bool) -> None:
    hf = write_tiny_model(tmp_path / "hf", family, vocab_size=263)
    pool.run(_saved_by_megatron, hf, tmp_path / "saved", layout, homogeneous, world_size=ranks)
    message = refused(TO_HF, tmp_path / "saved", tmp_path / "back")
    assert "has no huggingface/" in message
    assert "--hf" in message
    assert "no hash is known" in converted(TO_HF, tmp_path / "saved", tmp_path / "back", *SHARDS, "--hf", hf)
    assert_same_weights(hf, tmp_path / "back")
    assert_loadable_by_rule(tmp_path / "back")


def test_a_checkpoint_of_a_run_is_converted(recorded: Path, tmp_path: Path) -> None:
    """It holds an optimizer as well, and is verified by its own checksums."""
    newest = max((recorded / "checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    assert "hash" not in converted(TO_HF, newest, tmp_path / "back")
    assert_same_weights(recorded / "hf", tmp_path / "back")


def test_values_beyond_another_dtype_are_refused(tmp_path: Path) -> None:
    hf = write_tiny_model(tmp_path / "hf", num_hidden_layers=1)
    tensors = state_of(hf)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    converted(TO_MEGATRON, hf, tmp_path / "checkpoint")
    message = refused(TO_HF, tmp_path / "checkpoint", tmp_path / "back", "--dtype", "float16")
    assert "mlp.linear_fc1.weight holds values beyond what float16 holds" in message
    converted(TO_HF, tmp_path / "checkpoint", tmp_path / "back", "--dtype", "bfloat16")


def test_memory_follows_the_largest_tensor_and_not_the_model(tmp_path: Path) -> None:
    """A model of 540 MB, whose largest tensor has 32: what is stated holds without the half gibibyte for others beside it."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    hf = write_tiny_model(tmp_path / "hf", vocab_size=263, num_hidden_layers=8, **sizes)
    model_bytes = (hf / "model.safetensors").stat().st_size
    words = [str(tmp_path / name) for name in ("hf", "checkpoint", "back")]
    done = subprocess.run([sys.executable, "-m", "tests.measured_conversion", *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for measured in json.loads(done.stdout.splitlines()[-1]):
        assert measured["grown_bytes"] < measured["bound_bytes"] < model_bytes, done.stdout


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_dry_run_prints_the_mapping_and_writes_nothing(tmp_path: Path, family: str) -> None:
    hf = write_tiny_model(tmp_path / "hf", family, vocab_size=263, num_hidden_layers=1)
    # Values are not read.
    flip_a_bit(hf / "model.safetensors")
    done = convert(TO_MEGATRON, hf, tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    embedding = "embedding.word_embeddings.weight  [263, 64] float32 = model.embed_tokens.weight [263, 64]"
    assert lines[0] == f"{embedding}  (split over tensor ranks in dimension 0; padded for them)"
    fused = next(line for line in lines if "linear_qkv.weight" in line)
    assert fused.startswith("decoder.layers.0.self_attention.linear_qkv.weight  [192, 64] float32 = model.layers.0.self_attn.q_proj.weight [96, 64] + ")
    assert "in each key-value group; split over tensor ranks in dimension 0" in fused
    if family == "qwen3_moe":
        assert any(line.startswith("decoder.layers.0.mlp.experts.experts.linear_fc1.weight[7]  [96, 64]") and "expert-tensor ranks" in line for line in lines)
    needed = sum(tensor.nbytes for tensor in state_of(hf).values())
    assert f" of {needed:,} bytes; memory: at most " in lines[-1]
    converted(TO_MEGATRON, hf, tmp_path / "checkpoint", "--no-verify")
    back = convert(TO_HF, tmp_path / "checkpoint", tmp_path / "out", "--dry-run", "--dtype", "bfloat16")
    assert f" of {needed // 2:,} bytes; memory: at most " in back.stdout.splitlines()[-1]
    assert not list(tmp_path.glob("out*"))
