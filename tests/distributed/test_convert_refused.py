"""What conversion tools refuse, and that nothing is lost by it: damaged sources, wrong input, small disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_megatron.conversion.hashed_file import HashedFile
from opd_megatron.conversion.to_megatron import write_checkpoint
from opd_megatron.models.file_digests import digest_of
from opd_megatron.models.weights import open_weights
from tests.converting import EACH_DIRECTION, PARTS, SHARDS, TO_HF, TO_MEGATRON, converted, flip_a_bit, refused, state_of
from tests.disks import file_system
from tests.model_configs import edit_json
from tests.programs import ROOT


def _by_list(hf: Path, shard: Path) -> tuple[object, ...]:
    file = hf.parent / "SHA256SUMS"
    file.write_text(subprocess.run(["sha256sum", *hf.glob("*.safetensors")], check=True, capture_output=True, text=True).stdout)
    return ("--sha256", file)


def _by_checksums(hf: Path, shard: Path) -> tuple[object, ...]:
    files = {file.name: digest_of(file, "blake2b") for file in hf.glob("*.safetensors")}
    (hf / "checksums.json").write_text(json.dumps({"algorithm": "blake2b", "files": files}))
    return ()


def _by_download(hf: Path, shard: Path) -> tuple[object, ...]:
    folder = hf / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    for file in hf.glob("*.safetensors"):
        (folder / f"{file.name}.metadata").write_text(f"0123456789012345678901234567890123456789\n{digest_of(file, 'sha256')[1]}\n1700000000.0\n")
    # Of small files the hub gives git's own hash.
    (folder / "config.json.metadata").write_text("0123456789012345678901234567890123456789\n0123456789012345678901234567890123456789\n1700000000.0\n")
    return ()


def _by_cache(hf: Path, shard: Path) -> tuple[object, ...]:
    blobs = hf.parent / "blobs"
    blobs.mkdir()
    for file in hf.glob("*.safetensors"):
        blob = blobs / digest_of(file, "sha256")[1]
        file.rename(blob)
        file.symlink_to(Path("..") / "blobs" / blob.name)
    return ()


@pytest.mark.parametrize("known_by", [_by_list, _by_checksums, _by_download, _by_cache])
def test_a_flipped_bit_in_a_shard_is_noticed(hf: Path, tmp_path: Path, known_by: Callable[[Path, Path], tuple[object, ...]]) -> None:
    shard, out = hf / "model-00002-of-00003.safetensors", tmp_path / "out"
    words = known_by(hf, shard)
    said = converted(TO_MEGATRON, hf, out, *words)
    assert "no hash is known" not in said
    shutil.rmtree(out)
    flip_a_bit(shard)
    message = refused(TO_MEGATRON, hf, out, *words, *PARTS)
    assert f"{shard} has other bytes than were written" in message
    assert not list(tmp_path.glob("out*"))
    # Who does not want to know.
    if known_by is not _by_list:
        converted(TO_MEGATRON, hf, out, "--no-verify")


def test_a_source_of_which_nothing_is_known_is_converted_with_a_word(hf: Path, tmp_path: Path) -> None:
    said = converted(TO_MEGATRON, hf, tmp_path / "out")
    assert said.splitlines()[0] == f"no hash is known of any file of {hf}: a damaged one may go unnoticed"


@pytest.mark.parametrize("name", ["{weights}", "huggingface/tokenizer.json", ".metadata"])
def test_a_flipped_bit_in_a_checkpoint_is_noticed(checkpoint: Path, tmp_path: Path, name: str) -> None:
    file = checkpoint / name.format(weights=sorted(path.name for path in checkpoint.glob("*.distcp"))[1])
    # In the index, a digit of the version: it is sharded_folder, and says something else.
    flip_a_bit(file, file.read_bytes().index(b"1.0.0") if name == ".metadata" else file.stat().st_size // 2)
    message = refused(TO_HF, checkpoint, tmp_path / "out", *SHARDS)
    assert f"{file} has other bytes than were written" in message
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [("not a line\n", "line 1: not a line of sha256sum"), ("0" * 64 + "  other.safetensors\n", "names none of the files"), (None, "cannot be read")],
    ids=["no list", "of another model", "missing"],
)
def test_a_list_of_hashes_that_says_nothing_is_refused(sharded_folder: Path, tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "sums").write_text(content)
    assert message in refused(TO_MEGATRON, sharded_folder, tmp_path / "out", "--sha256", tmp_path / "sums")


def _with(hf: Path, change: Callable[[dict[str, torch.Tensor]], Any], shard: int = 2) -> None:
    """Change the tensors of one shard; the index promises what is there then."""
    file = hf / f"model-0000{shard}-of-00003.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {name: holder for name, holder in index.items() if holder != file.name}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**kept, **dict.fromkeys(tensors, file.name)}}))


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]


def test_a_wrong_missing_or_unknown_tensor_names_itself(sharded_folder: Path, tmp_path: Path) -> None:
    name = _first(load_file(sharded_folder / "model-00002-of-00003.safetensors"))

    def after(case: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> tuple[Path, str]:
        hf = Path(shutil.copytree(sharded_folder, tmp_path / case))
        _with(hf, change)
        return hf, refused(TO_MEGATRON, hf, tmp_path / "out")

    hf, message = after("cut", lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    assert f"{hf / 'model-00002-of-00003.safetensors'}: {name} has shape" in message
    assert "where config.json implies" in message
    hf, message = after("missing", lambda tensors: tensors.pop(name))
    assert f"1 tensors of a qwen3 model are missing, first {name!r}" in message
    hf, message = after("unknown", lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    assert "first 'model.extra.weight' in model-00002-of-00003.safetensors" in message
    hf, message = after("quantized", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"stores {name!r} as I8, and only unquantized weights are supported" in message
    assert not list(tmp_path.glob("out*"))


def test_an_index_that_lists_missing_files_names_them(hf: Path, tmp_path: Path) -> None:
    (hf / "model-00003-of-00003.safetensors").unlink()
    assert f"{hf / 'model-00003-of-00003.safetensors'} is missing" in refused(TO_MEGATRON, hf, tmp_path / "out")
    index = hf / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    name = _first(names)
    index.write_text(json.dumps({"weight_map": {**names, name: "../hf/model-00001-of-00003.safetensors"}}))
    assert f"puts {name!r} into '../hf/model-00001-of-00003.safetensors', which is no file of its folder" in refused(TO_MEGATRON, hf, tmp_path / "out")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._proof}",)


def _pickled(hf: Path, *, in_files: bool) -> dict[str, torch.Tensor]:
    tensors = state_of(hf)
    for file in [*hf.glob("*.safetensors"), hf / "model.safetensors.index.json"]:
        file.unlink()
    if not in_files:
        torch.save(tensors, hf / "pytorch_model.bin")
        return tensors
    index = {}
    for number in (1, 2):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        part = {name: tensors[name] for name in list(tensors)[number - 1 :: 2]}
        torch.save(part, hf / file)
        index |= dict.fromkeys(part, file)
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return tensors


@pytest.mark.parametrize("in_files", [False, True], ids=["one file", "two files"])
def test_pickles_are_read_only_if_asked_for(hf: Path, tmp_path: Path, in_files: bool) -> None:
    tensors = _pickled(hf, in_files=in_files)
    message = refused(TO_MEGATRON, hf, tmp_path / "checkpoint")
    assert "in pickles" in message
    assert "--allow-pickle" in message
    converted(TO_MEGATRON, hf, tmp_path / "checkpoint", "--allow-pickle", *PARTS)
    converted(TO_HF, tmp_path / "checkpoint", tmp_path / "back")
    back = state_of(tmp_path / "back")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_pickle_with_code_in_it_is_refused(hf: Path, tmp_path: Path) -> None:
    tensors = _pickled(hf, in_files=False)
    torch.save({**tensors, "evil": Evil(tmp_path / "proof")}, hf / "pytorch_model.bin")
    message = refused(TO_MEGATRON, hf, tmp_path / "out", "--allow-pickle")
    assert "pytorch_model.bin cannot be read as tensors alone: it asks for" in message
    assert "weights_only" not in message
    assert not (tmp_path / "proof").exists()


def test_safetensors_are_read_where_pickles_lie_beside_them(hf: Path, tmp_path: Path) -> None:
    torch.save({"evil": Evil(tmp_path / "proof")}, hf / "pytorch_model.bin")
    converted(TO_MEGATRON, hf, tmp_path / "out", "--allow-pickle")
    assert not (tmp_path / "proof").exists()


@EACH_DIRECTION
def test_what_is_in_the_way_is_left_alone(
    request: pytest.FixtureRequest, tmp_path: Path, tool: str, source: str, sizes: tuple[object, ...], pattern: str
) -> None:
    folder, out, partial = request.getfixturevalue(source), tmp_path / "out", tmp_path / "out.partial"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert f"{out} exists" in refused(tool, folder, out)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    (out / "precious.txt").unlink()
    partial.mkdir()
    (partial / "precious.txt").write_text("mine")
    assert f"{partial} exists and is no unfinished conversion" in refused(tool, folder, out)
    assert [path.name for path in partial.iterdir()] == ["precious.txt"]
    shutil.rmtree(partial)
    # An empty folder is in nobody's way.
    converted(tool, folder, out)
    assert list(out.glob(pattern))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    with file_system(tmp_path / "disk", "1m") as folder:
        yield folder


@EACH_DIRECTION
def test_a_disk_that_is_too_small_is_refused_first(
    request: pytest.FixtureRequest, small_disk: Path, tool: str, source: str, sizes: tuple[object, ...], pattern: str
) -> None:
    message = refused(tool, request.getfixturevalue(source), small_disk / "out")
    assert "needs about" in message
    assert "are free on its disk" in message
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("words", [("--workers", 0), ("--max-part-gb", 0), ("--sha256", "x", "--no-verify"), ("--max-part-gb", "nan")])
def test_options_that_make_no_sense_are_refused(sharded_folder: Path, tmp_path: Path, words: tuple[object, ...]) -> None:
    assert str(words[0]) in refused(TO_MEGATRON, sharded_folder, tmp_path / "out", *words)


def test_a_head_that_is_not_the_embedding_is_not_left_out(hf: Path, tmp_path: Path) -> None:
    """A configuration that ties the two is wrong where the file has another head, which transformers would use."""
    edit_json(hf / "config.json", tie_word_embeddings=True)
    assert "config.json ties the head to the embedding, and lm_head.weight has other values" in refused(TO_MEGATRON, hf, tmp_path / "out")
    embedding = state_of(hf)["model.embed_tokens.weight"]
    for shard in sorted(hf.glob("*.safetensors")):
        tensors = load_file(shard)
        save_file({name: embedding.clone() if name == "lm_head.weight" else one for name, one in tensors.items()}, shard, metadata={"format": "pt"})
    converted(TO_MEGATRON, hf, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "unknown"),
    [
        ({"num_hidden_layers": 2, "layer_types": None}, "decoder.layers.2."),
        ({"tie_word_embeddings": True}, "output_layer.weight"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "decoder.layers.0.self_attention.k_layernorm.weight"),
    ],
    ids=["fewer layers", "a tied head", "a family without norms of queries"],
)
def test_a_configuration_that_leaves_weights_out_is_refused(checkpoint: Path, tmp_path: Path, changes: dict[str, Any], unknown: str) -> None:
    config = shutil.copytree(checkpoint / "huggingface", tmp_path / "config")
    edit_json(config / "config.json", **changes)
    message = refused(TO_HF, checkpoint, tmp_path / "out", "--hf", config)
    assert "have no place in the model of" in message
    assert unknown in message


def test_two_files_that_could_be_the_model_are_refused(hf: Path, tmp_path: Path) -> None:
    shard = sorted(hf.glob("*.safetensors"))[0]
    shutil.copy(shard, hf / "model.safetensors")
    assert "has both model.safetensors and model.safetensors.index.json" in refused(TO_MEGATRON, hf, tmp_path / "out")


@pytest.mark.parametrize("is_named", [True, False], ids=["named elsewhere", "not named"])
def test_a_tensor_that_the_index_does_not_put_there_is_refused(hf: Path, tmp_path: Path, is_named: bool) -> None:
    first, second, *_ = sorted(hf.glob("*.safetensors"))
    name = next(iter(load_file(first))) if is_named else "rogue.weight"
    save_file({**load_file(second), name: torch.zeros(3)}, second, metadata={"format": "pt"})
    message = refused(TO_MEGATRON, hf, tmp_path / "out")
    assert f"{second.name} holds {name!r}, and the index {f'puts it into {first.name}' if is_named else 'does not name it'}" in message


def test_tensors_that_overlap_are_refused(hf: Path, tmp_path: Path) -> None:
    shard = sorted(hf.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    same = [name for name, entry in header.items() if entry.get("shape") == [64]]
    header[same[1]]["data_offsets"] = header[same[0]]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    shard.write_bytes(content[:8] + text.ljust(length) + content[8 + length :])
    assert "tensors overlap" in refused(TO_MEGATRON, hf, tmp_path / "out")


def test_values_that_are_not_finite_are_refused_before_they_train(hf: Path, tmp_path: Path) -> None:
    _with(hf, lambda tensors: tensors[_first(tensors)].view(-1)[3:5].fill_(torch.nan))
    assert "holds 2 values that are not finite" in refused(TO_MEGATRON, hf, tmp_path / "out")


@pytest.mark.parametrize("name", ["huggingface/tokenizer.json", "__0_1.distcp", "origin.json"])
def test_a_missing_file_of_a_checkpoint_is_named(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / name).unlink()
    assert f"{name} is missing" in refused(TO_HF, checkpoint, tmp_path / "out")


def test_a_damaged_index_of_a_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """Wherever the bit is: some leave a pickle that can be read, whose words are others."""
    index = checkpoint / ".metadata"
    whole = index.read_bytes()
    for place in range(40, len(whole), max(1, len(whole) // 12)):
        index.write_bytes(whole)
        flip_a_bit(index, place)
        message = refused(TO_HF, checkpoint, tmp_path / "out")
        assert any(words in message for words in (".metadata", "another model's checkpoint", "is damaged")), message


@pytest.mark.parametrize("target", ["empty", "nowhere"])
def test_a_link_is_no_folder_to_write(sharded_folder: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    assert "out is a link; name the folder itself" in refused(TO_MEGATRON, sharded_folder, tmp_path / "out")


def test_paths_that_are_none_are_refused(sharded_folder: Path, hf: Path, tmp_path: Path) -> None:
    assert "/ is no folder that can be made" in refused(TO_MEGATRON, sharded_folder, Path("/"))
    assert "File name too long" in refused(TO_MEGATRON, Path("/tmp/" + "a" * 300), tmp_path / "out")
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = ".."
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "puts 'model.norm.weight' into '..', which is no file of its folder" in refused(TO_MEGATRON, hf, tmp_path / "out")


def test_a_disk_that_fills_up_on_the_way_is_said(sharded_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes an error of its own of a write that the disk refuses."""

    def write(self: HashedFile, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HashedFile, "_write", write)
    with pytest.raises(ValueError, match=r"cannot be written: .*No space left on device"):
        write_checkpoint(open_weights(hf=str(sharded_folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_reads_a_dry_run_may_stop(sharded_folder: Path) -> None:
    command = f"{sys.executable} tools/convert_hf_to_megatron.py --hf {sharded_folder} --out /nowhere --dry-run | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
