"""Launch a recipe with nemo-run, on this machine or on Slurm.

    python -m opd_megatron.launch RECIPE --executor local|slurm --run-dir DIR [KEY=VALUE ...]

Shows what would run; --submit runs it. Exit codes: 0 all steps succeeded (on Slurm without --wait: submitted), 2 the user's mistake, with nothing
submitted, 75 interrupted and resumable, anything else a failure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from opd_megatron.launch.nemo import Launcher, SlurmSite, follow_jobs
from opd_megatron.launch.plan import PROJECT, Chain, Step, check_idle, check_writable, fit_nodes
from opd_megatron.reporting.run_directory import given_path

EXIT_MISTAKE = 2
EXIT_KEYBOARD = 130


def main() -> int:
    """Show or run what the command line asks for, and return the exit code, as the module says."""
    arguments = _parse_arguments()
    run_dir = arguments.run_dir.absolute()
    # On shared storage, as the run itself, so that every node sees nemo-run's files.
    home = Path(os.environ.get("NEMORUN_HOME") or run_dir / "nemo").expanduser().absolute()
    missing = [folder for folder in (home, *home.parents, run_dir, *run_dir.parents) if not folder.exists()]
    submitted = False
    try:
        site = _site(arguments)
        check_idle(run_dir)
        steps = _steps(arguments, run_dir)
        check_writable(run_dir, "--run-dir")
        check_writable(home, "NEMORUN_HOME")
        launcher = Launcher(arguments.recipe, steps, home, site)
        if not arguments.submit:
            launcher.show()
            print("dry run: nothing is submitted; add --submit", flush=True)
            return 0
        jobs = launcher.submit() if site is not None else {}
        submitted = True
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_MISTAKE
    finally:
        if not submitted:
            _remove(missing, home)
    return _watch(jobs, launcher, arguments.wait) if site is not None else launcher.run_here()


def _site(arguments: argparse.Namespace) -> SlurmSite | None:
    """Return what Slurm needs to know, None on this machine; raise ValueError where something is missing."""
    for option in ("account", "partition", "convert_partition", "time"):
        if (value := getattr(arguments, option)) is not None and not re.fullmatch(r"[\w.:,@+-]+", value):
            raise ValueError(f"--{option.replace('_', '-')} {value!r} is no value that Slurm has; leave it out, or correct it")
    for word in arguments.slurm:
        if not re.fullmatch(r"(--)?[A-Za-z][\w-]*(=[^\s'\"]+)?", word):
            raise ValueError(f"--slurm {word!r} is not OPTION or OPTION=VALUE of sbatch, without blanks and quotes")
    image = os.environ.get("OPD_IMAGE", "")
    if arguments.executor == "local":
        if image:
            raise ValueError(f"OPD_IMAGE={image} is for --executor slurm; unset it, or run within the container")
        return None
    for option, what in (("account", "accounts"), ("partition", "partitions to choose from")):
        if getattr(arguments, option) is None:
            raise ValueError(f"--{option} is missing; --{option} none where the site has no {what}")
    if image.startswith(("/", "./", "../")) and not (PROJECT / image).exists():
        raise ValueError(f"OPD_IMAGE={image} does not exist")
    if arguments.submit and shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch here; submit where the cluster's jobs are submitted")
    options: dict[str, str | bool] = {}
    for word in arguments.slurm:
        name, equals, value = word.removeprefix("--").partition("=")
        if name.replace("-", "_") in ("nodes", "ntasks", "ntasks_per_node", "gpus_per_node", "account", "partition", "time", "job_name"):
            raise ValueError(f"--slurm {word}: a launch sets it itself, from the recipe or from an option of its own")
        if name == "dependency" and arguments.convert_from is not None:
            raise ValueError(f"--slurm {word}: training waits for the conversion of --convert-from; leave one of the two out")
        options[name.replace("-", "_")] = value if equals else True
    partition = _none(arguments.partition)
    return SlurmSite(
        account=_none(arguments.account),
        partition=partition,
        convert_partition=arguments.convert_partition or partition,
        time=arguments.time,
        options=options,
    )


def _none(word: str) -> str | None:
    return None if word == "none" else word


def _steps(arguments: argparse.Namespace, run_dir: Path) -> list[Step]:
    """Return what is to be run; raise ValueError for a recipe, or a number of nodes, that does not fit."""
    if not (PROJECT / "slurm" / "common.sh").is_file():
        raise ValueError(f"{PROJECT} is not the project's folder: there is no slurm/common.sh; launch from a checkout")
    chain = Chain(
        recipe=arguments.recipe,
        overrides=tuple(arguments.overrides),
        run_dir=run_dir,
        convert_from=arguments.convert_from and arguments.convert_from.absolute(),
        export=arguments.export and arguments.export.absolute(),
    )
    config = chain.check()
    world_size = config["world_size"]
    if arguments.executor == "local":
        nodes, tasks = fit_nodes(world_size, world_size if arguments.gpus_per_node is None else arguments.gpus_per_node, arguments.nodes)
        if nodes > 1:
            raise ValueError(f"world_size={world_size} is {nodes} nodes of {tasks} GPUs, and --executor local has one; use --executor slurm, or fewer ranks")
        return chain.steps(config, nodes, tasks, 0, launcher=("--nproc-per-node", str(world_size)))
    nodes, tasks = fit_nodes(world_size, 8 if arguments.gpus_per_node is None else arguments.gpus_per_node, arguments.nodes)
    return chain.steps(config, nodes, tasks, tasks)


def _watch(jobs: dict[str, str], launcher: Launcher, wait: bool) -> int:
    for name, job in jobs.items():
        print(f"{name} {job}")
    print(f"logs of the jobs: {launcher.folder}", flush=True)
    if not wait:
        return 0
    try:
        return follow_jobs(jobs)
    except KeyboardInterrupt:
        print("no longer waiting; the jobs go on", file=sys.stderr, flush=True)
        return EXIT_KEYBOARD


def _remove(folders: list[Path], home: Path) -> None:
    """Take back folders that were made for nothing."""
    if home in folders:
        shutil.rmtree(home, ignore_errors=True)
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m opd_megatron.launch", description="Launch a recipe with nemo-run; a dry run without --submit.")
    parser.add_argument("recipe", metavar="RECIPE", help="recipe name; python -m recipes.run --list shows them")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe, e.g. training.steps=10")
    parser.add_argument("--executor", choices=("local", "slurm"), required=True, help="this machine, or jobs of this cluster's Slurm")
    parser.add_argument("--run-dir", type=given_path, required=True, help="folder of this run, which every node can write; an existing one is resumed")
    parser.add_argument("--submit", action="store_true", help="run it; without, show what would be run")
    parser.add_argument("--wait", action="store_true", help="on Slurm: wait for the end of the jobs, and end with the code of the first that failed")
    parser.add_argument("--convert-from", type=given_path, metavar="HF_DIR", help="first convert this Hugging Face folder, and train from the checkpoint")
    parser.add_argument("--export", type=given_path, metavar="DIR", help="afterwards write the trained student as a Hugging Face folder")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="ranks of a full node; default 8 on Slurm, all ranks on this machine")
    parser.add_argument("--nodes", type=int, metavar="N", help="follows from the recipe; another number is refused")
    parser.add_argument("--account", help="Slurm account, or none")
    parser.add_argument("--partition", help="Slurm partition, or none for the default one")
    parser.add_argument("--convert-partition", metavar="PARTITION", help="where conversion and export run, without GPUs; default --partition")
    parser.add_argument("--time", default="4:00:00", help="time limit of each job (%(default)s); training stops and saves ten minutes ahead of it")
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="OPTION[=VALUE]", help="further sbatch option of the training job, e.g. --slurm exclusive --slurm mem=0"
    )
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
