"""Peak memory and time of a training step that keeps 100, 50, 20 or 10 % of its response tokens by TIP's soft_or_topk: `python tools/bench_selection.py`.

Level `head` is the loss part, from hidden states and LM heads to both gradients. Level `step` is a whole step of a small Megatron model, through
`Importance.weigh` and `Student.train_step`, with the teacher's rows as input. Each in two forms, whose kept tokens are compared:

    fused    statistics of all rows chunk by chunk without a graph (at `step` in a forward pass of its own), then the fused head on the kept rows;
             at 100 % nothing is weighed
    unfused  plain torch: both models' logits of all rows, the student's with a graph; fp32 statistics, one response at a time; then the divergence of
             the kept rows from their fp32 log-softmax. At 100 %, without statistics, it is the full-token form that savings are told against

Peak memory is the most that the step held beyond what was there before it; what was there ("held") are weights, gradient buffers, optimizer state, teacher
rows. It is measured in a process per row, whose allocator gives back what is freed, so that it is what tensors need. Time is the fastest of --repeats
interleaved rounds in one process, in seconds of the processor, which other processes disturb less than the clock; --json has both. Gradient errors are
relative, the largest of any weight (at `head` of hidden states or head), against the unfused form in fp64 on two short responses. CPU only.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

from bench_common import environment

FORMS = ("fused", "unfused")
LEVELS = ("head", "step")
SIZES = ("tokens", "response", "hidden", "model_hidden", "layers", "repeats")
# "Up to" these shares of the peak training memory are saved against an unfused baseline: TIP, arXiv 2604.14084.
PAPER_SAVINGS = {0.5: 0.47, 0.1: 0.58}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--vocab", nargs="+", type=int, default=[32_000, 151_936])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.2, 0.1], help="shares of the tokens that are kept, beside all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and hidden states")
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens of the step, in one micro-batch")
    parser.add_argument("--response", type=int, default=512, help="tokens of each response")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of both models at level head")
    parser.add_argument("--model-hidden", type=int, default=256, help="hidden size of both models at level step")
    parser.add_argument("--layers", type=int, default=4, help="layers of the student at level step")
    parser.add_argument("--repeats", type=int, default=2, help="interleaved rounds; the fastest of each row counts")
    parser.add_argument("--quick", action="store_true", help="a minute at most: a tiny problem, to see that the tool works")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    given = sys.argv[1:] if arguments is None else arguments
    if "--quick" in given:
        parser.set_defaults(vocab=[512], ratios=[0.5, 0.1], tokens=64, response=32, hidden=32, model_hidden=32, layers=1, repeats=1)
    options = parser.parse_args(given)
    if (problem := _problem_with(options)) is not None:
        print(problem, file=sys.stderr)
        return 2
    for name, value in {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}.items():
        os.environ.setdefault(name, value)
    sizes = {name: getattr(options, name) for name in SIZES}
    ratios = sorted({1.0, *options.ratios}, reverse=True)
    rows = []
    for level in options.levels:
        for vocab in options.vocab:
            print(f"level {level}, V = {vocab}, {options.tokens} tokens, {options.dtype}\n{_HEADER}", flush=True)
            found = _measure({"level": level, "vocab": vocab, "dtype": options.dtype, **sizes}, ratios)
            print("\n".join([*map(_line, found), *_verdicts(found)]), flush=True)
            rows += found
    if options.json:
        print(json.dumps({"environment": environment(("torch", "megatron-core")), "rows": rows}))
    return 0


def _problem_with(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the options, if anything is."""
    for name in SIZES:
        if getattr(options, name) < 1:
            return f"--{name.replace('_', '-')}={getattr(options, name)} must be at least 1"
    if options.tokens % options.response:
        return f"--tokens={options.tokens} must be a multiple of --response={options.response}"
    for vocab in options.vocab:
        if vocab < 2:
            return f"--vocab={vocab} must be at least 2"
    for ratio in options.ratios:
        if not 0 < ratio <= 1 or math.floor(ratio * options.response) < 1:
            return f"--ratios={ratio} must be in (0, 1] and keep at least one token of --response={options.response}"
    return None


def _measure(case: dict[str, Any], ratios: Sequence[float]) -> list[dict[str, Any]]:
    """Return a row for each form at each ratio, with what it saves of the unfused form of all tokens, and of its own."""
    timed, errors = (_in_a_process(name, {**case, "ratios": ratios}) for name in ("measure_time", "measure_errors"))
    rows = []
    for form in FORMS:
        for ratio in ratios:
            one = {**case, "form": form, "ratio": ratio}
            rows.append({**one, **_in_a_process("measure_memory", one), **timed[form, ratio], **errors[form, ratio]})
    full = {row["form"]: row for row in rows if row["ratio"] == 1}
    for row in rows:
        row["saved"] = _saved(row, full["unfused"], "peak_mib")
        row["saved_with_held"] = _saved(row, full["unfused"], "held_mib", "peak_mib")
        row["saved_of_own"] = _saved(row, full[row["form"]], "peak_mib")
        row["time_of_own"] = row["cpu_seconds"] / full[row["form"]]["cpu_seconds"]
        row["time_of_unfused"] = row["cpu_seconds"] / full["unfused"]["cpu_seconds"]
    return rows


def _in_a_process(name: str, case: dict[str, Any]) -> dict[Any, Any]:
    """Call one of the levels' measurements in a new process, forked from one that has imported torch and Megatron-Core."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["opd_megatron.training.importance"])
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(_call, name, case).result()


def _call(name: str, case: dict[str, Any]) -> dict[Any, Any]:
    import bench_selection_levels

    measured: dict[Any, Any] = getattr(bench_selection_levels, name)(SimpleNamespace(**case))
    return measured


def _saved(row: dict[str, Any], reference: dict[str, Any], *parts: str) -> float:
    return float(1 - sum(row[part] for part in parts) / sum(reference[part] for part in parts))


_HEADER = (
    f"{'':16}{'CPU seconds':^24}{'against 100 %':^20}{'MiB':^16}{'saved of unfused 100 %':^24}{'of own':>8}{'gradient':>12}{'tokens':>8}\n"
    f"{'form':9}{'kept':>7}{'weigh':>8}{'train':>8}{'all':>8}{'own':>10}{'unfused':>10}{'held':>8}{'peak':>8}"
    f"{'of peak':>12}{'and held':>12}{'100 %':>8}{'error':>12}{'differ':>8}"
)


def _line(row: dict[str, Any]) -> str:
    seconds = "".join(f"{row[key]:>8.2f}" for key in ("weigh_cpu_seconds", "train_cpu_seconds", "cpu_seconds"))
    ratios = f"{row['time_of_own']:>10.2f}{row['time_of_unfused']:>10.2f}"
    saved = f"{row['saved']:>12.1%}{row['saved_with_held']:>12.1%}{row['saved_of_own']:>8.1%}"
    memory = f"{row['held_mib']:>8.0f}{row['peak_mib']:>8.0f}{saved}"
    return f"{row['form']:9}{row['ratio']:>7.0%}{seconds}{ratios}{memory}{row['gradient_error']:>12.1e}{row['tokens_differ']:>8}"


def _verdicts(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what is saved beside the paper's figures, and how much of it is the selection's."""
    found = {(row["form"], row["ratio"]): row for row in rows}
    for ratio, paper in PAPER_SAVINGS.items():
        if ("fused", ratio) in found:
            fused, unfused = (found[form, ratio] for form in FORMS)
            yield (
                f"{ratio:.0%} kept, against the unfused full-token form: fused saves {fused['saved']:.1%} ({fused['saved_with_held']:.1%} with what is held), "
                f"unfused {unfused['saved']:.1%} ({unfused['saved_with_held']:.1%}); the paper: up to {paper:.0%}.\n"
                f"    With a fused head the full-token form has shrunk as well: of that, fused {ratio:.0%} saves {fused['saved_of_own']:.1%}."
            )


if __name__ == "__main__":
    sys.exit(main())
