"""Weights are read from a folder that holds what the model needs and nothing unknown, and exported bit for bit or not at all.

Not covered: distributed checkpoints (tests/distributed/test_conversion.py), damaged files (test_hf_folder.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opd_megatron.conversion.hashed_file import HashedFile
from opd_megatron.conversion.to_hf import export_hf
from opd_megatron.models.weight_map import weight_map
from opd_megatron.models.weight_slices import to_hf
from opd_megatron.models.weights import open_weights
from tests.model_configs import edit_json, refusal
from tests.tiny import write_tiny_model


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
    """What is read is what the folder held without them, bit for bit; a name that only resembles theirs is unknown."""
    tensors = load_file(folder / "model.safetensors")
    buffers = {f"model.{place}rotary_emb.inv_freq": torch.ones(12) for place in ("", "layers.0.self_attn.", "layers.1.self_attn.")}
    save_file({**tensors, **buffers}, folder / "model.safetensors")
    source = open_weights(hf=str(folder))
    read = {name: part for row in weight_map(source.architecture) for name, part in to_hf(row, source.read(row), source.architecture).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq.weight", "model.layers.0.self_attn.rotary_emb.original_inv_freq"):
        save_file({**tensors, **buffers, name: torch.ones(12)}, folder / "model.safetensors")
        assert f"1 tensors are unknown to a qwen3 model, first '{name}'" in refusal(lambda: open_weights(hf=str(folder)))


def _store_in_several_dtypes(folder: Path) -> dict[str, torch.Tensor]:
    """Keep some of a folder's tensors in 16 bits; return all as they are then."""
    shorter = {"k_proj": torch.bfloat16, "up_proj": torch.float16, "experts.3.": torch.bfloat16, "experts.2.down": torch.float16, "norm": torch.bfloat16}
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(next((dtype for part, dtype in shorter.items() if part in name), torch.float32))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"):
        # With the key projection in bf16: two dtypes in one tensor, neither of which holds the values of the other.
        tensors[name] = tensors[name].half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_folder_of_several_dtypes_is_read_without_a_loss(tmp_path: Path, family: str) -> None:
    folder = write_tiny_model(tmp_path / "hf", family, num_hidden_layers=2)
    tensors = _store_in_several_dtypes(folder)
    assert len({tensor.dtype for tensor in tensors.values()}) == 3
    source = open_weights(hf=str(folder))
    rows = weight_map(source.architecture)
    # A distributed checkpoint has one dtype for a tensor, whichever of its parts come from where.
    dtypes: dict[str, set[torch.dtype]] = {}
    for row in rows:
        tensor = source.read(row)
        dtypes.setdefault(row.megatron, set()).add(tensor.dtype)
        for name, part in to_hf(row, tensor, source.architecture).items():
            assert torch.equal(part.double(), tensors[name].double()), name
    assert all(len(of_one) == 1 for of_one in dtypes.values())
    # What is alone in its tensor keeps its dtype; bf16 and fp16 together need fp32.
    assert dtypes["decoder.final_layernorm.weight"] == {torch.bfloat16}
    assert dtypes["decoder.layers.0.self_attention.linear_qkv.weight"] == {torch.float32}


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
def test_an_export_in_shards_is_bit_equal_and_loads_in_transformers(tmp_path: Path, family: str, shard_bytes: int) -> None:
    folder = write_tiny_model(tmp_path / "hf", family, vocab_size=263, num_hidden_layers=2)
    export_hf(open_weights(hf=str(folder)), tmp_path / "out", max_shard_bytes=shard_bytes)
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


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    broken = write_tiny_model(tmp_path / "broken", num_hidden_layers=1)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"mlp\.linear_fc2\.weight \(\S+\) holds 1 values that are not finite"):
        export_hf(open_weights(hf=str(broken)), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_export_that_breaks_off_leaves_no_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    source = open_weights(hf=str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", disk_full)
        with pytest.raises(ValueError, match="out cannot be written: no space left"):
            export_hf(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    export_hf(source, tmp_path / "out")
    open_weights(hf=str(tmp_path / "out"))
