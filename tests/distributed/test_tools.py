"""The tools: what they print, write and refuse. Some are started as a user starts them, the others without the seconds of imports (tests/programs.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.programs import ROOT, run_program
from tests.tiny import write_tiny_model

ASSETS = ROOT / "recipes" / "assets"


def _tool(name: str, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return run_program(f"tools.{name}", *arguments, ranks=ranks)


def _started(name: str, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable] if ranks == 1 else [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run([*launcher, f"tools/{name}.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "checkpoint"
    done = _started("convert_hf_to_megatron", "--hf", ASSETS / "tiny_student", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixture of experts as a Hugging Face folder, and as a Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("mixture")
    write_tiny_model(folder / "hf", "qwen3_moe", scale=0.3, num_hidden_layers=2)
    done = _tool("convert_hf_to_megatron", "--hf", folder / "hf", "--out", folder / "checkpoint")
    assert done.returncode == 0, done.stderr
    return folder / "hf", folder / "checkpoint"


def test_converting_there_and_back_gives_the_same_folder(checkpoint: Path, tmp_path: Path) -> None:
    assert _started("convert_megatron_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "hf").returncode == 0
    source, back = (load_file(folder / "model.safetensors") for folder in (ASSETS / "tiny_student", tmp_path / "hf"))
    assert source.keys() == back.keys()
    assert all(torch.equal(source[name], back[name]) for name in source)
    assert {path.name for path in (ASSETS / "tiny_student").iterdir()} | {"checksums.json"} == {path.name for path in (tmp_path / "hf").iterdir()}
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1, "weights are as readable as what is beside them"


def test_exporting_in_another_dtype_says_so_in_the_config(checkpoint: Path, tmp_path: Path) -> None:
    assert _tool("convert_megatron_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "hf", "--dtype", "bfloat16").returncode == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("arguments", "ranks"), [((), 1), (("--tensor", 2, "--pipeline", 2), 4)], ids=["TP1", "TP2xPP2"])
def test_compare_logits_finds_no_difference(checkpoint: Path, arguments: tuple[object, ...], ranks: int) -> None:
    done = _tool("compare_logits", "--hf", ASSETS / "tiny_student", "--checkpoint", checkpoint, *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["max_difference"] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        pytest.param(("--expert", 2), 2, id="EP2", marks=pytest.mark.slow),
        pytest.param(("--expert", 2, "--pipeline", 2), 4, id="EP2xPP2"),
        pytest.param(("--expert", 2, "--expert-tensor", 2, "--tensor", 2), 4, id="TP2, EP2xETP2", marks=pytest.mark.slow),
    ],
)
def test_compare_logits_finds_no_difference_wherever_experts_are(mixture: tuple[Path, Path], arguments: tuple[object, ...], ranks: int) -> None:
    hf, checkpoint = mixture
    tool = _started if ranks == 2 else _tool
    done = tool("compare_logits", "--hf", hf, "--checkpoint", checkpoint, *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["max_difference"] < 1e-4


def test_compare_logits_finds_another_model(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((ASSETS / "tiny_student" / "config.json").read_text())
    sizes = {name: config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")}
    other = write_tiny_model(tmp_path / "other", tied=True, max_position_embeddings=512, **sizes)
    assert _tool("compare_logits", "--hf", other, "--checkpoint", checkpoint).returncode == 1
    refused = _tool("compare_logits", "--hf", ASSETS / "tiny_teacher", "--checkpoint", checkpoint)
    assert refused.returncode == 2
    assert "another architecture" in refused.stderr


def test_evaluate_prints_one_json_object_last(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Spell this word backward (example: sun -> nus): {word}", "answer": word[::-1]} for word in ("poil", "cat", "tree", "solio")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ("--data", tmp_path / "prompts.jsonl", "--max-response-tokens", 12, "grader=exact")
    by_checkpoint = _tool("evaluate", "--checkpoint", checkpoint, *common)
    assert by_checkpoint.returncode == 0, by_checkpoint.stderr
    by_folder = _started("evaluate", "--hf", ASSETS / "tiny_student", *common)
    records = [json.loads(done.stdout.splitlines()[-1]) for done in (by_checkpoint, by_folder)]
    assert records[0]["accuracy"] == records[1]["accuracy"] >= 0.75
    assert records[0]["pass_at_k"] == {"1": records[0]["accuracy"]}


def test_evaluate_says_the_same_wherever_experts_are(mixture: tuple[Path, Path], tmp_path: Path) -> None:
    hf, checkpoint = mixture
    # The replicas answer 2 and 1 of 3 prompts.
    rows = [{"prompt": f"Spell this word backward: {word}", "answer": word[::-1]} for word in ("cat", "tree", "soil")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ("--data", tmp_path / "prompts.jsonl", "--max-response-tokens", 8, "grader=exact")
    runs = [
        _tool("evaluate", "--hf", hf, *common),
        _tool("evaluate", "--checkpoint", checkpoint, "--expert", 2, *common, ranks=2),
        _tool("evaluate", "--hf", hf, "--expert-tensor", 2, *common, ranks=2),
    ]
    answers = []
    for done in runs:
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith(("right", "wrong"))]
        assert len(lines) == 3
        answers.append(lines)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("convert_hf_to_megatron", ("--hf", "/nowhere", "--out", "/tmp/never"), "not a Hugging Face model folder"),
        ("convert_megatron_to_hf", ("--checkpoint", "/nowhere", "--out", "/tmp/never"), "not a Megatron checkpoint"),
        ("convert_hf_to_megatron", ("--hf", str(ASSETS / "tiny_student"), "--out", "/proc/nowhere/out"), "cannot be written"),
        ("convert_megatron_to_hf", ("--checkpoint", "{checkpoint}", "--out", "/proc/nowhere/out"), "cannot be written"),
        ("evaluate", ("--data", "x.jsonl"), "name the model once"),
        ("evaluate", ("--hf", str(ASSETS / "tiny_student"), "--data", "x.jsonl", "--samples", "0"), "--samples 0 must be at least 1"),
        ("evaluate", ("--hf", str(ASSETS / "tiny_student"), "--data", "x.jsonl", "--temperature", "-1"), "--temperature -1.0 must be 0"),
        ("evaluate", ("--hf", str(ASSETS / "tiny_student"), "--data", "x.jsonl", "--max-response-tokens", "4000"), "exceed the model's 512 positions"),
        ("evaluate", ("--hf", str(ASSETS / "tiny_student"), "--data", "x.jsonl", "--expert", "0"), "--expert 0 must be at least 1"),
        ("evaluate", ("--hf", str(ASSETS / "tiny_student"), "--data", "x.jsonl", "--expert", "2"), "does not divide the 1 ranks of a pipeline stage"),
        ("compare_logits", ("--hf", str(ASSETS / "tiny_student"), "--checkpoint", "{checkpoint}", "--expert-tensor", "2"), "expert*expert_tensor=2 does not"),
        ("report", ("/nowhere",), "/nowhere"),
        ("show_answers", ("/nowhere",), "/nowhere"),
    ],
)
def test_wrong_input_exits_2_with_one_line(checkpoint: Path, name: str, arguments: tuple[str, ...], message: str) -> None:
    done = _tool(name, *(argument.format(checkpoint=checkpoint) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
