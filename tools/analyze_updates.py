"""What a run did to its student's weights: where the update is, how few directions it has, and what its parts are worth.

    python tools/analyze_updates.py RUN_DIR
    python tools/analyze_updates.py RUN_DIR --window 2 --recover 0.01 0.1 --prompts 256

Compares the weights that the run began with (its student, named as in RUN_DIR/config.json, from this working directory, or `--base`) with a checkpoint, by
default its last one, and with an early one, by default the nearest to a tenth of the run. Checkpoints of any layout are read without ranks. To have early
ones, run with `checkpoint.every_steps=10 checkpoint.keep=100`. `--window` and `--recover` measure accuracies, as the run did, with parts of the update.
Tables go to the terminal, everything to RUN_DIR/analysis. Exit code 2 and one line on stderr for wrong input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import opd_megatron

if TYPE_CHECKING:
    from opd_megatron.analysis.experiments import Outcome
    from opd_megatron.analysis.measure import Group, Measured
    from opd_megatron.analysis.updates import AnalyzedRun

_FILE_WIDTH = 160


def main() -> int:
    arguments = _parse_arguments()
    opd_megatron.import_megatron()
    from opd_megatron.parallel.world import leave_world

    try:
        _check_numbers(arguments)
        _analyze(arguments)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        # Threads of a process group that outlive the interpreter abort it.
        leave_world()
    return 0


def _analyze(arguments: argparse.Namespace) -> None:
    import torch

    from opd_megatron.analysis.figures import write_figures
    from opd_megatron.analysis.measure import measure
    from opd_megatron.analysis.record import as_record
    from opd_megatron.analysis.updates import open_run

    run = open_run(arguments.run_dir, base=arguments.base, early=arguments.early, final=arguments.final)
    layers = run.final.architecture.num_layers
    if arguments.window is not None and not 0 <= arguments.window < layers:
        raise ValueError(f"--window {arguments.window} must be from 0 to {layers - 1}: the model has {layers} layers")
    folder = run.directory.path / "analysis"
    file = arguments.json or folder / "updates.json"
    _make_folder("--json", file.parent)
    _make_folder("--plots", arguments.plots or folder)
    # Singular values of a large model take long: whatever else may be wrong is found before.
    experiments = _open_experiments(run, arguments) if arguments.window is not None or arguments.recover else None
    console = _console()
    with console.status("") as status:
        measured = measure(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"), lambda row: status.update(f"measuring {escape(row.name)}"))
    _show(console, run, measured)
    outcomes = experiments(console) if experiments is not None else []
    _write(file, json.dumps(as_record(run, measured, outcomes), indent=1, allow_nan=False) + "\n")
    for path in [file, *write_figures(measured, outcomes, arguments.plots or folder)]:
        console.print(f"wrote {path}", markup=False)


def _open_experiments(run: AnalyzedRun, arguments: argparse.Namespace) -> Callable[[Console], list[Outcome]]:
    """Load the model; return what measures parts of the update, each told as soon as it is known."""
    from opd_megatron.analysis.experiments import carry_out, plan_experiments
    from opd_megatron.analysis.figures import experiment_label
    from opd_megatron.analysis.held_out import open_evaluation
    from opd_megatron.models.weight_map import weight_map
    from opd_megatron.parallel.world import join_world

    edited, evaluate = open_evaluation(run, join_world(), arguments.prompts)
    architecture = run.final.architecture
    planned = plan_experiments(
        weight_map(architecture), architecture.num_layers, radius=arguments.window, fractions=arguments.recover, has_early=run.early is not None
    )

    def measure_all(console: Console) -> list[Outcome]:
        console.print("\nAccuracy on the run's held-out prompts with part of the update, and that part's norm")
        return carry_out(planned, edited, evaluate, lambda outcome: tell(console, outcome))

    def tell(console: Console, outcome: Outcome) -> None:
        console.print(f"{experiment_label(outcome):<32} {outcome.accuracy:7.1%}   {outcome.update_norm:.4g}", markup=False, highlight=False)

    return measure_all


def _show(console: Console, run: AnalyzedRun, measured: Measured) -> None:
    from opd_megatron.analysis.measure import group, grouped

    console.print(f"{run.directory.path}: {run.base_path} to step {run.final_step}, ||dW|| {measured.norm:.4g}", markup=False)
    if run.early_step is None:
        console.print("no earlier checkpoint, so nothing on early directions; run with checkpoint.every_steps=10 checkpoint.keep=100")
    else:
        console.print(f"early: step {run.early_step}, {run.early_step / run.final_step:.0%} of the run")
    if (floor := measured.rounding_floor) is not None:
        rounded = sum(tensor.is_rounded for tensor in measured.tensors)
        console.print(f"{rounded} tensors are stored in 16 bits alone: of their update about {floor:.3g} is rounding, which raises effective ranks")
    console.print(f"embeddings of tokens before and after: cosine {measured.embedding_cosine:.4f}")
    still = [tensor.name for tensor in measured.tensors if not tensor.norm]
    if still:
        console.print(f"not moved: {len(still)} tensors, first {still[0]}", markup=False)
    console.print(_table("kind", grouped(measured.tensors, lambda tensor: tensor.kind), "By kind of module"))
    console.print(_table("third", grouped(measured.tensors, lambda tensor: measured.third_of(tensor.layer)), "By third of the layers"))
    console.print(_table("module", {**grouped(measured.matrices, lambda tensor: tensor.module), "all": group(measured.matrices)}, "Attention and MLP matrices"))
    inside = [tensor for tensor in measured.tensors if tensor.layer is not None and len(tensor.shape) == 2]
    console.print(_table("layer, module", grouped(inside, lambda tensor: f"{tensor.layer} {tensor.module}"), "Every layer; experts of a layer together"))


def _table(name: str, groups: dict[object, Group], title: str) -> Table:
    columns = ("||dW||", "share", "spectral norm", "spectral / F", "effective rank", "of all", "top 1 %", "early cosine", "by chance", "first cosine")
    table = Table(name, *columns, title=title, title_justify="left")
    for value, group in groups.items():
        table.add_row(
            str(value),
            f"{group.norm:.4g}",
            _percent(group.share),
            _number(group.spectral_norm, ".4g"),
            _percent(group.spectral_share),
            _number(group.effective_rank, ".1f"),
            _percent(group.effective_rank_share),
            _percent(group.top_share),
            _number(group.alignment, ".3f"),
            _number(group.alignment_by_chance, ".3f"),
            _number(group.first_cosine, ".3f"),
        )
    return table


def _percent(value: float | None) -> str:
    return _number(value, ".1%")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _console() -> Console:
    """Return the terminal, or for a file a width that no column is cut at."""
    console = Console(soft_wrap=True)
    return console if console.is_terminal else Console(soft_wrap=True, width=_FILE_WIDTH)


def _make_folder(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: folder {folder} cannot be written: {error.strerror or error}; name another") from error


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise ValueError(f"--json {file} cannot be written: {error.strerror or error}; name another file") from error


def _check_numbers(arguments: argparse.Namespace) -> None:
    outside = [fraction for fraction in arguments.recover if not 0 < fraction <= 1]
    if outside:
        raise ValueError(f"--recover {outside[0]:g} must be above 0 and at most 1: a fraction of the rank")
    if arguments.prompts is not None and arguments.prompts < 1:
        raise ValueError(f"--prompts {arguments.prompts} must be at least 1")
    if arguments.prompts is not None and arguments.window is None and not arguments.recover:
        raise ValueError("--prompts is for --window or --recover: without them no model is run")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a run did to its student's weights.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--base", metavar="HF_DIR", help="the weights before step 1; default: the run's student")
    parser.add_argument("--early", type=int, metavar="STEP", help="default: the checkpoint nearest to a tenth of the run")
    parser.add_argument("--final", type=int, metavar="STEP", help="default: the last checkpoint")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: RUN_DIR/analysis/updates.json")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="default: RUN_DIR/analysis")
    parser.add_argument("--window", type=int, metavar="RADIUS", help="accuracy with the update of attention or MLP in layers within RADIUS of each")
    parser.add_argument("--recover", type=float, nargs="+", default=[], metavar="FRACTION", help="accuracy with the first FRACTION of every matrix's rank")
    parser.add_argument("--prompts", type=int, metavar="N", help="the first N held-out prompts only")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
