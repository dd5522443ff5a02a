"""What goes wrong from outside: a killed rank, a stop signal, a full disk, and a user's mistakes, with exit codes and last lines.

Whole runs in processes of their own, started as a user starts them. Not covered: a lost node, a hung rank, NCCL.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from opd_megatron.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ParallelLayout,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from opd_megatron.parallel.megatron import PLAIN_VALUES_FILE, reads_plain_object
from opd_megatron.reporting.run_directory import RunDirectory
from tests.pool import RankPool
from tests.programs import ROOT, run_program
from tests.runs import run_job
from tests.tiny import write_tiny_model
from tests.tokenizers_made import word_piece


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", tied=True, seed=1, scale=0.3, num_hidden_layers=2)
    write_tiny_model(folder / "teacher", seed=2, scale=0.5, num_hidden_layers=2)
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def _command(models: Path, run: Path, *overrides: str, ranks: int = 2) -> list[str]:
    return [
        *(sys.executable, "-m", "recipes.run", "quickstart", "--nproc-per-node", str(ranks), "--run-dir", str(run)),
        *(f"student.hf={models / 'student'}", f"teacher.hf={models / 'teacher'}", f"data.prompts={models / 'prompts.jsonl'}"),
        *("data.task_options={}", "data.batch_prompts=8", "data.grader=exact", "training.micro_batch=4", "evaluation.prompts=0"),
        *("student.layout.tensor=1", "student.layout.pipeline=2", "checkpoint.every_steps=2", "teacher.self_test=false"),
        *overrides,
    ]


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A shell that puts the tests in the background has them ignore Ctrl-C, and what they start with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def _wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def _pid_of_rank(launcher: subprocess.Popen[str], rank: int) -> int:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")


def test_a_killed_rank_ends_the_job_and_the_resumed_run_ends_with_the_same_weights(models: Path, tmp_path: Path) -> None:
    job = _start(_command(models, tmp_path / "killed", "training.steps=12", "checkpoint.every_steps=3"))
    _wait_for_step(tmp_path / "killed", 5)
    killed_at = time.monotonic()
    os.kill(_pid_of_rank(job, 1), signal.SIGKILL)
    output, _ = job.communicate(timeout=60)
    assert time.monotonic() - killed_at < 30
    assert job.returncode == 128 + signal.SIGKILL
    assert output.splitlines()[-1] == "error: rank 1 was killed by SIGKILL"
    assert (tmp_path / "killed" / "status").read_text().strip() == "crashed"

    for run in ("killed", "whole"):
        command = _command(models, tmp_path / run, "training.steps=12", "checkpoint.every_steps=3")
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
        assert finished.returncode == 0, finished.stderr
    killed, whole = _weights(tmp_path / "killed"), _weights(tmp_path / "whole")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13)), "steps after the last checkpoint are recorded once"


# What a stop looks like from outside: Slurm or `kill`, Ctrl-C in a terminal, a launcher that died.
STOPS: dict[str, Callable[[subprocess.Popen[str]], None]] = {
    "TERM to the launcher": lambda job: job.terminate(),
    "Ctrl-C": lambda job: os.killpg(job.pid, signal.SIGINT),
    "KILL of the launcher": lambda job: job.kill(),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("KILL") else []) for name in STOPS])
def test_a_stop_saves_the_step_and_exits_75(models: Path, tmp_path: Path, name: str) -> None:
    job = _start(_command(models, tmp_path / "run", "training.steps=500", "checkpoint.every_steps=0"))
    _wait_for_step(tmp_path / "run", 3)
    STOPS[name](job)
    # The ranks hold the pipe: it ends with the last of them.
    output, _ = job.communicate(timeout=60)
    assert job.returncode == (-signal.SIGKILL if name.startswith("KILL") else 75)
    assert (tmp_path / "run" / "status").read_text().strip() == "interrupted"
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{done}"]
    assert output.splitlines()[-1].startswith(f"stopped on request after step {done}")


def test_a_killed_rank_0_leaves_the_status_crashed(models: Path, tmp_path: Path) -> None:
    job = _start(_command(models, tmp_path / "run", "training.steps=500"))
    _wait_for_step(tmp_path / "run", 1)
    os.kill(_pid_of_rank(job, 0), signal.SIGKILL)
    output, _ = job.communicate(timeout=60)
    assert output.splitlines()[-1] == "error: rank 0 was killed by SIGKILL"
    assert (tmp_path / "run" / "status").read_text().strip() == "crashed"


def test_a_crash_on_one_rank_is_the_last_line(models: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    # TensorBoard writes on rank 0 only; a file in its place makes that rank alone fail.
    (tmp_path / "run" / "tensorboard").write_text("")
    job = subprocess.run(_command(models, tmp_path / "run"), cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert job.returncode == 1
    assert job.stderr.splitlines()[-1].startswith("error: rank 0 failed: "), job.stderr[-500:]
    assert "tensorboard" in job.stderr.splitlines()[-1]


MISTAKES = {
    "other recipe": (["training.steps=1"], "run directory of another recipe"),
    "other tokenizer": (["teacher.hf={other}"], "tokenizers differ"),
    "layout and heads": (["student.layout.tensor=4", "student.layout.pipeline=1"], "does not divide the student's 2 key-value heads"),
    "layout and layers": (["student.layout.pipeline=4"], "does not divide the student's 2 layers"),
    "layout and world": (["student.layout.pipeline=3"], "world_size=4 is not a multiple"),
    "empty data": (["data.prompts={empty}"], "empty"),
    "missing data": (["data.prompts=nowhere.jsonl"], "nowhere.jsonl"),
    "every prompt too long": (["data.max_prompt_tokens=3"], "max_prompt_tokens"),
    "unwritable": (["--run-dir", "/proc/nowhere"], "cannot be written"),
    "truncated shard": (["student.hf={truncated}"], "download it again"),
    "missing shard": (["student.hf={missing}"], "is missing"),
    "in use": ([], "another job is running"),
    "no such record": (["rollout.replay=/nowhere"], "has no record of step 1"),
    "other data recorded": (["rollout.replay={cut}", "training.steps=1"], "is not a recorded rollout"),
    "tokens without bytes": (["alignment.kind=strict", "teacher.hf={words}"], "the teacher's tokenizer cannot be aligned"),
    "nothing to grade": (["effopd.enabled=true", "data.prompts={unanswered}"], "set data.answer_key, or effopd.score=divergence, which needs no grader"),
    "fewer prompts than a search asks": (["effopd.enabled=true", "effopd.prompts=65"], "effopd.prompts=65 are more than the 64 training prompts"),
    "a data set that is not there": (["data.prompts=/nowhere"], "data.prompts='/nowhere' does not exist"),
    "more ranks than a machine has": (["--nproc-per-node", "1000000"], "--nproc-per-node 1000000 must be at least 1, and at most 256"),
    "more ranks than there are": (["world_size=999999999"], "world_size=999999999 must be at least 1, and at most"),
    "adapter": (["student.hf={adapter}"], "holds an adapter (LoRA) and no model: merge it into its base model first"),
    "more than the vocabulary": (["loss.kind=topk_tail_forward", "loss.top_k=1000"], "exceeds the student's vocabulary"),
}


@pytest.fixture(scope="module")
def broken(models: Path) -> dict[str, str]:
    """Folders and files that must be refused."""
    empty = models / "empty.jsonl"
    empty.write_text("")
    truncated, missing, other = (write_tiny_model(models / name, seed=1, num_hidden_layers=2) for name in ("truncated", "missing", "other"))
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[:-100])
    (missing / "model.safetensors").unlink()
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = write_tiny_model(models / "words", seed=1, num_hidden_layers=2, vocab_size=1000)
    word_piece().save_pretrained(words)
    cut = models / "cut"
    (cut / "rollouts").mkdir(parents=True)
    (cut / "rollouts" / "step_1.jsonl").write_text('{"prompt_index": 0, "prom')
    unanswered = models / "unanswered.jsonl"
    unanswered.write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(64)) + "\n")
    adapter = models / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "student"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    made = {"unanswered": str(unanswered), "adapter": str(adapter)}
    return {**made, "empty": str(empty), "truncated": str(truncated), "missing": str(missing), "other": str(other), "cut": str(cut), "words": str(words)}


# Found after the seconds of imports: here by ranks that have them behind them (tests/programs.py). "other recipe" is started as a user would start it.
FOUND_LATE = (
    "nothing to grade",
    "fewer prompts than a search asks",
    "tokens without bytes",
    "empty data",
    "every prompt too long",
    "other data recorded",
    "unwritable",
    "in use",
)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_exit_2_with_a_message_and_leave_nothing(models: Path, broken: dict[str, str], tmp_path: Path, name: str) -> None:
    overrides, message = MISTAKES[name]
    run = tmp_path / "run"
    if name == "other recipe":
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"recipe": "something_else", "config": {}}))
    if name == "in use":
        holder = RunDirectory.open(run, recipe="quickstart", config={}, may_change=())
        holder.config_path.unlink()
    before = sorted(run.rglob("*"))
    command = _command(models, run, *(word.format(**broken) for word in overrides), ranks=4 if name.startswith("layout") else 2)
    if name in FOUND_LATE:
        del command[command.index("--nproc-per-node") : command.index("--run-dir")]
        job = run_program(*command[2:], ranks=2)
    else:
        job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert job.returncode == 2, job.stderr
    assert message in job.stderr.splitlines()[-1]
    assert "Traceback" not in job.stderr
    assert sorted(run.rglob("*")) == before
    if name == "in use":
        holder.unlock()


LAYOUT_MISTAKES = {
    "the world": ("student.layout.pipeline=3", "world_size=4 is not a multiple of tensor*pipeline*context=3"),
    "more ranks than there are": ("teacher.layout.tensor=2 teacher.layout.context=4", "teacher.layout: world_size=4 is not a multiple"),
    "more ranks than the teacher's own": (
        "teacher.placement=dedicated teacher.num_ranks=2 teacher.layout.context=4",
        "teacher.layout: world_size=2 is not a multiple of tensor*pipeline*context=4",
    ),
    "heads": ("student.layout.tensor=4 student.layout.pipeline=1", "does not divide the student's 2 key-value heads"),
    "layers": ("student.layout.pipeline=4", "does not divide the student's 2 layers"),
    "virtual stages": ("student.layout.virtual=2", "does not divide the student's 1 layers of a stage"),
    "experts": ("student.hf={mixture} student.layout.expert=4 student.layout.pipeline=1", "does not divide the student's 6 experts"),
}


@pytest.mark.parametrize("name", LAYOUT_MISTAKES)
def test_a_layout_that_does_not_fit_ends_every_rank_before_there_is_a_process_group(models: Path, tmp_path: Path, name: str) -> None:
    """The ranks have no MASTER_ADDR: one that tried to meet the others would say so."""
    words, message = LAYOUT_MISTAKES[name]
    mixture = models / "mixture"
    if not mixture.exists():
        write_tiny_model(mixture, "qwen3_moe", num_experts=6, num_hidden_layers=2)
    command = _command(models, tmp_path / "run", *words.format(mixture=mixture).split())
    del command[command.index("--nproc-per-node") : command.index("--run-dir")]
    outside = {key: value for key, value in os.environ.items() if key not in ("MASTER_ADDR", "MASTER_PORT")}
    environments = [{**outside, "RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank)} for rank in range(4)]
    ranks = [subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for environment in environments]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2, 2, 2]
    (line,) = outputs[0][1].splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "; nearest that work: " in line
    assert outputs[1:] == [("", "")] * 3
    assert not (tmp_path / "run").exists()


def _config(models: Path, steps: int) -> RunConfig:
    return RunConfig(
        student=StudentConfig(hf=str(models / "student"), layout=ParallelLayout(pipeline=2), vocab_multiple=1),
        teacher=TeacherConfig(hf=str(models / "teacher"), self_test=False),
        data=DataConfig(prompts=str(models / "prompts.jsonl"), batch_prompts=4, max_prompt_tokens=64, grader="exact"),
        rollout=RolloutConfig(max_response_tokens=4),
        training=TrainingConfig(steps=steps, micro_batch=2, learning_rate=1e-3, precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=1, keep=9),
        evaluation=EvaluationConfig(prompts=0),
    )


def _on_full_disk(config: RunConfig, run: Path, noticed_before: bool) -> str:
    """Run two steps; from the second save on the disk is full: known in advance, or met in the middle of writing on one rank."""
    from opd_megatron.training import checkpoint
    from opd_megatron.training.checkpoint import CheckpointFolder

    original_save, original_usage = CheckpointFolder.save, shutil.disk_usage
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self: CheckpointFolder, student: object, progress: checkpoint.Progress, *further: object, in_background: bool = False) -> None:
        if progress.step == 2 and noticed_before:
            shutil.disk_usage = lambda _path: original_usage("/")._replace(free=1000)  # type: ignore[assignment]
        elif progress.step == 2 and dist.get_rank() == 1:
            # Files of this process and its writers may not grow beyond a few bytes: every write fails as on a full disk.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        original_save(self, student, progress, *further, in_background=in_background)  # type: ignore[arg-type]

    CheckpointFolder.save = save  # type: ignore[method-assign, assignment]
    try:
        run_job(config, run)
    except ValueError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        CheckpointFolder.save, shutil.disk_usage = original_save, original_usage  # type: ignore[method-assign]
    return ""


@pytest.mark.parametrize("noticed_before", [True, False], ids=["known before", "met while writing"])
def test_a_full_disk_keeps_the_previous_checkpoint(models: Path, pool: RankPool, tmp_path: Path, noticed_before: bool) -> None:
    config = _config(models, steps=3)
    messages = pool.run(_on_full_disk, config, tmp_path / "run", noticed_before, world_size=2)
    assert all("cannot write checkpoint" in message for message in messages), messages
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_1"]
    assert pool.run(run_job, config, tmp_path / "run", world_size=2) == ["finished", "finished"]


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _overwrite(step: Path) -> None:
    """Put NaN over a part of the weights of one rank, which no reader of files can notice."""
    for file in step.glob("*.distcp"):
        data = bytearray(file.read_bytes())
        middle = len(data) // 2 // 4 * 4
        data[middle : middle + 4096] = b"\xff" * 4096
        file.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights cut": lambda step: _cut(max(step.glob("*.distcp"), key=lambda file: file.stat().st_size)),
    "weights missing": lambda step: next(step.glob("*.distcp")).unlink(),
    "index cut": lambda step: _cut(step / ".metadata"),
    "progress cut": lambda step: _cut(step / "progress.json"),
    "progress of another kind": lambda step: (step / "progress.json").write_text('{"step": "two"}'),
    "weights not finite": _overwrite,
    "progress missing": lambda step: (step / "progress.json").unlink(),
}
if not reads_plain_object():
    # From 0.19 they are among the weights' files.
    DAMAGES["plain values missing"] = lambda step: (step / PLAIN_VALUES_FILE).unlink()
    DAMAGES["plain values cut"] = lambda step: _cut(step / PLAIN_VALUES_FILE)


def _resume_or_message(config: RunConfig, run: Path) -> str:
    try:
        return run_job(config, run)
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def two_checkpoints(models: Path, pool: RankPool) -> Path:
    run = models / "two_checkpoints"
    pool.run(run_job, _config(models, steps=2), run, world_size=2)
    return run


def test_a_run_is_not_resumed_in_another_precision(models: Path, two_checkpoints: Path, pool: RankPool) -> None:
    """Its master weights would be cut to those of the other."""
    config = _config(models, steps=3)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision="bf16"))
    for message in pool.run(_resume_or_message, config, two_checkpoints, world_size=2):
        assert "holds a run with another config" in message
        assert "training.precision" in message


QUICK_DAMAGES = ("weights cut", "progress of another kind", "weights not finite")


@pytest.mark.parametrize("name", [name if name in QUICK_DAMAGES else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES])
def test_a_damaged_checkpoint_without_checksums_is_named_with_the_one_before(
    models: Path, two_checkpoints: Path, pool: RankPool, tmp_path: Path, name: str
) -> None:
    """As an older version wrote it."""
    run, config = tmp_path / "run", _config(models, steps=3)
    shutil.copytree(two_checkpoints, run)
    (run / "checkpoints" / "step_2" / "checksums.json").unlink()
    DAMAGES[name](run / "checkpoints" / "step_2")
    for message in pool.run(_resume_or_message, config, run, world_size=2):
        assert re.search("step_2.* damaged", message), message
        assert message.endswith("start again to resume from step_1")
    (run / "checkpoints" / "step_2").rename(run / "damaged")
    assert pool.run(run_job, config, run, world_size=2) == ["finished", "finished"]


def test_what_is_no_checkpoint_is_passed_over(models: Path, two_checkpoints: Path, pool: RankPool, tmp_path: Path) -> None:
    run, config = tmp_path / "run", _config(models, steps=3)
    shutil.copytree(two_checkpoints, run)
    for name in ("step_9", "step_007", "step_x", "step_2 (copy)"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step_8").write_text("")
    told = pool.run(_resume_and_listen, config, run, world_size=2)[0]
    assert "step_9 is damaged: it is empty" in told
    assert "step_2" in told.split("resumed from")[1].splitlines()[0]


def _resume_and_listen(config: RunConfig, run: Path) -> str:
    """Return what a resumed run tells, on rank 0."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert run_job(config, run) == "finished"
    return told.getvalue()


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILE_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit of the weights": (lambda step: _flip_a_bit(next(step.glob("*.distcp"))), "has other bytes than were written"),
    "weights cut": (DAMAGES["weights cut"], "bytes instead of"),
    "weights missing": (DAMAGES["weights missing"], "is missing"),
    "a flipped bit of the tokenizer": (lambda step: _flip_a_bit(step / "huggingface" / "tokenizer.json"), "tokenizer.json has other bytes"),
    "checksums cut": (lambda step: _cut(step / "checksums.json"), "checksums.json cannot be read"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if "flipped" in name else [pytest.mark.slow]) for name in FILE_DAMAGES])
def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_one_named_and_kept(
    models: Path, two_checkpoints: Path, pool: RankPool, tmp_path: Path, name: str
) -> None:
    spoil, why = FILE_DAMAGES[name]
    run, config = tmp_path / "run", _config(models, steps=3)
    shutil.copytree(two_checkpoints, run)
    spoil(run / "checkpoints" / "step_2")
    spoiled = {file.name: file.read_bytes() for file in (run / "checkpoints" / "step_2").rglob("*") if file.is_file()}
    told = pool.run(_resume_and_listen, config, run, world_size=2)[0]
    assert "step_2 is damaged" in told
    assert why in told
    assert "resumed from" in told
    assert "step_1" in told.split("resumed from")[1].splitlines()[0]
    kept = {file.name: file.read_bytes() for file in (run / "checkpoints" / "step_2.damaged").rglob("*") if file.is_file()}
    assert kept == spoiled
    whole = tmp_path / "whole"
    shutil.copytree(two_checkpoints, whole)
    pool.run(run_job, config, whole, world_size=2)
    assert all(torch.equal(_weights(run)[tensor], weight) for tensor, weight in _weights(whole).items())


def test_a_run_with_damaged_checkpoints_alone_is_refused(models: Path, two_checkpoints: Path, pool: RankPool, tmp_path: Path) -> None:
    run, config = tmp_path / "run", _config(models, steps=3)
    shutil.copytree(two_checkpoints, run)
    for step in ("step_1", "step_2"):
        _flip_a_bit(run / "checkpoints" / step / "progress.json")
    for message in pool.run(_resume_or_message, config, run, world_size=2):
        assert "are damaged (step_2: progress.json has other bytes than were written; step_1:" in message


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asleep", "without a turn"])
def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_all(models: Path, tmp_path: Path, kind: str) -> None:
    """Of the rank that hangs, in what it hangs; where none of its threads gets a turn, half a minute later."""
    command = _command(models, tmp_path / "run", "training.watchdog_seconds=10", "training.steps=500")
    words = [word for word in command[3:] if word not in ("--nproc-per-node", "2")]
    started = time.monotonic()
    job = run_program("tests.hanging", "1", kind, *words, ranks=2)
    assert job.returncode == 1
    assert time.monotonic() - started < 100
    if kind == "asleep":
        assert job.stderr.count("no progress for 10 seconds in the phase 'train' of step 3 (training.watchdog_seconds)") == 4, "both ranks, first and last"
        assert job.stderr.splitlines()[-1].startswith("error: rank ")
    else:
        assert "Timeout (0:00:40)!" in job.stderr
    assert "in hang" in job.stderr
    assert "in train_step" in job.stderr, "the other rank waits for it"
