"""A launch as one nemo-run Experiment, on this machine or on Slurm, with an exit code that tells the truth.

nemo-run starts and chains the steps. On Slurm what happens around the ranks (container, check, logs of an attempt, what follows a preemption)
is that of slurm/train.sbatch: the generated script sources slurm/common.sh. The only importer of nemo_run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from opd_megatron.launch.plan import PROJECT, Step

INSTALL = "pip install 'nemo-run==0.11.1' 'leptonai>=0.26.6,<0.28' in an environment of its own, or make .venv-launch/.installed"

# Ahead of the time limit, as in slurm/train.sbatch.
_STOP_SIGNAL = "TERM@600"
_OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}


@dataclass(frozen=True, kw_only=True)
class SlurmSite:
    """What a site wants to know. `options` are further sbatch options of the training job, True for those without a value."""

    account: str | None
    partition: str | None
    convert_partition: str | None
    time: str
    options: Mapping[str, str | bool] = field(default_factory=dict)


class Launcher:
    """The steps of one launch as an Experiment whose files lie under `home`; `site` is None on this machine."""

    def __init__(self, title: str, steps: Sequence[Step], home: Path, site: SlurmSite | None):
        if site is not None:
            _check_paths(home, steps)
        self.run = _import_nemo(home)
        self.steps, self.home, self.site = steps, home, site
        experiments = home / "experiments"
        self.folder = experiments / title / f"{title}_{time.time_ns()}"
        self.experiment = self.run.Experiment(
            title,
            id=self.folder.name,
            base_dir=str(home),
            log_level="ERROR",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
        )
        # Quiet here only: it is stored with the experiment, and `nemo experiment status` would print nothing.
        self.experiment.clean_mode = False

    def show(self) -> None:
        """Print what would be submitted, and leave nothing behind."""
        try:
            with self.experiment:
                self._add_steps()
                self.experiment.dryrun(log=False, delete_exp_dir=False)
            for step in self.steps:
                print(f"# {step.name}")
                print((self.folder / f"{step.name}_sbatch.sh").read_text() if self.site else self._local_line(step))
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                self.folder.parent.rmdir()

    def run_here(self) -> int:
        """Run all steps on this machine and return the exit code of the first that failed, its reason printed last."""
        os.chdir(PROJECT)
        with _stop_requests_reach_the_children(), self.experiment:
            self._add_steps()
            self.experiment.run()
        states = self.experiment.status(return_dict=True)
        for step in self.steps:
            if str(states[step.name]["status"]) != "SUCCEEDED":
                return _report(step.name, Path(states[step.name]["local_dir"]))
        return 0

    def submit(self) -> dict[str, str]:
        """Submit all steps to Slurm, each waiting for the one before, and return the numbers of the jobs. All or none: ValueError if one is refused."""
        from invoke.exceptions import UnexpectedExit

        try:
            with self.experiment:
                self._add_steps()
                self.experiment.run(detach=True)
        except BaseException as error:
            if taken := list(self._jobs().values()):
                subprocess.run(["scancel", *taken], check=False, timeout=60)
            if not isinstance(error, UnexpectedExit):
                raise
            refused = self.steps[len(taken)].name
            said = error.result.stderr.strip().splitlines()
            reason = [line for line in said if "try" not in line.lower()][-1:] or said[-1:] or [f"exit code {error.result.exited}"]
            raise ValueError(f"sbatch refused the job {refused!r}: {reason[0].removeprefix('sbatch: error: ')}; nothing is submitted") from None
        return self._jobs()

    def _jobs(self) -> dict[str, str]:
        # A handle is scheduler://session/number, and the number may name its cluster.
        return {job.id: job.handle.rpartition("/")[2].partition(";")[0] for job in self.experiment.jobs if job.handle}

    def _add_steps(self) -> None:
        before: list[str] = []
        for step in self.steps:
            # nemo-run reads templates in arguments, $$ is its dollar; on Slurm it joins them into a line of bash.
            words = [(shlex.quote(word) if self.site else word).replace("$", "$$") for word in step.arguments]
            script = self.run.Script(path=words[0], args=words[1:], entrypoint='"$OPD_PYTHON"' if self.site else _python())
            executor = self._slurm_executor(step, self.site) if self.site else self.run.LocalExecutor()
            self.experiment.add(script, executor=executor, name=step.name, dependencies=before, tail_logs=self.site is None)
            before = [step.name]

    def _slurm_executor(self, step: Step, site: SlurmSite) -> Any:
        trains = step.name == "train"
        return self.run.SlurmExecutor(
            account=site.account,
            partition=site.partition if trains else site.convert_partition,
            time=site.time,
            nodes=step.nodes,
            ntasks_per_node=step.tasks_per_node,
            gpus_per_node=step.gpus_per_node or None,
            signal=_STOP_SIGNAL if trains else None,
            open_mode="append",
            job_name_prefix="opd-",
            additional_parameters={"kill_on_invalid_dep": "yes", **(site.options if trains else {})},
            setup_lines=_setup_lines(step),
            # After nemo-run's own options, the last of which counts. They reach srun's line as they are.
            srun_args=[f"--chdir={shlex.quote(str(PROJECT))}", *(['--output="${LOG_DIR//%/%%}"/rank_%t.log'] if trains else []), '"${CONTAINER[@]}"'],
            # Else it would look for the generated files in other folders than it writes them to.
            tunnel=self.run.LocalTunnel(job_dir=str(self.home / "experiments")),
            packager=self.run.Packager(),
            # nemo-run would queue again what crashed.
            retries=0,
            poll_estimated_start_time=False,
        )

    def _local_line(self, step: Step) -> str:
        return f"cd {shlex.quote(str(PROJECT))} && {shlex.join([_python(), *step.arguments])}"


def follow_jobs(jobs: Mapping[str, str], *, interval_seconds: float = 5.0) -> int:
    """Wait until all jobs are over and return 0, or the exit code of the first that failed.

    Asks scontrol: nemo-run asks sacct, which sites without accounting do not have, and would call every job UNKNOWN.
    """
    facts: dict[str, dict[str, str]] = {}
    while len(facts) < len(jobs):
        for name, job in jobs.items():
            # Without its controller, scontrol asks again for a while.
            shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
            if shown.returncode and "Invalid job id" in shown.stderr:
                facts.setdefault(name, {"JobState": "lost", "ExitCode": "1:0"})
            found = dict(re.findall(r"(\w+)=(\S*)", shown.stdout))
            if found.get("JobState") in _OVER and name not in facts:
                facts[name] = found
                print(f"{name} {job} {found['JobState']}", flush=True)
        if len(facts) < len(jobs):
            time.sleep(interval_seconds)
    for name, job in jobs.items():
        if facts[name]["JobState"] != "COMPLETED":
            code, number = map(int, facts[name]["ExitCode"].split(":"))
            print(f"error: job {job} ({name}) ended as {facts[name]['JobState']}", file=sys.stderr, flush=True)
            return code or (128 + number if number else 1)
    return 0


def _import_nemo(home: Path) -> ModuleType:
    """Return nemo_run, which reads where its files lie when it is first imported; ValueError where it is not installed."""
    os.environ["NEMORUN_HOME"] = str(home)
    try:
        import nemo_run
    except ImportError as error:
        raise ValueError(f"nemo-run cannot be imported ({error}); {INSTALL}") from None
    return nemo_run


def _python() -> str:
    """Return the interpreter of every step, as slurm/common.sh chooses it: this one need not have torch."""
    own = PROJECT / ".venv" / "bin" / "python"
    return os.environ.get("OPD_PYTHON") or (str(own) if own.is_file() else "python")


def _check_paths(home: Path, steps: Sequence[Step]) -> None:
    """Raise ValueError for what nemo-run 0.11.1 would write into a script otherwise than it is."""
    if not re.fullmatch(r"[\w./+@:=,-]+", str(home)):
        raise ValueError(f"nemo-run does not quote the paths of its own files, which lie in '{home}'; set NEMORUN_HOME to a shared folder of plain letters")
    for word in (str(home), str(PROJECT), *(word for step in steps for word in step.arguments)):
        if "/nemo_run" in word:
            raise ValueError(f"'{word}': nemo-run takes /nemo_run for its own folder wherever it stands; use another path, a link will do")


def _setup_lines(step: Step) -> str:
    """Return what the generated script does ahead of srun."""
    lines = ["# What follows is slurm/common.sh's, as in slurm/*.sbatch. No line of it is printed.", "set +vx -euo pipefail"]
    lines += [f"cd {shlex.quote(str(PROJECT))}", "source slurm/common.sh"]
    if step.name == "train":
        recipe_arguments = shlex.join(step.arguments[2:])
        lines += [f"begin_attempt {recipe_arguments}", "end_attempt_at_exit"]
    else:
        lines.append(f"use_container {shlex.join(map(str, step.folders))}")
    return "\n" + "\n".join(lines)


@contextmanager
def _stop_requests_reach_the_children() -> Iterator[None]:
    """Pass TERM, USR1, HUP and Ctrl-C on as a TERM: nemo-run starts steps in sessions of their own, and would leave them running."""

    def forward(_number: int, _frame: object) -> None:
        for children in Path("/proc/self/task").glob("*/children"):
            for child in children.read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(name: str, folder: Path) -> int:
    """Print a failed step's last words, and return its exit code, which nemo-run's states do not tell."""
    # torchx leaves one of these for each step that has ended.
    ended = sorted(folder.rglob("SUCCESS"), key=lambda file: file.stat().st_mtime)
    if not ended:
        print(f"error: step {name!r} did not start", file=sys.stderr, flush=True)
        return 1
    (replica,) = json.loads(ended[-1].read_text())["roles"][name]
    words = Path(replica["stderr"]).read_text(errors="replace").strip().splitlines()
    code = replica["exitcode"]
    print("\n".join([f"step {name!r} ended with exit code {code}", *words[-1:]]), file=sys.stderr, flush=True)
    return code if code > 0 else 128 - code
