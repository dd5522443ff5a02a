"""What a conversion costs beside copying the same files, and what it holds in memory, on a model of several GB made on the spot.

    python tools/bench_convert.py [--gigabytes 4] [--experts] [--folder DIR] [--workers N] [--repeats N]

Writes a Qwen3-like model of random bf16 values shard by shard; then, each time into a folder that is not there, on the same disk: `cp -r` and `sync` of the
files, so that they are on the disk as a conversion's are; the model to a Megatron checkpoint and that back, each by its tool, its source verified and not.
All read a source that was read just before, so that as much of it is in the page cache for each. Prints a JSON object for each: `ratio` is the time of the copy
made just before to that of the conversion, so that a machine that slows down slows both. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_common import environment
from safetensors import safe_open
from safetensors.torch import save_file

from opd_megatron.conversion.command_line import LARGE_PAGES
from opd_megatron.models.hf_config import parse_architecture
from opd_megatron.models.weight_map import weight_map

ROOT = Path(__file__).parents[1]
_SHARD_BYTES = 1 << 30
# Random bytes are repeated after this many values; a disk that compresses is none that models lie on.
_PERIOD = (64 << 20) + 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure conversions beside copies.")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="about the model's size (%(default)s)")
    parser.add_argument("--experts", action="store_true", help="a mixture of experts: many small tensors")
    parser.add_argument("--folder", type=Path, help="where to work, on the disk to measure (the system's folder for temporary files)")
    parser.add_argument("--workers", type=int, help="as the tools take it")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="opd-bench-convert-", dir=arguments.folder) as name:
        folder = Path(name)
        config = _config(arguments.gigabytes, with_experts=arguments.experts)
        num_bytes = _write_model(folder / "hf", config)
        workers = ["--workers", str(arguments.workers)] if arguments.workers else []
        print(json.dumps({"model_bytes": num_bytes, "experts": arguments.experts, "environment": environment(["torch", "megatron-core"])}), flush=True)
        for repeat in range(arguments.repeats):
            for row in _measure(folder, num_bytes, workers):
                print(json.dumps({"repeat": repeat, **row}), flush=True)
    return 0


def _config(gigabytes: float, *, with_experts: bool) -> dict[str, Any]:
    """Return a configuration of about this size: layers of a 4B model, or of a small mixture, as many as fit."""
    sizes: dict[str, Any] = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    family = "Qwen3ForCausalLM"
    if with_experts:
        sizes |= {"hidden_size": 2048, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
        family = "Qwen3MoeForCausalLM"
    config = {
        **{"architectures": [family], "model_type": "qwen3_moe" if with_experts else "qwen3", "dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-6},
        **{"vocab_size": 151936, "max_position_embeddings": 4096, "rope_theta": 1e6, "tie_word_embeddings": True, "num_hidden_layers": 1, **sizes},
    }
    one, two = (sum(_bytes_of({**config, "num_hidden_layers": layers}).values()) for layers in (1, 2))
    return {**config, "num_hidden_layers": max(1, 1 + round((gigabytes * 1e9 - one) / (two - one)))}


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    rows = weight_map(parse_architecture(config, "the bench's model"))
    return {name: shape for row in rows for name, shape in zip(row.hf, row.hf_shapes, strict=True)}


def _bytes_of(config: dict[str, Any]) -> dict[str, int]:
    return {name: 2 * torch.Size(shape).numel() for name, shape in _shapes(config).items()}


def _write_model(folder: Path, config: dict[str, Any]) -> int:
    """Write a model of random values, a shard at a time; return the bytes of its weights."""
    shutil.copytree(ROOT / "recipes" / "assets" / "tiny_student", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes, sizes = _shapes(config), _bytes_of(config)
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if sum(sizes[other] for other in shards[-1]) + size > _SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append(name)
    noise = torch.randn(_PERIOD, generator=torch.Generator().manual_seed(0)).bfloat16()
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _values(noise, shapes[name], start) for start, name in enumerate(names, number)}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}))
    files = sorted(folder.glob("*.safetensors"))
    (folder.parent / "SHA256SUMS").write_text(subprocess.run(["sha256sum", *files], check=True, capture_output=True, text=True).stdout)
    return sum(sizes.values())


def _values(noise: torch.Tensor, shape: tuple[int, ...], start: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    repeated = noise.roll(-start * 9973).repeat(-(-count // len(noise)))
    return repeated[:count].reshape(shape).clone()


def _measure(folder: Path, num_bytes: int, workers: list[str]) -> Iterator[dict[str, Any]]:
    hf, checkpoint, back = folder / "hf", folder / "checkpoint", folder / "back"
    to_megatron = ["tools/convert_hf_to_megatron.py", "--hf", hf, "--out", checkpoint, *workers]
    to_hf = ["tools/convert_megatron_to_hf.py", "--checkpoint", checkpoint, "--out", back, *workers]
    # A source is compared by sha256 if somebody said what it is, and else its crc32 is noted; of a checkpoint the crc32 is known.
    unverified: tuple[str, list[Any]] = ("no", ["--no-verify"])
    of_folder = [("sha256", ["--sha256", folder / "SHA256SUMS"]), ("crc32, noted", []), unverified]
    for source, out, command, modes in ((hf, checkpoint, to_megatron, of_folder), (checkpoint, back, to_hf, [("crc32", []), unverified])):
        for verified, words in modes:
            shutil.rmtree(out, ignore_errors=True)
            copying, copying_cpu = _copy(source, folder / "copy")
            bound, result = _convert([*command, *words])
            seconds = result["seconds"]
            yield {
                "direction": "to Megatron" if out == checkpoint else "to Hugging Face",
                "verified": verified,
                "cp_seconds": round(copying, 2),
                "cp_cpu_seconds": round(copying_cpu, 2),
                "seconds": round(seconds, 2),
                "cpu_seconds": round(result["cpu_seconds"], 2),
                "gigabytes_per_second": round(num_bytes / seconds / 1e9, 3),
                "ratio": round(copying / seconds, 2),
                "peak_bytes_above_start": result["peak_bytes"] - result["bytes_before"],
                "bound_bytes": bound,
            }
    yield {"bit_identical": _same(hf, back)}


def _copy(source: Path, target: Path) -> tuple[float, float]:
    """Return the seconds, and those of a core, that copying the files to the disk takes."""
    subprocess.run(["cat", *sorted(path for path in source.iterdir() if path.is_file())], check=True, stdout=subprocess.DEVNULL)
    os.sync()
    began, began_cpu = time.monotonic(), _cpu_of_children()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *(path for path in target.rglob("*") if path.is_file())], check=True)
    seconds, cpu_seconds = time.monotonic() - began, _cpu_of_children() - began_cpu
    shutil.rmtree(target)
    return seconds, cpu_seconds


def _cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _convert(command: list[Any]) -> tuple[int, dict[str, Any]]:
    """Return the stated bound of memory, and what `_measured_tool` printed."""
    words = [str(word) for word in command]
    shown = subprocess.run([sys.executable, *words, "--dry-run"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    bound = int(shown.split("memory: at most ")[1].split(" ")[0].replace(",", ""))
    # As the tools have it before they import torch.
    environ = {**os.environ, **dict([LARGE_PAGES])}
    done = subprocess.run([sys.executable, __file__, "--measure", *words], cwd=ROOT, capture_output=True, text=True, env=environ)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return bound, json.loads(done.stdout.splitlines()[-1])


def _measured_tool(words: list[str]) -> int:
    """Run a tool here, and print what it took beside what importing its libraries takes."""
    import importlib

    import opd_megatron

    opd_megatron.import_megatron()
    sys.argv = words
    for module in ("opd_megatron.conversion.to_hf", "opd_megatron.conversion.to_megatron"):
        importlib.import_module(module)
    before, began, began_cpu = _peak_bytes(), time.monotonic(), time.process_time()
    # A script has its own folder on its path, and not the one above.
    sys.path.insert(0, str(ROOT))
    code = importlib.import_module(words[0].removesuffix(".py").replace("/", ".")).main()
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - began_cpu
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": _peak_bytes(), "bytes_before": before}))
    return int(code)


def _peak_bytes() -> int:
    """Return the most memory that this program has had; what getrusage says is also of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def _same(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same tensors, one at a time."""
    left, right = ({name: file for file in folder.glob("*.safetensors") for name in _names(file)} for folder in (one, other))
    return left.keys() == right.keys() and all(torch.equal(_bits(left[name], name), _bits(right[name], name)) for name in left)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _bits(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor.view(torch.int16)


if __name__ == "__main__":
    sys.exit(_measured_tool(sys.argv[2:]) if sys.argv[1:2] == ["--measure"] else main())
