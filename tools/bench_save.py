"""How long training stands still for a checkpoint that is waited for, and for one that is written in the background, in real runs of one model.

    python tools/bench_save.py [--hidden 768] [--layers 8] [--json]

Trains a student with random weights and the committed tiny one's tokenizer (steps_without: no checkpoints; waited, background: one every fourth step) and reads
`checkpoint_seconds` and `step_seconds` from metrics.jsonl. `slower_steps` is what the steps take longer while a checkpoint is on its way to the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_common import environment
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
EVERY, STEPS = 4, 13
RUNS = {
    "steps_without": ["checkpoint.every_steps=0"],
    "waited": [f"checkpoint.every_steps={EVERY}", "checkpoint.in_background=false"],
    "background": [f"checkpoint.every_steps={EVERY}", "checkpoint.in_background=true"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what checkpoints cost a run.")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="opd-bench-save-") as name:
        folder = Path(name)
        parameters = _write_model(folder / "student", arguments.hidden, arguments.layers)
        rows = {run: _measure(folder, run, words, arguments.ranks) for run, words in RUNS.items()}
    usual = rows["steps_without"]["step_seconds"]
    result = {
        "parameters": parameters,
        "ranks": arguments.ranks,
        "rows": rows,
        "stands_still_of_waited": rows["background"]["stands_still_seconds"] / rows["waited"]["stands_still_seconds"],
        "slower_steps": rows["background"]["step_seconds_while_writing"] / usual,
        "environment": environment(["torch", "megatron-core"]),
    }
    print(json.dumps(result, indent=2)) if arguments.json else _show(result)
    return 0


def _write_model(folder: Path, hidden: int, layers: int) -> int:
    """Write an untrained model of this size; return its number of parameters."""
    assets = ROOT / "recipes" / "assets" / "tiny_student"
    shutil.copytree(assets, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "head_dim": 64,
        "layer_types": ["full_attention"] * layers,
    }
    config = AutoConfig.from_pretrained(assets, **sizes, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _measure(folder: Path, run: str, words: list[str], ranks: int) -> dict[str, float]:
    command = [
        *(sys.executable, "-m", "recipes.run", "quickstart", "--nproc-per-node", str(ranks), "--run-dir", str(folder / run), *words),
        *(f"student.hf={folder / 'student'}", f"training.steps={STEPS}", "checkpoint.keep=1", "evaluation.prompts=0", "teacher.self_test=false"),
        *("student.layout.tensor=1", f"student.layout.pipeline={ranks}", "data.batch_prompts=16", "rollout.max_response_tokens=8", "training.micro_batch=8"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    steps = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()][1:]
    # A step tells what came before it; the one after a checkpoint is made while that is written.
    after = [step for step in steps if (step["step"] - 1) % EVERY == 0]
    size = sum(file.stat().st_size for file in (folder / run / "checkpoints").rglob("*") if file.is_file())
    shutil.rmtree(folder / run)
    # Of a checkpoint in the background, what is left to do when it is whole comes a step or more later.
    still = sum(step["checkpoint_seconds"] for step in steps) / len(after)
    return {
        "checkpoint_bytes": size,
        "step_seconds": statistics.median(step["step_seconds"] for step in steps),
        "step_seconds_while_writing": statistics.median(step["step_seconds"] for step in after),
        "stands_still_seconds": still,
    }


def _show(result: dict[str, Any]) -> None:
    table = Table(
        title=f"{result['parameters']:,} parameters, {result['ranks']} ranks, {result['rows']['waited']['checkpoint_bytes'] / 2**30:.2f} GiB a checkpoint"
    )
    for column in ("run", "training stands still, s a checkpoint", "a step, s", "the step after a checkpoint, s"):
        table.add_column(column, justify="right")
    for run, row in result["rows"].items():
        table.add_row(run, *(f"{row[key]:.2f}" for key in ("stands_still_seconds", "step_seconds", "step_seconds_while_writing")))
    Console().print(table)
    shares = f"{result['stands_still_of_waited']:.2f} of the time, and a step meanwhile takes {result['slower_steps']:.2f} of its own"
    print(f"in the background training stands still for {shares}")


if __name__ == "__main__":
    sys.exit(main())
