"""Where the time and memory of a step go, at any size, with random weights: no model is downloaded, and prompts are made up.

    python tools/bench_step.py RECIPE --nproc-per-node N [--steps K --warmup W] [--prompt-tokens P --response-tokens R] [KEY=VALUE ...] [--json]

It is the run's own step (`Trainer.step`), with models of the architectures that RECIPE names, from recipes/architectures where their folders are absent. Every
prompt has P tokens and every response R: nothing ends a response early. Phases are those of metrics.jsonl: `teacher` holds the scores and their way to the
student. The peak of memory stands beside what tools/plan.py says of the same configuration.
On a GPU memory is what torch has allocated; on a CPU the growth of the process, which is more. With --json the last line is one JSON object.
What a run would refuse, as more tokens than a model has positions or a GPU has room for, ends with exit code 2 and its reason in one line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_common import environment

import opd_megatron
from opd_megatron.config import RunConfig, apply_overrides
from opd_megatron.driver import check_before_torch, check_usable
from recipes.run import EXIT_MISTAKE, all_recipes, find_recipe

if TYPE_CHECKING:
    from opd_megatron.training.setup import Sources

_ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = (_ROOT / "recipes" / "architectures", _ROOT / "recipes" / "assets")
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn")
_RATES = ("tokens_per_second", "tokens_per_second_per_gpu", "tflops_per_gpu", "train_tflops_per_gpu", "model_flop_utilization", "train_model_flop_utilization")


def main() -> int:
    arguments = _parse_arguments()
    is_rank = "RANK" in os.environ
    try:
        check_before_torch(arguments.name, runs=True)
        refuse_text(arguments.name, apply_overrides(find_recipe(arguments.name)(), arguments.overrides))
        changes = [*arguments.overrides, *_sizes(arguments)]
        config = apply_overrides(find_recipe(arguments.name)(), changes)
        config.check_world(config.world_size)
        if is_rank:
            return _measure(arguments, changes, config)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_MISTAKE
    return _launch(arguments, changes)


def _sizes(arguments: argparse.Namespace) -> list[str]:
    """Return what the options mean as KEY=VALUE words; ValueError for numbers that cannot be."""
    for option, value, least in (("--steps", arguments.steps, 1), ("--warmup", arguments.warmup, 0), ("--nproc-per-node", arguments.nproc_per_node, 1)):
        if value < least:
            raise ValueError(f"{option} {value} must be at least {least}")
    words = [f"training.steps={arguments.steps + arguments.warmup}", f"world_size={os.environ.get('WORLD_SIZE', arguments.nproc_per_node)}"]
    for key, value in (("data.max_prompt_tokens", arguments.prompt_tokens), ("rollout.max_response_tokens", arguments.response_tokens)):
        words += [f"{key}={value}"] if value is not None else []
    # Nothing is read, evaluated or proven: what is measured are the steps.
    return [*words, "evaluation.prompts=0", "teacher.self_test=false"]


def refuse_text(name: str, config: RunConfig) -> None:
    """Raise ValueError for a run whose steps need more than two models and token ids, or of which two would be measured at once."""
    for key, unfit in (
        ("training.objective", config.training.objective != "opd"),
        ("privileged.template", config.privileged.template is not None),
        ("alignment.kind", not config.alignment.is_identity),
        ("effopd.enabled", config.effopd.enabled),
        ("rollout.replay", bool(config.rollout.replay)),
    ):
        if unfit:
            raise ValueError(f"{key} makes of {name} a run that needs text, and a bench has token ids alone; take a recipe without it, or unset it")
    if config.teacher is not None and config.teacher.staleness:
        raise ValueError(f"teacher.staleness={config.teacher.staleness} writes one batch while it scores another; measure them apart with teacher.staleness=0")


def _launch(arguments: argparse.Namespace, changes: Sequence[str]) -> int:
    """Start the ranks, and add to what they measured what the planner says; return the exit code of torchrun, or 2 after a mistake, which is told in a line."""
    with tempfile.TemporaryDirectory(prefix="opd-bench-step-") as folder:
        result = Path(folder) / "result.json"
        mistake = _mistake_file(result)
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.nproc_per_node), __file__, arguments.name]
        words = [*arguments.overrides, "--steps", arguments.steps, "--warmup", arguments.warmup, "--result", result]
        for option, value in (("--prompt-tokens", arguments.prompt_tokens), ("--response-tokens", arguments.response_tokens)):
            words += [option, value] if value is not None else []
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        defaults = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
        command = [*ranks, *map(str, words)]
        with subprocess.Popen(command, env=defaults, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
            assert process.stdout is not None
            for line in process.stdout:
                # torchrun answers a mistake with a traceback of its own, and peers that lost a rank with theirs; by then the reason is in its file.
                if not mistake.is_file():
                    print(line, end="", file=sys.stderr, flush=True)
        if process.returncode and mistake.is_file():
            print(f"error: {mistake.read_text()}", file=sys.stderr, flush=True)
            return EXIT_MISTAKE
        if process.returncode:
            return process.returncode
        record = json.loads(result.read_text())
    record["memory"]["planned_bytes"] = _planned_bytes(arguments.name, changes)
    _print(record, as_json=arguments.json)
    return 0


def _planned_bytes(name: str, changes: Sequence[str]) -> int | None:
    """Return what the planner says the largest rank holds; it makes its process a rank of a world that does not exist, hence in another one."""
    planner = [sys.executable, str(_ROOT / "tools" / "plan.py"), name, *changes, "--json"]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    printed = subprocess.run(planner, cwd=_ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True).stdout.splitlines()
    # What does not fit into the memory that it assumes is printed all the same.
    return max(rank["total_bytes"] for rank in json.loads(printed[0])["ranks"]) if printed else None


def _mistake_file(result: Path) -> Path:
    return result.with_suffix(".mistake")


def _measure(arguments: argparse.Namespace, changes: Sequence[str], config: RunConfig) -> int:
    """Take part in the job as one of its ranks; the first leaves the record. A ValueError on any of them ends this process with 2."""
    opd_megatron.import_megatron()
    from opd_megatron.parallel.world import describe_device, join_world, leave_world

    try:
        check_usable(config.training.precision)
        sources = random_sources(config)
        device = join_world()
        refuse_too_large(config, sources, device)
        record = run_steps(config, sources, device, warmup=arguments.warmup)
    except ValueError as error:
        _leave_mistake(error, arguments.result)
        # Peers may be gone: an orderly shutdown of the process groups would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_MISTAKE)
    if record is not None and os.environ["RANK"] == "0":
        record = {
            "recipe": arguments.name,
            "changes": list(changes),
            "device": describe_device(device).removeprefix("device: "),
            "environment": environment(PACKAGES),
            **record,
        }
        if arguments.result is not None:
            arguments.result.write_text(json.dumps(record))
        else:
            _print(record, as_json=arguments.json)
    leave_world()
    return 0


def _leave_mistake(error: ValueError, result: Path | None) -> None:
    """Tell the message once: to the process that started the ranks, or where torchrun did, to the user. Rank 0 goes first, as all mostly find the same."""
    rank = os.environ["RANK"]
    if rank != "0":
        time.sleep(1)
    if result is None:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return
    mistake = _mistake_file(result)
    if rank == "0" or not mistake.is_file():
        # The starter looks while this is written.
        own = mistake.with_suffix(f".{rank}")
        own.write_text(str(error))
        own.replace(mistake)


def refuse_too_large(config: RunConfig, sources: Sources, device: Any) -> None:
    """Raise ValueError, on every rank, where a run would: if one of them is planned to need more than its GPU has free."""
    from opd_megatron.planning.architectures import KnownModel
    from opd_megatron.training.free_memory import check_free_memory, free_gpu_bytes, make_catalogue

    if device.type != "cuda" or not config.training.check_memory:
        return
    assert sources.teacher is not None
    student, teacher = (KnownModel(source.architecture, source.assets) for source in (sources.student, sources.teacher))
    check_free_memory(config, student, teacher, free_gpu_bytes(device), make_catalogue(PUBLISHED, all_recipes()), lambda _text: None)


def random_sources(config: RunConfig) -> Sources:
    """Return models of random weights, a vocabulary without an end, and prompts of the longest length, the same on every rank; ValueError if there are none."""
    from opd_megatron.data.prompts import Prompt, PromptSet
    from opd_megatron.models.limits import check_length
    from opd_megatron.models.random_weights import RandomWeights
    from opd_megatron.planning.architectures import know_model
    from opd_megatron.training.layouts import check_layouts
    from opd_megatron.training.setup import Sources, Text

    assert config.teacher_source is not None
    models = {role: know_model(role, settings, PUBLISHED) for role, settings in (("student", config.student), ("teacher", config.teacher_source))}
    check_layouts(config, config.world_size, models["student"].architecture, models["teacher"].architecture)
    for role, model in models.items():
        check_length(config, role, model.architecture)
    student, teacher = (RandomWeights(architecture=model.architecture, assets=model.source) for model in models.values())
    vocab_size = min(student.architecture.vocab_size, teacher.architecture.vocab_size)
    text = Text(tokenizer=None, vocab_size=vocab_size, eos_ids=())
    drawn = random.Random(config.seed)
    prompts = [
        Prompt(index=index, messages=(), ids=tuple(drawn.randrange(vocab_size) for _ in range(config.data.max_prompt_tokens)), answer=None, target=None)
        for index in range(config.data.batch_prompts)
    ]
    return Sources(
        student=student,
        teacher=teacher,
        student_text=text,
        teacher_text=text,
        aligner=None,
        prompts=PromptSet(prompts=prompts),
        evaluation_prompts=None,
        grader=lambda _prompt, _text: 0.0,
        search_prompts=None,
        search_grader=None,
    )


def run_steps(config: RunConfig, sources: Sources, device: Any, *, warmup: int) -> dict[str, Any] | None:
    """Run all steps of the configuration, and return what those after `warmup` took; None on ranks that hold the teacher alone."""
    from opd_megatron.parallel.offload import start_peak
    from opd_megatron.parallel.world import worlds
    from opd_megatron.teacher.teacher import Leave
    from opd_megatron.training.teacher_ranks import serve

    before = start_peak()
    with worlds(config.num_teacher_ranks) as bridge:
        if bridge.rank not in bridge.student_ranks:
            serve(config, sources, bridge, device)
            return None
        with tempfile.TemporaryDirectory(prefix="opd-bench-run-") as folder:
            steps = _train(config, sources, Path(folder), bridge, device)
        if config.num_teacher_ranks:
            bridge.tell_teacher(Leave(status="finished"))
    measured = steps[warmup:]
    peaks = {key.removesuffix("_peak_bytes"): max(step[key] for step in measured) for key in measured[0] if key.endswith("_peak_bytes")}
    return {
        "ranks": config.world_size,
        "steps": len(measured),
        "warmup": warmup,
        "sequences": config.num_sequences,
        "prompt_tokens": config.data.max_prompt_tokens,
        "response_tokens": config.rollout.max_response_tokens,
        "parameters": {"student": _num_parameters(sources.student), "teacher": _num_parameters(sources.teacher)},
        "seconds": {key.removesuffix("_seconds"): _median(measured, key) for key in measured[0] if key.endswith("_seconds") and "_spread_" not in key},
        "rates": {key: _median(measured, key) for key in _RATES if key in measured[0]},
        "payload_bytes_per_token": _median(measured, "payload_bytes_per_token"),
        "memory": {"before_bytes": before, "peak_bytes": {phase: peak - before for phase, peak in peaks.items()}},
    }


def _train(config: RunConfig, sources: Sources, folder: Path, bridge: Any, device: Any) -> list[dict[str, float | int]]:
    """Return the metrics of every step, made as a run makes them."""
    from opd_megatron.reporting.run_directory import RunDirectory
    from opd_megatron.training.checkpoint import CheckpointFolder, Progress
    from opd_megatron.training.evaluator import Evaluator
    from opd_megatron.training.recorder import Recorder
    from opd_megatron.training.setup import build_parts
    from opd_megatron.training.signals import StopRequest
    from opd_megatron.training.trainer import Trainer

    directory = RunDirectory(folder)
    parts = build_parts(config, sources, folder, bridge, device, lambda _text: None)
    recorder = Recorder(directory, config.tracking, first_step=1, total_steps=config.training.steps)
    checkpoints = CheckpointFolder(directory.checkpoints, sources.student.assets, keep=1)
    evaluator = Evaluator(config, sources, parts, recorder)
    trainer = Trainer(config, sources.prompts, parts, recorder, evaluator, checkpoints, Progress(), None, StopRequest(device))
    try:
        return [trainer.step(step) for step in range(1, config.training.steps + 1)]
    finally:
        recorder.close("finished")


def _num_parameters(source: Any) -> int:
    import math

    from opd_megatron.models.weight_map import weight_map

    return sum(math.prod(row.shape) for row in weight_map(source.architecture))


def _median(steps: Sequence[Mapping[str, float | int]], key: str) -> float:
    return statistics.median(step[key] for step in steps)


def _print(record: dict[str, Any], *, as_json: bool) -> None:
    seconds, memory, planned = record["seconds"], record["memory"], record["memory"].get("planned_bytes")
    sizes = f"{record['sequences']} sequences of {record['prompt_tokens']} + {record['response_tokens']} tokens"
    print(f"{record['recipe']}: student {record['parameters']['student']:,} parameters, teacher {record['parameters']['teacher']:,}, {sizes}")
    print(f"{record['device']}; median of {record['steps']} steps after {record['warmup']}")
    for name, value in seconds.items():
        peak = memory["peak_bytes"].get(name)
        beside = f"{peak / 2**30:10.3f} GiB at its peak" if peak is not None else ""
        print(f"  {name:<20}{value:10.4f} s {100 * value / seconds['step']:5.1f} %{beside}")
    for name, value in record["rates"].items():
        print(f"  {name:<34}{value:14.4f}")
    print(f"  memory: {max(memory['peak_bytes'].values()) / 2**30:.3f} GiB measured, {'-' if planned is None else f'{planned / 2**30:.3f} GiB'} planned")
    if as_json:
        print(json.dumps(record), flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of a recipe's step, with random weights.")
    parser.add_argument("name", metavar="RECIPE", help="recipe name")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe, e.g. student.hf=models/Qwen3-0.6B")
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="ranks to start on this machine; under torchrun they are there already")
    parser.add_argument("--steps", type=int, default=3, help="steps that are measured, default 3")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, default 1")
    parser.add_argument("--prompt-tokens", type=int, help="tokens of every prompt; default: data.max_prompt_tokens")
    parser.add_argument("--response-tokens", type=int, help="tokens of every response; default: rollout.max_response_tokens")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
