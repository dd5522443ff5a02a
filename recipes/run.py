"""The only way to run a recipe.

    python -m recipes.run --list
    python -m recipes.run NAME --check [KEY=VALUE ...]
    torchrun --nproc-per-node N -m recipes.run NAME --run-dir DIR [KEY=VALUE ...]

Under Slurm the same line runs with one task per GPU. On one machine `--nproc-per-node N` without torchrun starts the ranks too, and keeps
their exit codes, which torchrun turns into 1: 0 finished, 2 the user's mistake, 75 interrupted and resumable, anything else a crash.
Nothing but an actual run imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import opd_megatron
import recipes
from opd_megatron.config import RunConfig, apply_overrides
from opd_megatron.driver import check_before_torch, check_usable
from opd_megatron.launch.local import launch_local
from opd_megatron.reporting.cause import leave_cause
from opd_megatron.reporting.run_directory import RunDirectory, given_path
from opd_megatron.training.preflight import MAY_CHANGE, check_run
from opd_megatron.training.stop_signals import StopSignals

# Architectures of models that may not be on this machine.
PUBLISHED = (Path(__file__).parent / "architectures", Path(__file__).parent / "assets")
EXIT_CRASH = 1
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 75
_MOST_RANKS_HERE = 256
# What a shell gives a program that Ctrl-C ended.
EXIT_KEYBOARD = 130


def all_recipes() -> dict[str, Callable[[], RunConfig]]:
    """Return every recipe by name: the public zero-argument functions of the modules in this folder."""
    found: dict[str, Callable[[], RunConfig]] = {}
    for module_info in sorted(pkgutil.iter_modules(recipes.__path__), key=lambda info: info.name):
        if module_info.name in ("run", "shared", "alignments"):
            continue
        module = importlib.import_module(f"recipes.{module_info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                found[name] = function
    return found


def find_recipe(name: str) -> Callable[[], RunConfig]:
    """Return a recipe, or raise ValueError with the close names."""
    known = all_recipes()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(known)}"
    raise ValueError(f"unknown recipe {name!r}; {hint}")


def resolve(name: str, overrides: list[str], world_size: int | None) -> RunConfig:
    """Return a recipe with its overrides applied and everything checked that needs no process group."""
    config = apply_overrides(find_recipe(name)(), overrides)
    check_run(config, world_size if world_size is not None else config.world_size)
    return config


def main() -> int:
    arguments = _parse_arguments()
    if arguments.list:
        for name, function in all_recipes().items():
            print(f"{name:<44} {(inspect.getdoc(function) or '').splitlines()[0]}")
        return 0
    # A rank that is asked to stop while it imports and loads stops with the others; the launcher of ranks passes signals on.
    signals = StopSignals() if arguments.nproc_per_node is None and not arguments.check else None
    try:
        if not arguments.name:
            raise ValueError("name a recipe; --list shows them")
        ranks = arguments.nproc_per_node
        if ranks is not None and not 1 <= ranks <= _MOST_RANKS_HERE:
            raise ValueError(f"--nproc-per-node {ranks} must be at least 1, and at most {_MOST_RANKS_HERE} on one machine")
        if ranks is not None and "RANK" in os.environ:
            raise ValueError("--nproc-per-node starts ranks, and this process is a rank of torchrun or srun already (RANK is set); leave one of the two out")
        config = resolve(arguments.name, arguments.overrides, ranks or _world_size())
        check_before_torch(arguments.name, runs=not arguments.check)
        if arguments.run_dir is not None:
            RunDirectory(arguments.run_dir).check(recipe=arguments.name, config=config.to_json(), may_change=MAY_CHANGE)
        if arguments.check:
            print(json.dumps(config.to_json(), indent=2))
            return 0
        if arguments.run_dir is None:
            raise ValueError("--run-dir is missing: it names the folder for checkpoints, metrics and the exported student")
        if ranks is None and _world_size() is None:
            _check_alone(config)
    except ValueError as error:
        return _mistake(error)
    if ranks is not None:
        return _launch(arguments, ranks)
    return _run(arguments.name, config, arguments.run_dir, signals)


def _launch(arguments: argparse.Namespace, ranks: int) -> int:
    code = launch_local([arguments.name, "--run-dir", str(arguments.run_dir), *arguments.overrides], ranks)
    directory = RunDirectory(arguments.run_dir)
    if code not in (0, EXIT_MISTAKE, EXIT_INTERRUPTED) and directory.read_status() == "running":
        # Rank 0 was killed before it could say so.
        directory.write_status("crashed")
    return code


def _check_alone(config: RunConfig) -> None:
    """Raise ValueError for a run that no launcher started and that one rank cannot hold."""
    try:
        config.check_world(1)
    except ValueError as error:
        raise ValueError(f"{error}; this process is the only rank: add --nproc-per-node {config.world_size}, or start it by torchrun or srun") from None


def _run(name: str, config: RunConfig, run_dir: Path, signals: StopSignals | None) -> int:
    opd_megatron.import_megatron()
    from opd_megatron.training.free_memory import make_catalogue
    from opd_megatron.training.job import run_job

    try:
        check_usable(config.training.precision)
        status = run_job(name, config, run_dir, signals, make_catalogue(PUBLISHED, all_recipes()))
        return EXIT_INTERRUPTED if status == "interrupted" else 0
    except ValueError as error:
        code = _mistake(error)
    except KeyboardInterrupt:
        code = EXIT_KEYBOARD
    except Exception as error:
        code = _crash(error)
    # Peers may be gone: an orderly shutdown of the process groups would wait for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _mistake(error: ValueError) -> int:
    """Print the message once: mistakes are found by all ranks alike, and rank 0 must be heard before the launcher ends the others."""
    if _rank() == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
        leave_cause(str(error), is_mistake=True)
    else:
        time.sleep(1)
    return EXIT_MISTAKE


def _crash(error: Exception) -> int:
    """Print what happened, the cause last. A rank that only lost its peers says so in a line, and late: the cause is elsewhere."""
    if re.search(r"connection (closed|reset) by peer", str(error), re.IGNORECASE):
        time.sleep(1)
        reason = str(error).splitlines()[0].partition(". This is typically")[0]
        print(f"rank {_rank()}: lost another rank ({reason})", file=sys.stderr, flush=True)
        return EXIT_CRASH
    # torch appends the C++ frames of its own libraries to the message.
    print(re.sub(r"^frame #\d+:.*\n", "", traceback.format_exc(), flags=re.MULTILINE), file=sys.stderr, flush=True)
    leave_cause(f"{type(error).__name__}: {error}")
    return EXIT_CRASH


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.run", description="Run a recipe.")
    parser.add_argument("name", nargs="?", help="recipe name")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe, e.g. training.steps=10")
    parser.add_argument("--list", action="store_true", help="print the recipes, one line each")
    parser.add_argument("--check", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--run-dir", type=given_path, help="folder of this run; an existing one is resumed")
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="start N ranks on this machine; not under torchrun or srun")
    return parser.parse_intermixed_args()


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _world_size() -> int | None:
    """Return the size of the job this process is part of; None outside of one, where the recipe's own size is checked."""
    name = "WORLD_SIZE" if "RANK" in os.environ else "SLURM_NTASKS" if "SLURM_PROCID" in os.environ else ""
    size = os.environ.get(name, "")
    if not size:
        return None
    if not size.isdecimal():
        raise ValueError(f"environment variable {name}={size!r} is not a number of ranks")
    # An allocation of one task is no job of ranks.
    return int(size) if name == "WORLD_SIZE" or int(size) > 1 else None


if __name__ == "__main__":
    sys.exit(main())
