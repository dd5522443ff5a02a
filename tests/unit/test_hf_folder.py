"""A Hugging Face folder is accepted whole, in one file or in shards, or refused by the name of the file that is missing, cut or altered.

Not covered: what config.json may say (test_architecture.py), which tensors a model needs (test_weights.py), checkpoints of this project.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_megatron.models.hf_folder import copy_assets, open_hf_folder, read_architecture, stop_token_ids
from opd_megatron.models.weight_map import weight_map
from opd_megatron.models.weights import open_weights
from tests.model_configs import edit_json, refusal


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


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")], ids=lambda value: str(value))
def test_quantized_weights_are_refused_also_without_a_quantization_config(folder: Path, dtype: torch.dtype, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(open_hf_folder, folder)
    assert f"{folder / 'model.safetensors'} stores 'model.layers.1.mlp.up_proj.weight' as {name}, and only unquantized weights are supported" in message


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
