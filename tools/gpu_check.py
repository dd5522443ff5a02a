"""Check a GPU node by one command, in less than ten minutes: `make gpu-check`, or `python tools/gpu_check.py`.

It runs tests/gpu, a shortened quickstart, the benchmarks of loss, step and rollouts, and a step with either kind of layers, each in processes of its own and
with a time limit, and writes one report as Markdown and JSON: recipes/results/gpu_check_<gpu>.md and .json, with
--only gpu_check_<gpu>_partial.md and .json. After a step that fails the others still run.
Exit code 0 if none failed, 1 if one did or none ran, 2 where no GPU can be used or no report written, with the reason. Bars for speed fail nothing.
`--device cpu --out DIR` puts the CPU in the GPU's place, with tiny sizes, to test the check itself; its report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
# A container brings its own torch, and nothing of this project is installed in it.
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from gpu_report import Figure, Outcome, hardware, has_passed, names_of, write_report  # noqa: E402

from opd_megatron import driver  # noqa: E402

RESULTS = ROOT / "recipes" / "results"
BUDGET_SECONDS = 570.0
_KILL_SECONDS = 15.0
# What the steps import; a container need not have the project itself installed.
_NEEDED = ("torch", "megatron", "transformers", "safetensors", "einops", "psutil", "pyarrow", "jinja2", "matplotlib", "rich", "tensorboard", "pytest")
# What one line of a failed step's output is worth; the rest is in its log.
_TAIL_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Step:
    """One part of the check: a command, how long it may take, and what is read from what it leaves; `skip` says why it is not run."""

    name: str
    what: str
    command: Sequence[str] = ()
    limit_seconds: float = 60.0
    skip: str | None = None
    # (stdout) -> figures, and everything it told.
    read: Callable[[str], tuple[list[Figure], Any]] = lambda _stdout: ([], None)


def main() -> int:
    arguments = _parse_arguments()
    try:
        _check_device(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    facts, out = hardware(arguments.device), arguments.out or RESULTS
    with tempfile.TemporaryDirectory(prefix="opd-gpu-check-") as folder:
        planned = all_steps(arguments.device, facts["gpu_memory_gib"], Path(folder))
        try:
            _check_names(arguments.only, planned)
            _check_folder(out)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        left_out = [step.name for step in planned if arguments.only and step.name not in arguments.only]
        outcomes = []
        for step in planned:
            if step.name in left_out:
                step = dataclasses.replace(step, skip="left out by --only")
            outcomes.append(run_step(step, arguments.device, started + arguments.budget_seconds - time.monotonic()))
            print(f"{outcomes[-1].status:<8}{outcomes[-1].seconds:6.0f} s  {step.name}  {outcomes[-1].reason}", flush=True)
    files = write_report(out, facts, outcomes, seconds=time.monotonic() - started, device=arguments.device, left_out=left_out)
    print("report  " + "\nreport  ".join(map(str, files)))
    return int(not has_passed(outcomes))


def _check_names(only: Sequence[str], planned: Sequence[Step]) -> None:
    """Raise ValueError for steps that there are not."""
    if unknown := set(only) - {step.name for step in planned}:
        raise ValueError(f"--only {' '.join(sorted(unknown))}: there are {', '.join(step.name for step in planned)}")


def _check_folder(out: Path) -> None:
    """Make the folder of the report; raise ValueError where it cannot be made or written into, before ten minutes are spent."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"no report can be written into {out}: {error.strerror}; name another folder by --out DIR") from None


def _check_device(arguments: argparse.Namespace) -> None:
    """Raise ValueError where there is no GPU to check, with torch's build and the driver."""
    if not 0 < arguments.budget_seconds < math.inf:
        raise ValueError(f"--budget-seconds {arguments.budget_seconds} must be positive and finite")
    if arguments.device == "cpu":
        if arguments.out is None or arguments.out.resolve() == RESULTS:
            raise ValueError(f"--device cpu needs another --out DIR: {RESULTS.relative_to(ROOT)} is for what GPUs did")
        return
    if driver.wants_cpu(os.environ):
        raise ValueError("OPD_DEVICE or CUDA_VISIBLE_DEVICES hides the GPUs that are to be checked; unset them")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} cannot be imported by {sys.executable}; give another Python (make gpu-check PYTHON=...), or "
            "pip install -e '.[demo,test]', which keeps a torch that is there"
        )
    machine, build = driver.find_machine(), driver.find_torch()
    driver.check_build(machine, build)
    import torch

    if not torch.cuda.is_available():
        if machine.num_gpus:
            raise ValueError(driver.why_unusable(machine, build, driver.cuda_failure()))
        loaded = f"NVIDIA driver {machine.driver} is loaded" if machine.driver else "no NVIDIA driver is loaded"
        raise ValueError(f"no GPU here to check: {loaded}, and {build}; run it on a GPU node")


def all_steps(device: str, gpu_memory_gib: float, folder: Path) -> list[Step]:
    """Return what is to be done, in this order: what shows a mistake comes first."""
    python, is_cpu = sys.executable, device == "cpu"
    xml, run = folder / "tests.xml", folder / "quickstart"
    sizes = ("training.steps=2", "evaluation.prompts=16", "data.task_size=1000") if is_cpu else ("training.steps=50", "evaluation.prompts=256")
    tokens = "4096" if gpu_memory_gib >= 40 else "1024"
    losses: tuple[str, ...] = ("--device", "cuda", "--tensor", "1", "--kinds", "reverse_kl", "--vocab", "151936", "--dtypes", "bfloat16")
    losses = (*losses, "--hidden", "4096", "--tokens", tokens, "--functions", "products", "fused", "torch")
    writing: tuple[str, ...] = ("--sequences", "4", "--response-tokens", "8", "--hidden", "128", "--layers", "1", "--rounds", "1")
    if not is_cpu:
        writing = ("--precision", "bf16", "--hidden", "1024", "--layers", "8", "--sequences", "64", "--batch-sequences", "64")
    return [
        Step(
            name="tests",
            what="tests/gpu: losses, messages, models and runs against the CPU in fp32, TF32 off",
            command=(python, "-m", "pytest", "-m", "gpu", "tests/gpu", f"--junitxml={xml}"),
            limit_seconds=280,
            read=lambda _stdout: read_tests(xml),
        ),
        Step(
            name="quickstart",
            what=f"the quickstart on 4 ranks, shortened to {sizes[0]}",
            command=(python, "-m", "recipes.run", "quickstart", "--nproc-per-node", "4", "--run-dir", str(run), *sizes),
            limit_seconds=100,
            skip=None if importlib.util.find_spec("reasoning_gym") else "needs reasoning-gym, which writes its prompts",
            read=lambda _stdout: read_run(run, must_learn=not is_cpu),
        ),
        Step(
            name="loss",
            what="the fused head beside its four matrix products and plain torch",
            command=(
                python,
                "tools/bench_loss.py",
                "--json",
                *(("--quick", "--functions", "products", "fused") if is_cpu else losses),
            ),
            limit_seconds=60,
            read=read_losses,
        ),
        *_bench_steps(device, gpu_memory_gib),
        Step(
            name="rollout",
            what="tokens written per second",
            command=(python, "tools/bench_rollout.py", "--json", *writing),
            limit_seconds=60,
            skip=None if (ROOT / "tools" / "bench_rollout.py").is_file() else "tools/bench_rollout.py is not there",
            read=read_rollouts,
        ),
    ]


def _bench_steps(device: str, gpu_memory_gib: float) -> list[Step]:
    """Return steps at two sizes, the smaller with both kinds of layers, on one GPU."""
    from opd_megatron.packages import probe

    bench = [sys.executable, "tools/bench_step.py"]
    one = ["student.layout.tensor=1", "teacher.layout.tensor=1"]
    if device == "cpu":
        base = [*bench, "quickstart", *one, "student.layout.pipeline=1", "data.batch_prompts=8", "training.micro_batch=8", "--prompt-tokens", "16"]
        small, large, needed = [*base, "--response-tokens", "4"], [*base, "--response-tokens", "8"], 0.0
    else:
        sizes = ["student.layout.sequence=false", "data.batch_prompts=16", "rollout.batch_sequences=16"]
        base = [*bench, "qwen3_1p7b_from_8b_8gpu_h100", *one, *sizes]
        small = [*base, "student.hf=models/Qwen3-0.6B", "teacher.hf=models/Qwen3-1.7B", "--prompt-tokens", "128", "--response-tokens", "128"]
        large, needed = [*base, "--prompt-tokens", "256", "--response-tokens", "256"], 70.0
    engine = probe("transformer_engine")
    lacks_memory = f"needs {needed:.0f} GiB of GPU memory, and there are {gpu_memory_gib:.0f}" if gpu_memory_gib < needed else None
    options = ("--steps", "2", "--warmup", "1", "--json")
    return [
        Step(
            name="step-local",
            what="a small step with Megatron-Core's local layers",
            command=(*small, *options, "training.layers=local"),
            limit_seconds=75,
            read=read_step,
        ),
        Step(
            name="step-te",
            what="the same with Transformer Engine's",
            command=(*small, *options, "training.layers=te"),
            limit_seconds=75,
            skip=None if engine.works else str(engine),
            read=read_step,
        ),
        Step(name="step-large", what="a large step", command=(*large, *options), limit_seconds=110, skip=lacks_memory, read=read_step),
    ]


def run_step(step: Step, device: str, left_seconds: float) -> Outcome:
    """Run one step within its limit and what is left of the budget; nothing that it started outlives it."""
    plain = {"name": step.name, "what": step.what, "command": shlex.join(step.command).replace(sys.executable, "python")}
    if step.skip is not None:
        return Outcome(**plain, status="skipped", reason=step.skip)
    limit = min(step.limit_seconds, left_seconds)
    if limit < 1:
        return Outcome(**plain, status="failed", reason="no time was left for it")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OPD_GPU_TESTS_DEVICE": device, **({"OPD_DEVICE": "cpu"} if device == "cpu" else {})}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(step.command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_session(process)
        seconds = time.monotonic() - started
        stdout, stderr = (_text_of(stream) for stream in (out, err))
    tail = "" if code == 0 else "\n".join([*stdout.splitlines()[-_TAIL_LINES:], *stderr.splitlines()[-_TAIL_LINES:]])
    try:
        figures, record = step.read(stdout)
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        figures, record = [], None
        if code == 0:
            return Outcome(**plain, status="failed", seconds=seconds, reason=f"left nothing to read: {type(error).__name__}: {error}", tail=stdout[-2000:])
    above = [figure.name for figure in figures if figure.fails]
    reason = f"took longer than {limit:.0f} s" if code is None else f"exit code {code}" if code else f"above the bar: {', '.join(above)}" if above else ""
    return Outcome(**plain, status="failed" if reason else "passed", seconds=seconds, reason=reason, figures=figures, record=record, tail=tail)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a step and the ranks it started, which are a session of its own; torchrun ends its workers, which are not, when it is asked to."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_SECONDS)


def _text_of(stream: Any) -> str:
    stream.seek(0)
    return str(stream.read())


def read_tests(xml: Path) -> tuple[list[Figure], Any]:
    """Return the figures that tests kept, and how many passed, failed and were skipped for what reason."""
    figures, skipped, failed, passed = [], [], [], 0
    for case in ElementTree.parse(xml).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("tests.gpu.")
        for kept in case.iter("property"):
            if kept.get("name") in ("figure", "speed"):
                figures.append(Figure(**json.loads(kept.get("value", "{}"))))
        if (skip := case.find("skipped")) is not None:
            skipped.append(f"{name}: {skip.get('message', '')}")
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        else:
            passed += 1
    if not passed and not failed:
        raise ValueError("no test ran")
    return figures, {"passed": passed, "failed": failed, "skipped": skipped}


def read_run(run: Path, *, must_learn: bool) -> tuple[list[Figure], Any]:
    """Return what a run of the quickstart came to; with `must_learn`, the student must end above where it began."""
    evaluations = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [record["accuracy"] for record in evaluations if record["who"] == "student"]
    seconds = sorted(step["step_seconds"] for step in steps)
    figures = [
        Figure(name="quickstart, accuracy lost by training", value=max(0.0, accuracies[0] - accuracies[-1]), bar=0.0 if must_learn else None),
        Figure(name="quickstart, seconds of a step (median)", value=seconds[len(seconds) // 2]),
    ]
    return figures, {"accuracy_before": accuracies[0], "accuracy_after": accuracies[-1], "steps": len(steps), "status": (run / "status").read_text().strip()}


def read_losses(stdout: str) -> tuple[list[Figure], Any]:
    """Return the fused head's ratio to its products, and its gradient error, of what tools/bench_loss.py printed."""
    record = json.loads(stdout.splitlines()[-1])
    figures = []
    for row in record["rows"]:
        title = f"loss {row['function']} {row['kind']} {row['dtype']} V={row['vocab']} T={record['tokens']} TP{row['tensor']}"
        if "ms" in row:
            figures.append(Figure(name=f"{title}, milliseconds", value=row["ms"]))
        if "ratio_to_products" in row and row["function"] == "fused":
            figures.append(Figure(name=f"{title}, ratio to its four products", value=row["ratio_to_products"], target=1.25))
        if row["function"] == "fused":
            figures.append(Figure(name=f"{title}, gradients against fp64", value=row["gradient_error"], bar=1e-2 if row["dtype"] == "bfloat16" else 1e-5))
    return figures, record


def read_step(stdout: str) -> tuple[list[Figure], Any]:
    """Return the time of a step and its phases, its rates, and its memory beside the plan, of what tools/bench_step.py printed."""
    record = json.loads(stdout.splitlines()[-1])
    title = names_of(record["parameters"])
    peak, planned = max(record["memory"]["peak_bytes"].values()), record["memory"]["planned_bytes"]
    phases = ("step", "rollout", "teacher", "forward_backward", "optimizer")
    figures = [Figure(name=f"step {title}, {phase} seconds", value=record["seconds"][phase]) for phase in phases]
    figures += [Figure(name=f"step {title}, {name}", value=value) for name, value in record["rates"].items()]
    figures.append(Figure(name=f"step {title}, GiB measured", value=peak / 2**30))
    return figures + ([Figure(name=f"step {title}, GiB planned", value=planned / 2**30)] if planned is not None else []), record


def read_rollouts(stdout: str) -> tuple[list[Figure], Any]:
    """Return each engine's rate, beside transformers' and with how much of the text differs, of what tools/bench_rollout.py printed."""
    record = json.loads(stdout.splitlines()[-1])
    figures = []
    for engine, row in record["rows"].items():
        figures.append(Figure(name=f"rollout {engine}, tokens per second", value=row["tokens_per_second"]))
        if engine != "transformers":
            figures.append(Figure(name=f"rollout {engine}, ratio to transformers", value=row["ratio_to_transformers"]))
            # Rounded, so that 0.99 of equal positions is not above the bar by the last bit. In bf16 two tokens of untrained weights are often equally likely,
            # and a text that took the other one is another from there on: a number to read, not to pass.
            differing, bar = round(1 - row["equal_positions"], 9), 0.01 if record["precision"] == "fp32" else None
            figures.append(Figure(name=f"rollout {engine}, share of positions that differ from transformers", value=differing, bar=bar))
    return figures, {**record, "skipped": [f"rollout {engine}: {why}" for engine, why in record["missing"].items()]}


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check a GPU node in less than ten minutes, and write one report.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report, default recipes/results")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="run these steps alone; the report says that the others were left out")
    parser.add_argument("--budget-seconds", type=float, default=BUDGET_SECONDS, help=f"for all steps together, default {BUDGET_SECONDS:.0f}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: put the CPU in the GPU's place, to test this check; needs --out")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
