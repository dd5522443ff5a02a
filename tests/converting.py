"""What the tests of the conversion tools share: running them, and folders of several files to run them on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.programs import run_program

TO_MEGATRON, TO_HF = "tools.convert_hf_to_megatron", "tools.convert_megatron_to_hf"
# Some files of the tiny models.
PARTS, SHARDS = ("--max-part-gb", 0.0002), ("--max-shard-gb", 0.0002)
# Tool, the fixture that it converts, the sizes of files that it is given, what they are called.
DIRECTIONS = [(TO_MEGATRON, "sharded_folder", PARTS, "*.distcp"), (TO_HF, "sharded_checkpoint", SHARDS, "*.safetensors")]
EACH_DIRECTION = pytest.mark.parametrize(("tool", "source", "sizes", "pattern"), DIRECTIONS, ids=["to Megatron", "to HF"])


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = state_of(one), state_of(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def convert(tool: str, source: Path, out: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return run_program(tool, "--hf" if tool == TO_MEGATRON else "--checkpoint", source, "--out", out, *words)


def converted(tool: str, source: Path, out: Path, *words: object) -> str:
    """Convert; return what was said on the way."""
    done = convert(tool, source, out, *words)
    assert done.returncode == 0, done.stderr
    return done.stderr


def as_checkpoint(folder: Path, checkpoint: Path) -> Path:
    """Convert a folder, and return the checkpoint."""
    converted(TO_MEGATRON, folder, checkpoint)
    return checkpoint


def refused(tool: str, source: Path, out: Path, *words: object) -> str:
    """Return the last line of a refusal that left nothing."""
    done = convert(tool, source, out, *words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def interrupted(tool: str, signal: str, files: int, *words: object) -> subprocess.CompletedProcess[str]:
    return run_program("tests.interrupted_conversion", tool, signal, files, *words)


def flip_a_bit(file: Path, place: int = -5) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 16
    file.write_bytes(content)


def shards_of(folder: Path, number: int = 3) -> list[Path]:
    """Divide a folder's only file of weights."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = list(tensors), {}
    for shard in range(1, number + 1):
        file = f"model-{shard:05d}-of-{number:05d}.safetensors"
        save_file({name: tensors[name] for name in names[shard - 1 :: number]}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names[shard - 1 :: number], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sorted(folder.glob("*.safetensors"))
