"""tools/inspect_checkpoint.py: what it says of every kind of checkpoint, one checksum for the same weights, and what it refuses.

Not covered: checkpoints of other programs, but for one without what ours carry beside the weights.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opd_megatron.config import RunConfig
from tests.converting import as_checkpoint
from tests.pool import RankPool
from tests.programs import ROOT, run_program
from tests.runs import run_job, small_config
from tests.tiny import write_tiny_model

TINY_STUDENT = ROOT / "recipes" / "assets" / "tiny_student"


def _inspect(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_program("tools.inspect_checkpoint", folder, *options)


def _facts(folder: Path, *options: str) -> dict[str, Any]:
    done = _inspect(folder, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_checkpoint(TINY_STUDENT, tmp_path_factory.mktemp("converted") / "checkpoint")


@pytest.fixture(scope="module")
def run(models: Path, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step in bf16 whose vocabulary is padded, over four ranks."""
    config: RunConfig = small_config(models, tensor=2, pipeline=2)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1, precision="bf16"))
    folder = tmp_path_factory.mktemp("runs") / "run"
    pool.run(run_job, config, folder, world_size=4)
    return folder


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen3_moe", False), ("llama3", False)])
def test_a_folder_its_checkpoint_and_its_export_have_one_checksum(tmp_path: Path, family: str, tied: bool) -> None:
    folder = write_tiny_model(tmp_path / "hf", family, tied=tied, vocab_size=263)
    checkpoint = as_checkpoint(folder, tmp_path / "checkpoint")
    assert run_program("tools.convert_megatron_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "back").returncode == 0
    # Other files, an index, and another order of tensors in them.
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    facts = [_facts(path, "--checksum") for path in (folder, checkpoint, tmp_path / "back", tmp_path / "shards")]
    assert len({one["weights_sha256"] for one in facts}) == 1
    assert len(facts[0]["weights_sha256"]) == 64
    assert [one["kind"] for one in facts] == ["hugging_face", "converted", "hugging_face", "hugging_face"]
    assert len({json.dumps(one["architecture"]) for one in facts}) == 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {one["parameters"] for one in facts} == {sum(parameter.numel() for parameter in model.parameters())}


def test_the_checksum_changes_with_one_bit_and_with_the_dtype(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "hf", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    checksums = [_facts(folder, "--checksum")["weights_sha256"]]
    tensors["model.norm.weight"].view(torch.int32)[5] ^= 1
    for changed in (tensors, {name: tensor.bfloat16() for name, tensor in tensors.items()}):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        checksums.append(_facts(folder, "--checksum")["weights_sha256"])
    assert len(set(checksums)) == 3


def test_a_run_is_its_newest_checkpoint_with_step_layout_and_optimizer(run: Path, tmp_path: Path) -> None:
    facts = _facts(run, "--checksum", "--tensors")
    assert facts == _facts(run / "checkpoints" / "step_1", "--checksum", "--tensors")
    told = {name: facts[name] for name in ("kind", "step", "made_by", "layout", "world_size", "files_verified")}
    assert told == {"kind": "training", "step": 1, "made_by": "training", "layout": "TP2xPP2", "world_size": 4, "files_verified": True}
    assert set(facts["versions"]) == {"opd-megatron", "megatron-core", "torch", "transformers"}
    assert (facts["weights"]["dtypes"], facts["optimizer"]["dtypes"]) == ({"bfloat16": 34}, {"float32": 3 * 34})
    assert facts["weights_sha256"] == _facts(run / "hf", "--checksum")["weights_sha256"]
    embedding = next(tensor for tensor in facts["stored_tensors"] if tensor["name"] == "embedding.word_embeddings.weight")
    # Padded to a multiple of 4 * 2; and the checksum above is of the 263 rows of the model.
    assert (embedding["shape"], embedding["dtype"]) == ([264, 64], "bfloat16")
    assert embedding["files"]
    assert all((run / "checkpoints" / "step_1" / file).is_file() for file in embedding["files"])
    # As an older version left it.
    older = shutil.copytree(run / "checkpoints" / "step_1", tmp_path / "older")
    for name in ("origin.json", "checksums.json"):
        (older / name).unlink()
    text = _inspect(older, "--checksum").stdout
    lines = dict(line.split("  ", 1) for line in text.splitlines() if not line.startswith(" "))
    assert all(lines[name].strip() == "not recorded" for name in ("made by", "layout", "checksums")), text
    assert facts["weights_sha256"] in text


def test_the_text_says_what_the_model_is_and_lists_tensors(checkpoint: Path) -> None:
    done = _inspect(checkpoint, "--tensors")
    assert done.returncode == 0, done.stderr
    for words in ("Megatron checkpoint", "family=qwen3 num_layers=2 hidden_size=96", "tied=true", "228,480", "optimizer     no", "theta=10000.0"):
        assert words in done.stdout
    assert "\ndecoder.layers.1.mlp.linear_fc2.weight  [96, 256]  float32  __0_" in done.stdout


def _rename_architecture(config: Path) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["MambaForCausalLM"]}))


@pytest.mark.parametrize("what", ["folder", "checkpoint"])
def test_of_an_unknown_architecture_it_tells_what_it_can_and_refuses(checkpoint: Path, tmp_path: Path, what: str) -> None:
    copy = shutil.copytree(TINY_STUDENT if what == "folder" else checkpoint, tmp_path / "copy")
    _rename_architecture(copy / "config.json" if what == "folder" else copy / "huggingface" / "config.json")
    # What a conversion wrote down of its files does not fit what was made of them here.
    (copy / "checksums.json").unlink(missing_ok=True)
    done = _inspect(copy, "--checksum")
    assert done.returncode == 2
    assert "architecture 'MambaForCausalLM' is not supported" in done.stderr.splitlines()[-1]
    assert "228,480 as stored" in done.stdout
    assert f"{24 if what == 'folder' else 18} tensors: {24 if what == 'folder' else 18} float32" in done.stdout
    record = json.loads(_inspect(copy, "--json").stdout)
    assert (record["supported"], record["architecture"]) == (False, None)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# Of a folder, of a converted checkpoint, of a run's: how it is damaged, and what is said.
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an empty folder": ("folder", lambda path: [file.unlink() for file in path.iterdir()], "is not a checkpoint"),
    "no folder": ("folder", shutil.rmtree, "is not a folder"),
    "a cut shard": ("folder", lambda path: _cut(path / "model.safetensors"), "where its header promises"),
    "no weights": ("folder", lambda path: (path / "model.safetensors").unlink(), "no safetensors files"),
    "an index of nothing": ("folder", lambda path: (path / "model.safetensors.index.json").write_text("{}"), "names no tensors"),
    "an index of what is not there": (
        *("folder", lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')),
        "promises 'x'",
    ),
    "a config that is no JSON": ("folder", lambda path: _cut(path / "config.json"), "config.json is not valid JSON"),
    "no index": ("checkpoint", lambda path: (path / ".metadata").unlink(), "no whole Megatron checkpoint"),
    "a damaged index": ("checkpoint", lambda path: _cut(path / ".metadata"), ".metadata is damaged"),
    "a cut file": ("checkpoint", lambda path: _cut(next(path.glob("*.distcp"))), "is cut"),
    "a missing file": ("checkpoint", lambda path: next(path.glob("*.distcp")).unlink(), "is missing"),
    "no architecture": (
        *("checkpoint", lambda path: (shutil.rmtree(path / "huggingface"), (path / "checksums.json").unlink())),
        "does not know its architecture",
    ),
    "no file that was written down": ("checkpoint", lambda path: (path / "huggingface" / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "another bit": ("step", lambda path: _flip_a_bit(next(path.glob("*.distcp"))), "has other bytes than were written"),
    "checksums that are no JSON": ("step", lambda path: _cut(path / "checksums.json"), "is damaged: checksums.json cannot be read"),
    "an origin that is no JSON": ("step", lambda path: _cut(path / "origin.json"), "origin.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_exits_2_and_is_named(checkpoint: Path, run: Path, tmp_path: Path, name: str) -> None:
    what, damage, message = DAMAGES[name]
    copy = shutil.copytree({"folder": TINY_STUDENT, "checkpoint": checkpoint, "step": run / "checkpoints" / "step_1"}[what], tmp_path / "copy")
    damage(copy)
    done = _inspect(copy, "--checksum")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status").write_text("running\n")
    done = _inspect(tmp_path / "run")
    assert done.returncode == 2
    assert "is a run without checkpoints" in done.stderr
