"""tools/compare_logits.py: no difference where there is none, and the first part of a model that differs, on one rank and where its layers lie on several.

Not covered: GPUs, and families that scale their embedding or cap their logits.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.converting import as_checkpoint
from tests.programs import ROOT, run_program
from tests.tiny import write_tiny_model


def _compare(hf: Path, checkpoint: Path, *options: object, ranks: int = 1) -> tuple[int, dict[str, Any], str]:
    """Return the exit code, the last line's object, and everything printed."""
    done = run_program("tools.compare_logits", "--hf", hf, "--checkpoint", checkpoint, *options, ranks=ranks)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied mixture of experts: a Hugging Face folder `hf`, and `checkpoint`."""
    folder = tmp_path_factory.mktemp("mixture")
    as_checkpoint(write_tiny_model(folder / "hf", "qwen3_moe", vocab_size=263), folder / "checkpoint")
    return folder


NAMES = ["embedding", *(f"layers.{layer}" for layer in range(4)), "norm", "logits"]


@pytest.mark.parametrize(
    ("family", "tied", "options", "ranks"),
    [
        ("qwen2", True, (), 1),
        ("llama3", False, ("--tensor", 2, "--pipeline", 2), 4),
        ("qwen3", True, ("--pipeline", 2), 4),
    ],
    ids=["qwen2", "llama3, TP2xPP2", "qwen3, PP2, two replicas"],
)
def test_every_part_of_the_same_model_is_compared_and_equal(tmp_path: Path, family: str, tied: bool, options: tuple[object, ...], ranks: int) -> None:
    folder = write_tiny_model(tmp_path / "hf", family, tied=tied, vocab_size=263)
    code, record, text = _compare(folder, as_checkpoint(folder, tmp_path / "checkpoint"), *options, ranks=ranks)
    assert (code, record["equal"], record["first_difference"]) == (0, True, None)
    assert list(record["parts"]) == NAMES
    # fp32 sums in another order over 64 to 96 terms; measured 1e-6.
    assert max(part["relative"] for part in record["parts"].values()) < 1e-5
    assert "parts here" not in text


@pytest.mark.parametrize(("options", "ranks"), [(("--expert", 2), 2), (("--tensor", 2, "--expert", 2, "--expert-tensor", 2), 4)], ids=["EP2", "TP2, EP2xETP2"])
def test_so_is_a_mixture_of_experts(mixture: Path, options: tuple[object, ...], ranks: int) -> None:
    code, record, _ = _compare(mixture / "hf", mixture / "checkpoint", *options, ranks=ranks)
    assert (code, record["first_difference"], list(record["parts"])) == (0, None, NAMES)
    assert max(part["relative"] for part in record["parts"].values()) < 1e-5


@pytest.mark.parametrize(("options", "ranks"), [((), 1), (("--pipeline", 4), 4)], ids=["one rank", "a layer on each rank"])
@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.2.self_attn.k_proj.weight", "layers.2"),
        ("model.layers.2.mlp.experts.5.down_proj.weight", "layers.2"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "logits"),
    ],
)
def test_the_first_part_that_differs_is_named(mixture: Path, tmp_path: Path, tensor: str, part: str, options: tuple[object, ...], ranks: int) -> None:
    changed = shutil.copytree(mixture / "hf", tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors[tensor] = tensors[tensor] * 1.1 + 0.1 * torch.randn(tensors[tensor].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    code, record, text = _compare(changed, mixture / "checkpoint", *options, ranks=ranks)
    assert (code, record["equal"], record["first_difference"]) == (1, False, part)
    (marked,) = (line for line in text.splitlines() if "parts here" in line)
    assert marked.startswith(f"{part} ")


def test_in_bf16_the_tolerance_is_relative_to_the_logits(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "hf", "llama", vocab_size=263)
    checkpoint = as_checkpoint(folder, tmp_path / "checkpoint")
    code, record, _ = _compare(folder, checkpoint, "--precision", "bf16")
    assert (code, record["tolerance_kind"], record["first_difference"]) == (0, "relative", None)
    # bf16 keeps 8 bits of a number; what is measured is in the tool's docstring.
    assert 1e-4 < record["relative_difference"] < 0.05
    code, strict, _ = _compare(folder, checkpoint, "--precision", "bf16", "--tolerance", record["relative_difference"] / 2)
    assert (code, strict["first_difference"], strict["relative_difference"]) == (1, "logits", record["relative_difference"])


@pytest.mark.slow
def test_started_by_torchrun_on_the_texts_of_a_file(mixture: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("One text.\n\nAnother: naïve 日本語\n", encoding="utf-8")
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "tools/compare_logits.py", "--pipeline", "2"]
    words = [*command, "--hf", str(mixture / "hf"), "--checkpoint", str(mixture / "checkpoint"), "--text-file", str(tmp_path / "texts")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("  ")[1] for line in lines[:2]] == ["'One text.'", "'Another: naïve 日本語'"]
    assert json.loads(lines[-1])["first_difference"] is None


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("\n \n", "has no text"), ("word " * 300, "and the model has positions for 1 to 256")]
)
def test_texts_that_cannot_be_compared_are_refused(mixture: Path, tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "texts").write_text(content)
    words = ("--hf", mixture / "hf", "--checkpoint", mixture / "checkpoint", "--text-file", tmp_path / "texts")
    done = run_program("tools.compare_logits", *words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
