"""How fast a model writes: the static and the dynamic engine, and transformers' `generate`, with the same weights, prompts and lengths.

    python tools/bench_rollout.py [--sequences 16] [--hidden 256] [--json]

One process. A Qwen3-like model with random weights decodes greedily from prompts of uneven length; a share of the vocabulary ends a response, so that
responses end at different times. Engines take turns, `--rounds` times after a round that does not count: rates are medians over rounds, in tokens written
per second, and ratios are medians of those within a round. The text of each engine is compared with transformers', position by position. The dynamic engine
needs a GPU with flash-attention, and --precision bf16: where it cannot run, the reason is printed in its place.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_common import environment

import opd_megatron

ASSETS = Path(__file__).parents[1] / "recipes" / "assets" / "tiny_student"
SIZES = ("sequences", "prompt_tokens", "response_tokens", "batch_sequences", "hidden", "layers", "vocab", "rounds")
Texts = list[list[int]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=48, help="of the longest prompt; the shortest has a quarter of them")
    parser.add_argument("--response-tokens", type=int, default=64, help="at most")
    parser.add_argument("--batch-sequences", type=int, default=16, help="sequences decoded together by the static engine, slots of the dynamic one")
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--ends", type=float, default=0.1, help="share of the vocabulary that ends a response; 0 lets all reach --response-tokens")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--cuda-graphs", action="store_true", help="let the dynamic engine record its steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    options = parser.parse_args(arguments)
    if (problem := _problem_with(options)) is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    opd_megatron.import_megatron()
    from opd_megatron.parallel.world import join_world, leave_world

    join_world()
    with tempfile.TemporaryDirectory(prefix="opd-bench-rollout-") as name:
        parameters = _write_model(Path(name), options)
        engines, missing = _engines(Path(name), options)
    rows = _measure(engines, options.rounds)
    leave_world()
    result = {**{size: getattr(options, size) for size in SIZES}, "precision": options.precision, "parameters": parameters, "rows": rows, "missing": missing}
    _show(result)
    if options.json:
        print(json.dumps({**result, "environment": environment(("torch", "megatron-core", "transformers", "flash-attn"))}))
    return 0


def _problem_with(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the options, if anything is."""
    for name in SIZES:
        if getattr(options, name) < 1:
            return f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1"
    if options.hidden % 128:
        return f"--hidden {options.hidden} must be a multiple of 128: heads have 64 dimensions, and two share their keys and values"
    # The folder whose configuration is filled in names tokens among the first.
    if options.vocab < 64:
        return f"--vocab {options.vocab} must be at least 64"
    if not 0 <= options.ends < 1:
        return f"--ends {options.ends} must be in [0, 1)"
    return None


def _write_model(folder: Path, options: argparse.Namespace) -> int:
    """Write an untrained model of this size; return its number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(ASSETS, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    sizes: dict[str, Any] = {
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.hidden // 128,
        "head_dim": 64,
        "layer_types": ["full_attention"] * options.layers,
        "vocab_size": options.vocab,
        "max_position_embeddings": options.prompt_tokens + options.response_tokens,
    }
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **sizes), dtype=torch.float32)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _engines(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Callable[[], Texts]], dict[str, str]]:
    """Return what writes, and why the others do not."""
    import torch

    from opd_megatron.config import ParallelLayout, RolloutConfig
    from opd_megatron.models.gpt import build_gpt
    from opd_megatron.models.weights import load_model, open_weights
    from opd_megatron.parallel.groups import student_groups
    from opd_megatron.rollout.choice import Choice, choose_engine, make_engine
    from opd_megatron.rollout.sampling import SamplingSettings

    source, groups = open_weights(hf=str(folder)), student_groups(ParallelLayout(), seed=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_gpt(source.architecture, groups, precision=options.precision, vocab_multiple=1).to(device)
    load_model(model, groups, source, vocab_multiple=1)
    prompts, eos_ids = _prompts(options), list(range(int(options.ends * options.vocab)))
    settings = SamplingSettings(max_response_tokens=options.response_tokens, temperature=0.0)
    rollout = RolloutConfig(batch_sequences=options.batch_sequences, cuda_graphs=options.cuda_graphs)

    def writing(choice: Choice) -> Callable[[], Texts]:
        engine = make_engine(choice, model, groups, rollout, vocab_size=options.vocab, eos_ids=eos_ids)
        return lambda: [one.ids.tolist() for one in engine.generate(prompts, [(index,) for index in range(len(prompts))], settings)]

    engines = {"static": writing(Choice(engine="static", why="")), "transformers": _transformers(folder, options, prompts, eos_ids, device)}
    try:
        engines["dynamic"] = writing(choose_engine("dynamic", source.architecture, groups, options.precision))
    except ValueError as error:
        return engines, {"dynamic": str(error)}
    return engines, {}


def _prompts(options: argparse.Namespace) -> Texts:
    """Return prompts of evenly spread lengths."""
    import torch

    generator = torch.Generator().manual_seed(2)
    lengths = torch.linspace(max(1, options.prompt_tokens // 4), options.prompt_tokens, options.sequences).round().int().tolist()
    return [torch.randint(options.vocab, (length,), generator=generator).tolist() for length in lengths]


def _transformers(folder: Path, options: argparse.Namespace, prompts: Texts, eos_ids: list[int], device: Any) -> Callable[[], Texts]:
    """Return transformers' `generate`, all prompts in batches of as many sequences, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, "bfloat16" if options.precision == "bf16" else "float32")).to(device).eval()
    ends = torch.tensor(eos_ids, dtype=torch.long)

    def write(batch: Texts) -> Texts:
        longest = max(map(len, batch))
        ids_BS = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch], device=device)
        mask_BS = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
        written_BS = model.generate(
            ids_BS, attention_mask=mask_BS, do_sample=False, max_new_tokens=options.response_tokens, eos_token_id=eos_ids or None, pad_token_id=0
        )[:, longest:]
        return [_until_end(row, ends) for row in written_BS.cpu()]

    def all_batches() -> Texts:
        # What redirects Megatron-Core's CUDA calls on a machine without would slow down every operator here as well.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return [text for first in range(0, len(prompts), options.batch_sequences) for text in write(prompts[first : first + options.batch_sequences])]

    return all_batches


def _until_end(row: Any, ends: Any) -> list[int]:
    import torch

    found = torch.isin(row, ends).nonzero()
    return row[: int(found[0]) + 1].tolist() if found.numel() else row.tolist()  # type: ignore[no-any-return]


def _measure(engines: dict[str, Callable[[], Texts]], rounds: int) -> dict[str, dict[str, float]]:
    """Return each engine's rate and text against transformers'; in each round another one begins."""
    names = list(engines)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    texts = {name: write() for name, write in engines.items()}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            written = engines[name]()
            seconds[name].append(time.perf_counter() - started)
            assert written == texts[name], f"{name} writes another text in another round"
    theirs = texts["transformers"]
    rows = {}
    for name in names:
        count = sum(map(len, texts[name]))
        rates = [count / one for one in seconds[name]]
        rows[name] = {
            "tokens": count,
            "tokens_per_second": statistics.median(rates),
            "ratio_to_transformers": statistics.median(
                rate * other / sum(map(len, theirs)) for rate, other in zip(rates, seconds["transformers"], strict=True)
            ),
            "equal_positions": _agreement(texts[name], theirs),
        }
    return rows


def _agreement(ours: Texts, theirs: Texts) -> float:
    """Return the share of transformers' positions at which the same token stands."""
    equal = sum(one == other for text, reference in zip(ours, theirs, strict=True) for one, other in zip(text, reference, strict=False))
    return equal / sum(map(len, theirs))


def _show(result: dict[str, Any]) -> None:
    print(f"{result['parameters']:,} parameters, {result['precision']}; {result['sequences']} prompts of up to {result['prompt_tokens']} tokens")
    print(f"{'':14}{'tokens':>8}{'tokens / s':>12}{'of transformers':>17}{'equal positions':>17}")
    for name, row in result["rows"].items():
        print(
            f"{name:14}{row['tokens']:>8}{row['tokens_per_second']:>12.1f}{row['ratio_to_transformers']:>17.2f}{row['equal_positions']:>17.1%}",
            flush=True,
        )
    for name, why in result["missing"].items():
        print(f"{name:14}{why}")


if __name__ == "__main__":
    sys.exit(main())
