"""What goes wrong under Slurm, injected for real: ranks, nodes, disks, clocks, signals, the controller. The table in slurm/README.md is made of these tests.

Every job must end by itself with its cause last, lose nothing but the steps since the last save, and leave a folder that the next attempt goes on from.
Not covered: several machines (the nodes here share one kernel and one disk), NCCL, GPUs, accounting.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.disks import file_system
from tests.programs import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import (
    ENDLESS,
    SITE,
    STEPS,
    assert_same_weights,
    end_of,
    log_of,
    measured,
    pid_of_rank,
    status_of,
    submit,
    wait_for_steps,
    wait_until,
)


def last_line(run: Path) -> str:
    return log_of(run).splitlines()[-1]


def code_of(facts: dict[str, str]) -> tuple[str, str]:
    return facts["JobState"], facts["ExitCode"]


def checkpoints_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def resume(cluster: Cluster, run: Path, *words: str, **variables: str) -> None:
    """Submit the same line again; it must finish."""
    facts = end_of(cluster, submit(cluster, run, *words, **variables))
    assert code_of(facts) == ("COMPLETED", "0:0"), log_of(run)
    assert status_of(run) == "finished"


def wrapped_python(file: Path, script: str) -> str:
    """Return an interpreter that runs this shell script instead; `$PYTHON` in it is the real one."""
    file.write_text(f"#!/usr/bin/env bash\nPYTHON={sys.executable}\n{script}\n")
    file.chmod(0o755)
    return str(file)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# ---- ranks


@pytest.mark.slow
def test_a_killed_rank_and_a_flipped_bit_lose_the_steps_since_the_last_whole_save(
    cluster: Cluster, small_run: list[str], whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run, *small_run, *STEPS)
    wait_for_steps(run, 12)
    with measured("a killed rank", 60):
        os.kill(pid_of_rank(run, 3), signal.SIGKILL)
        facts = end_of(cluster, job)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), log_of(run)
    assert last_line(run) == "error: n2: task 3: Killed"
    assert status_of(run) == "crashed"
    newest = run / "checkpoints" / "step_10"
    flip_a_bit(next(newest.glob("*.distcp")))
    resume(cluster, run, *small_run, *STEPS)
    told = (run / "logs" / "latest" / "rank_0.log").read_text()
    assert "step_10 is damaged" in told
    assert re.search(r"resumed from \S*step_5\b", told)
    assert_same_weights(run, whole)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_with_the_stacks_of_all(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    hanging = 'exec "$PYTHON" -c "import sys, tests.hanging; sys.exit(tests.hanging.main())" 1 asleep "${@:3}"'
    python = wrapped_python(tmp_path / "python", f'case "$*" in *--check*) exec "$PYTHON" "$@" ;; esac\n{hanging}')
    job = submit(cluster, run, *small_run, "training.steps=500", "checkpoint.every_steps=1", "training.watchdog_seconds=10", OPD_PYTHON=python)
    wait_for_steps(run, 2)
    with measured("a rank that hangs, with a watchdog of 10 s", 90):
        facts = end_of(cluster, job)
    assert facts["JobState"] == "FAILED", log_of(run)
    assert re.fullmatch(r"error: rank \d: no progress for 10 seconds in the phase 'train' of step 3 \(training.watchdog_seconds\)", last_line(run))
    logs = [(run / "logs" / "latest" / f"rank_{rank}.log").read_text() for rank in range(4)]
    assert all("its threads stand at" in log for log in logs), "of every rank"
    assert "in hang" in logs[1]
    assert status_of(run) == "crashed"
    # The second step's may have been on its way to the disk.
    assert [name for name in checkpoints_of(run) if not name.endswith(".partial")][-1] in ("step_1", "step_2")


@pytest.mark.slow
def test_a_run_whose_loss_is_not_finite_ends_after_the_steps_it_may_skip(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("training.steps=500", "checkpoint.every_steps=1", "training.learning_rate=1e30", "training.max_skipped_steps=3")
    job = submit(cluster, run, *small_run, *words)
    wait_for_steps(run, 1)
    with measured("a loss that is not finite", 90):
        facts = end_of(cluster, job)
    assert code_of(facts) == ("FAILED", "1:0"), log_of(run)
    assert "RuntimeError: 3 steps in a row were skipped" in last_line(run)
    assert "lower training.learning_rate, or resume from an earlier checkpoint" in last_line(run)
    assert status_of(run) == "crashed"


# ---- stop signals


def term_ranks(cluster: Cluster, job: int, run: Path) -> None:
    cluster.run("scancel", "--signal=TERM", str(job))


def term_all_twice(cluster: Cluster, job: int, run: Path) -> None:
    for _ in range(2):
        cluster.run("scancel", "--signal=TERM", str(job))
        cluster.run("scancel", "--batch", "--signal=TERM", str(job))


def term_rank_2(cluster: Cluster, job: int, run: Path) -> None:
    os.kill(pid_of_rank(run, 2), signal.SIGTERM)


def term_in_a_save(cluster: Cluster, job: int, run: Path) -> None:
    pids = [pid_of_rank(run, rank) for rank in range(4)]
    wait_until(lambda: list((run / "checkpoints").glob("*.partial")), "a save begins")
    for pid in pids:
        os.kill(pid, signal.SIGTERM)


STOPS: dict[str, Callable[[Cluster, int, Path], None]] = {
    "during a save": term_in_a_save,
    "twice, to ranks and script": term_all_twice,
    "to one rank": term_rank_2,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPS)
def test_a_stop_saves_what_was_done(cluster: Cluster, small_run: list[str], tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run, *small_run, *ENDLESS, OPD_MAX_RESTARTS="0")
    wait_for_steps(run, 3)
    with measured(f"a stop {name}", 60):
        STOPS[name](cluster, job, run)
        facts = end_of(cluster, job)
    assert code_of(facts) == ("FAILED", "75:0"), log_of(run)
    assert status_of(run) == "interrupted"
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert f"step_{done}" in checkpoints_of(run)
    assert not list((run / "checkpoints").glob("*.partial"))
    resume(cluster, run, *small_run, f"training.steps={done + 1}", "checkpoint.every_steps=5")
    assert f"step_{done}\n" in (run / "logs" / "latest" / "rank_0.log").read_text().split("resumed from")[1]


def check_runs(cluster: Cluster, job: int, run: Path) -> None:
    wait_until(lambda: f"{job}.0" in cluster.run("squeue", "--steps", "--noheader", "--format=%i").stdout, "the recipe is checked")


def ranks_start(cluster: Cluster, job: int, run: Path) -> None:
    wait_until(lambda: list((run / "logs").glob("attempt_0/rank_0.log")), "the ranks are started")


def ranks_import(cluster: Cluster, job: int, run: Path) -> None:
    ranks_start(cluster, job, run)
    time.sleep(1.5)


EARLY = {"while the recipe is checked": check_runs, "while Python starts": ranks_start, "while the ranks import": ranks_import}


@pytest.mark.slow
@pytest.mark.parametrize("name", EARLY)
def test_a_stop_before_the_first_step_is_no_crash(cluster: Cluster, small_run: list[str], tmp_path: Path, name: str) -> None:
    """The job is queued again, as often as it may be: here never."""
    run = tmp_path / "run"
    job = submit(cluster, run, *small_run, *ENDLESS, OPD_MAX_RESTARTS="0")
    EARLY[name](cluster, job, run)
    with measured(f"a stop {name}", 90):
        term_ranks(cluster, job, run)
        facts = end_of(cluster, job)
    assert code_of(facts) == ("FAILED", "75:0"), log_of(run)
    assert "OPD_MAX_RESTARTS=0 is reached" in last_line(run)
    assert not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text()
    assert not (run / "status").exists() or status_of(run) == "interrupted"


@pytest.mark.slow
def test_a_job_that_its_user_cancels_saves_and_does_not_come_back(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run, *small_run, *ENDLESS)
    wait_for_steps(run, 3)
    with measured("scancel", 60):
        cluster.run("scancel", str(job))
        facts = end_of(cluster, job)
    time.sleep(3)
    facts = cluster.show(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), log_of(run)
    assert status_of(run) == "interrupted"


@pytest.mark.slow
def test_a_job_that_is_requeued_while_it_exports_exports_again(cluster: Cluster, small_run: list[str], whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run, *small_run, *STEPS)
    wait_until(lambda: (run / "checkpoints" / "step_30").exists(), "the last step is saved")
    cluster.run("scontrol", "requeue", str(job))
    facts = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log_of(run)
    assert status_of(run) == "finished"
    assert_same_weights(run, whole)


# ---- Slurm itself


@pytest.mark.slow
def test_a_killed_srun_ends_the_job(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run, *small_run, *ENDLESS)
    wait_for_steps(run, 6)
    ranks = [pid_of_rank(run, rank) for rank in range(4)]
    with measured("a killed srun", 90):
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"srun") and str(run).encode() in words:
                    os.kill(int(process.name), signal.SIGKILL)
        facts = end_of(cluster, job)
    assert code_of(facts) == ("FAILED", "137:0"), log_of(run)
    assert "srun ended with 137, and no rank said why" in last_line(run)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), "no rank is left")
    assert status_of(run) in ("crashed", "interrupted")
    assert "step_5" in checkpoints_of(run)


@pytest.mark.slow
def test_a_stop_while_the_controller_is_away_is_queued_again_when_it_is_back(
    cluster: Cluster, small_run: list[str], whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run, *small_run, *STEPS)
    wait_for_steps(run, 3)
    os.kill(int((cluster.folder / "slurmctld.pid").read_text()), signal.SIGKILL)
    wait_for_steps(run, 6)
    os.kill(pid_of_rank(run, 0), signal.SIGTERM)
    wait_until(lambda: "waiting for Slurm's controller" in log_of(run), "the script asks for the controller")
    subprocess.run(["slurmctld", "-f", str(cluster.folder / "slurm.conf")], check=True, timeout=30, env=cluster.environment)
    facts = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log_of(run)
    assert_same_weights(run, whole)


@pytest.mark.slow
def test_a_port_that_something_else_listens_on_is_left_to_it(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    """As that of a job whose number is 10,000 less."""
    run = tmp_path / "run"
    job = submit(cluster, run, *small_run, "training.steps=1", site=(*SITE, "--hold"))
    port = 20000 + job % 10000
    with socket.create_server(("0.0.0.0", port)):
        cluster.run("scontrol", "release", str(job))
        facts = end_of(cluster, job)
    assert facts["JobState"] == "COMPLETED", log_of(run)
    assert f"master=127.0.0.1:{port}" not in log_of(run)


# ---- disks and clocks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    with file_system(tmp_path / "disk", "64m") as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("left", [200_000, 0], ids=["too little for a save", "nothing, not even for a line of a log"])
def test_a_full_disk_ends_the_job_and_takes_no_checkpoint(
    cluster: Cluster, small_run: list[str], whole: dict[str, torch.Tensor], small_disk: Path, tmp_path: Path, left: int
) -> None:
    run = tmp_path / "run"
    run.symlink_to(small_disk / "run")
    (small_disk / "run").mkdir()
    job = submit(cluster, run, *small_run, *STEPS)
    wait_until(lambda: (run / "checkpoints" / "step_5").exists(), "a checkpoint")
    with measured("a full disk", 90):
        fill(small_disk, left)
        facts = end_of(cluster, job)
    assert facts["JobState"] == "FAILED", log_of(run)
    if left:
        assert facts["ExitCode"] == "2:0"
        assert "cannot write checkpoint" in last_line(run)
        assert status_of(run) == "crashed"
    else:
        assert "No space left on device" in last_line(run)
    (small_disk / "filler").unlink()
    resume(cluster, run, *small_run, *STEPS)
    assert_same_weights(run, whole)


def fill(folder: Path, left: int) -> None:
    """Leave this many bytes of a file system, as it stands now."""
    with (folder / "filler").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        stream.write(bytes(max(0, shutil.disk_usage(folder).free - left)))
        while not left:
            stream.write(bytes(4096))


@pytest.mark.slow
def test_data_that_were_replaced_end_the_attempt_with_2_and_take_nothing(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    """Also where srun ends the other ranks before they exit with 2 by themselves, and so ends with the code of a TERM."""
    run, prompts = tmp_path / "run", tmp_path / "prompts.jsonl"
    original = Path(next(word for word in small_run if word.startswith("data.prompts=")).removeprefix("data.prompts="))
    shutil.copy(original, prompts)
    words = [*small_run, *ENDLESS, f"data.prompts={prompts}"]
    job = submit(cluster, run, *words, OPD_MAX_RESTARTS="0")
    wait_for_steps(run, 3)
    term_ranks(cluster, job, run)
    end_of(cluster, job)
    before = {file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()}
    prompts.write_text(original.read_text().replace("say 1", "tell 1"))
    terminated = '[ "${SLURM_PROCID:-0}" = 0 ] || [ $code = 0 ] || kill -TERM $$'
    python = wrapped_python(tmp_path / "python", f'code=0; "$PYTHON" "$@" || code=$?\n{terminated}\nexit $code')
    with measured("data that were replaced", 90):
        job = submit(cluster, run, *words, OPD_PYTHON=python)
        facts = end_of(cluster, job)
    assert code_of(facts) == ("FAILED", "2:0"), log_of(run)
    assert "prompts.jsonl is not the data this run began with" in last_line(run)
    assert status_of(run) == "interrupted"
    assert {file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_clocks_that_disagree_change_nothing(cluster: Cluster, small_run: list[str], whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The file server is two hours ahead of the nodes, and in the second attempt the ranks' clocks are a day behind."""
    if shutil.which("faketime") is None:
        pytest.skip("no faketime: apt-get install faketime")
    run = tmp_path / "run"
    python = wrapped_python(tmp_path / "python", 'if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then exec faketime -f -1d "$PYTHON" "$@"; fi\nexec "$PYTHON" "$@"')
    job = submit(cluster, run, *small_run, *STEPS, OPD_PYTHON=python)
    wait_for_steps(run, 7)
    later = time.time() + 7200
    os.utime(run / "logs" / "attempt_0", (later, later))
    term_ranks(cluster, job, run)
    facts = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log_of(run)
    assert_same_weights(run, whole)


# ---- jobs that want the same folder, and names that shells dislike


def term_and_end(cluster: Cluster, job: int) -> dict[str, str]:
    cluster.run("scancel", "--signal=TERM", str(job))
    return end_of(cluster, job)


@pytest.mark.slow
def test_a_second_job_in_the_folder_ends_with_2_and_the_first_goes_on_untouched(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = submit(cluster, run, *small_run, *ENDLESS, OPD_MAX_RESTARTS="0")
    wait_for_steps(run, 2)
    second_log = tmp_path / "second.log"
    words = ("slurm/train.sbatch", "quickstart", "--run-dir", str(run), *small_run, *ENDLESS)
    with measured("a second job in the folder", 60):
        second = cluster.submit(*SITE, f"--output={second_log}", *words, cwd=ROOT, OPD_PYTHON=sys.executable)
        facts = end_of(cluster, second)
    assert code_of(facts) == ("FAILED", "2:0"), second_log.read_text()
    assert second_log.read_text().splitlines()[-1].startswith(f"error: job {first} is running in {run}; ")
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["attempt_0", "latest"]
    assert os.readlink(run / "logs" / "latest") == "attempt_0"
    assert status_of(run) == "running"
    done = len((run / "metrics.jsonl").read_text().splitlines())
    wait_for_steps(run, done + 2)
    assert code_of(term_and_end(cluster, first)) == ("FAILED", "75:0")
    assert status_of(run) == "interrupted"


@pytest.mark.slow
def test_of_the_jobs_of_an_array_that_share_a_folder_one_runs(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run, *small_run, *ENDLESS, site=(*SITE, "--array=0-2"), OPD_MAX_RESTARTS="0")
    wait_for_steps(run, 2)
    states = cluster.run("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").stdout.split()
    assert sorted(states) == ["FAILED", "FAILED", "RUNNING"], log_of(run)
    assert log_of(run).count(f"is running in {run}; wait for it") == 2
    assert len(list((run / "logs").glob("attempt_*"))) == 1
    cluster.run("scancel", str(job))
    wait_until(lambda: status_of(run) == "interrupted", "the array is ended")


@pytest.mark.slow
def test_a_folder_with_blanks_quotes_and_percent_signs_relative_to_the_project(cluster: Cluster, small_run: list[str], tmp_path: Path) -> None:
    """Submitted from elsewhere, with OPD_REPO; what is relative begins at the project's folder."""
    run = tmp_path / 'a run\'s "first" 100%t'
    relative = os.path.relpath(run, ROOT)
    words = (str(ROOT / "slurm" / "train.sbatch"), "quickstart", f"--run-dir={relative}", *small_run, "training.steps=1")
    job = cluster.submit(*SITE, f"--output={tmp_path / 'job.log'}", *words, cwd=tmp_path, OPD_PYTHON=sys.executable, OPD_REPO=str(ROOT))
    facts = end_of(cluster, job)
    assert facts["JobState"] == "COMPLETED", (tmp_path / "job.log").read_text()
    assert status_of(run) == "finished"
    names = ["cause", "job", *(f"rank_{rank}.log" for rank in range(4)), "srun.log", "status"]
    assert sorted(path.name for path in (run / "logs" / "latest").iterdir()) == names[1:]
