"""Seconds until the student has a batch's hidden states of the teacher: all sent once all is scored, beside sent in rounds while the rest is scored.

    python tools/bench_payload.py [--layout across] [--rounds 4] [--sequences 32] [--response 128] [--hidden 512] [--layers 4] [--json]

Starts four ranks with an untrained teacher (on a CPU over gloo, on GPUs over NCCL) and scores the same samples again and again, in turns both ways, with
`teacher.transfer_rounds` 1 and --rounds. Every repeat waits for all ranks first; the slowest rank counts. What arrives is compared bit for bit.
Layouts: apart (the student TP2, the teacher 2 replicas on ranks of its own), across (4 replicas of the teacher beside a student of TP4).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_common import environment

RANKS = 4
ROOT = Path(__file__).parents[1]
LAYOUTS = {
    "apart": ["student.layout.tensor=2", "teacher.placement=dedicated", "teacher.num_ranks=2"],
    "across": ["student.layout.tensor=4"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure scoring with its transfer, at once and in rounds.")
    parser.add_argument("--layout", choices=LAYOUTS, default="apart")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=32, help="samples of one batch")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=128, help="tokens of the longest response; the shortest has a quarter of it")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if (problem := _problem_with(arguments)) is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if "RANK" in os.environ:
        _measure(arguments)
        return 0
    with tempfile.TemporaryDirectory(prefix="opd-bench-payload-") as name:
        _write_model(Path(name) / "teacher", arguments)
        result = _start_ranks(Path(name))
    result["environment"] = environment(["torch", "megatron-core"])
    print(json.dumps(result, indent=2)) if arguments.json else _show(result)
    return 0


def _problem_with(arguments: argparse.Namespace) -> str | None:
    """Return what is wrong with the options, if anything is."""
    for name in ("sequences", "micro_batch", "prompt", "response", "layers", "repeats"):
        if getattr(arguments, name) < 1:
            return f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1"
    if arguments.rounds < 2:
        return f"--rounds {arguments.rounds} must be at least 2: one round is the other way that is measured"
    if arguments.hidden < 128 or arguments.hidden % 128:
        return f"--hidden {arguments.hidden} must be a positive multiple of 128"
    return None


def _write_model(folder: Path, arguments: argparse.Namespace) -> None:
    """Write an untrained Llama of this size: four key-value heads, which every layout divides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(4, arguments.hidden // 64)
    sizes = {"hidden_size": arguments.hidden, "intermediate_size": 3 * arguments.hidden, "num_hidden_layers": arguments.layers}
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=4, vocab_size=512, max_position_embeddings=1 << 16, dtype="float32")
    LlamaForCausalLM(config).save_pretrained(folder)


def _start_ranks(folder: Path) -> dict[str, Any]:
    """Start this file as four ranks with the same words; return what rank 0 wrote."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "OPD_BENCH_FOLDER": str(folder)}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path})
        for rank in range(RANKS)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def _measure(arguments: argparse.Namespace) -> None:
    """One rank's part; rank 0 writes the result."""
    import opd_megatron

    opd_megatron.import_megatron()
    import torch
    import torch.distributed as dist

    from opd_megatron.parallel.world import join_world, leave_world, worlds

    device, folder = join_world(), Path(os.environ["OPD_BENCH_FOLDER"])
    config = _config(arguments, folder / "teacher")
    seconds: dict[str, list[float]] = {"at_once": [], "in_rounds": []}
    with worlds(config.num_teacher_ranks) as bridge:
        fetch = _make_fetch(config, bridge, device, _rollouts(arguments))
        # The first time of either warms up, and its results are compared.
        first, _ = fetch(1)
        second, num_rounds = fetch(arguments.rounds)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[sample], second[sample]) for sample in first)
        for _ in range(arguments.repeats):
            for name, rounds in (("at_once", 1), ("in_rounds", arguments.rounds)):
                dist.barrier(group=bridge.group)
                started = time.perf_counter()
                fetch(rounds)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                slowest = torch.tensor([time.perf_counter() - started], device=device)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=bridge.group)
                seconds[name].append(float(slowest))
        if bridge.rank == 0:
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            pairs = [after / before for before, after in zip(seconds["at_once"], seconds["in_rounds"], strict=True)]
            num_bytes = sum(rows.nbytes for rows in first.values())
            sizes = {key: value for key, value in vars(arguments).items() if key != "json"}
            result = {
                **sizes,
                "device": str(device),
                "num_rounds": num_rounds,
                "bytes_on_rank_0": num_bytes,
                "seconds": medians,
                "ratio": statistics.median(pairs),
            }
            (folder / "result.json").write_text(json.dumps({**result, "ratios": pairs}))
    leave_world()


def _config(arguments: argparse.Namespace, teacher: Path) -> Any:
    from opd_megatron.config import apply_overrides
    from recipes.run import find_recipe

    words = [f"world_size={RANKS}", f"teacher.hf={teacher}", f"student.hf={teacher}", "student.layout.tensor=1", "student.layout.pipeline=1"]
    words += [f"teacher.micro_batch={arguments.micro_batch}", "teacher.layout.tensor=1", "training.precision=fp32", *LAYOUTS[arguments.layout]]
    return apply_overrides(find_recipe("quickstart")(), words)


def _rollouts(arguments: argparse.Namespace) -> Any:
    """Return samples with responses of a quarter to the whole of --response, in mixed order."""
    import torch

    from opd_megatron.data.batches import Sample
    from opd_megatron.rollout.rollouts import Rollouts

    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(max(1, arguments.response // 4), arguments.response, arguments.sequences).long()
    samples = []
    for index, place in enumerate(torch.randperm(len(lengths), generator=generator).tolist()):
        prompt, response = (torch.randint(0, 512, (size,), generator=generator) for size in (arguments.prompt, int(lengths[place])))
        samples.append(Sample(index, 0, prompt, response, None, True))
    return Rollouts(samples=tuple(samples), policy_version=0)


def _make_fetch(config: Any, bridge: Any, device: Any, rollouts: Any) -> Any:
    """Return a function of `teacher.transfer_rounds`: the rows that this rank needs, and in how many rounds they came."""
    from opd_megatron.models.weights import open_weights
    from opd_megatron.parallel.groups import student_groups, teacher_groups
    from opd_megatron.teacher.routing import Courier
    from opd_megatron.training.setup import make_router, make_scorer

    source = open_weights(hf=config.teacher.hf)
    ours = student_groups(config.student.layout, 1) if bridge.rank in bridge.student_ranks else None
    scorer = make_scorer(source, config, teacher_groups(config.teacher.layout), device) if bridge.rank in bridge.teacher_ranks else None
    router = make_router(source, config, bridge)

    def fetch(num_rounds: int) -> tuple[dict[int, Any], int]:
        way = replace(router, num_rounds=num_rounds)
        routes = way.routes(rollouts)
        courier = Courier(way, routes, device, tp_group=ours.collection.tp if ours is not None else None)
        if scorer is not None:
            scorer.score(rollouts, courier.send, num_rounds=num_rounds)
        return courier.finish(), len(routes)

    return fetch


def _show(result: dict[str, Any]) -> None:
    seconds, mebibytes = result["seconds"], result["bytes_on_rank_0"] / 2**20
    print(f"{result['layout']}, {result['device']}: {mebibytes:.1f} MiB on rank 0, {result['num_rounds']} rounds, {result['repeats']} repeats")
    print(f"at once {seconds['at_once']:.3f} s, in rounds {seconds['in_rounds']:.3f} s: {result['ratio']:.2f} of the time (median of pairs)")


if __name__ == "__main__":
    sys.exit(main())
