"""The view of a running job: what it says of every state of a run directory, and that no text in one commands the terminal.

Not covered: how it looks.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opd_megatron.reporting import MetricsWriter, RunDirectory
from opd_megatron.reporting.following import JsonLines, RunView
from opd_megatron.reporting.watch import frame, plain, span

ROOT = Path(__file__).parents[2]
CONFIG = {"student": {"hf": "models/small"}, "teacher": {"hf": "models/large"}, "training": {"steps": 100}}
# Colour, a link, the clipboard, a title, a cleared screen, both ways of writing them, text that is reordered, and markup of rich.
HOSTILE = (
    "\x1b[31mred\x1b[0m \x1b]8;;http://evil\x07link\x1b]8;;\x07 \x1b]52;c;ZXZpbA==\x1b\\ \x1b]0;title\x07 \x1b[2J\x1b[H \x9b2J \x9d0;t\x9c "
    "\u202eabc\u202c \x08\x07 [bold]b[/bold] [/] :boom:"
)


def step_metrics(step: int, **more: Any) -> dict[str, Any]:
    seconds = {"rollout_seconds": 6.0, "train_seconds": 3.0, "step_seconds": 10.0, "rollout_peak_bytes": 3 * 2**30}
    return {"step": step, "loss": 1 / step, "divergence": 0.25, "student_entropy": 0.5, "tokens_per_second": 1234.0, **seconds, **more}


def write_run(path: Path, num_steps: int = 30, **more: Any) -> RunDirectory:
    run = RunDirectory.open(path, recipe="quickstart", config=CONFIG, may_change=())
    run.write_status("running")
    writer = MetricsWriter(run, first_step=1)
    writer.log_evaluation({"step": 0, "who": "teacher", "accuracy": 0.8})
    writer.log_evaluation({"step": 0, "who": "student", "accuracy": 0.2})
    for step in range(1, num_steps + 1):
        writer.log_step(step_metrics(step, **more))
    writer.log_evaluation({"step": num_steps, "who": "student", "accuracy": 0.6})
    writer.close("interrupted")
    (run.checkpoints / "step_20").mkdir(parents=True)
    (run.checkpoints / "step_9").mkdir()
    return run


def write_log(run: RunDirectory, text: str, attempt: int = 0) -> None:
    folder = run.path / "logs" / f"attempt_{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rank_0.log").write_text(text, errors="surrogateescape")
    (run.path / "logs" / "latest").unlink(missing_ok=True)
    (run.path / "logs" / "latest").symlink_to(folder.name)


def drawn(path: Path, now: float | None = None, **options: Any) -> str:
    view = RunView(RunDirectory(path))
    view.refresh()
    console = Console(width=110, **options)
    with console.capture() as capture:
        console.print(frame(view, time.time() if now is None else now))
    return capture.get()


def tool(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/watch.py", *map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=30)


def test_a_frame_tells_how_the_run_stands(tmp_path: Path) -> None:
    write_log(write_run(tmp_path / "first"), "loading\nstep 30/100 loss 0.03\n")
    text = drawn(tmp_path / "first")
    assert re.search(r"first +running", text)
    assert "quickstart · small from large" in text
    assert re.search(r"step 30/100 .* 12 min of steps left", text), "70 steps of 10 s"
    assert re.search(r"loss +0\.0333", text)
    assert re.search(r"divergence +0\.25 +0\.25 +0\.25", text)
    assert re.search(r"student_entropy +0\.5", text)
    assert re.search(r"tokens_per_second +1234", text)
    assert "60.0% at step 30, 20.0% at step 0, best 60.0%" in text
    assert re.search(r"teacher accuracy +80\.0% at step 0", text)
    assert re.search(r"last checkpoint +step 20, \d s ago", text)
    assert "a step takes 10.00 s" in text
    assert re.search(r"rollout +6\.00 +█+ +3\.00 GiB", text)
    assert "silent" not in text
    assert "logs/attempt_0/rank_0.log" in text
    assert "step 30/100 loss 0.03" in text


def test_bars_are_as_long_as_their_share_of_the_step(tmp_path: Path) -> None:
    write_run(tmp_path)
    text = drawn(tmp_path)
    lengths = {name: len(re.search(rf"{name} +\d\.00 +(█+)", text)[1]) for name in ("rollout", "train")}
    assert lengths == {"rollout": 18, "train": 9}, "of 30 for the 10 s of a step"


def test_phases_and_ranks_appear_as_the_run_names_them(tmp_path: Path) -> None:
    write_run(tmp_path, dream_seconds=0.5, dream_peak_bytes=2**29, dream_slowest_rank=3, dream_spread_seconds=0.25, tokens_per_second_per_gpu=617.0)
    text = drawn(tmp_path)
    assert re.search(r"dream +0\.50 +.* 0\.50 GiB +3 \(20 of 20\) +0\.25 s", text)
    assert re.search(r"tokens_per_second_per_gpu +617", text)
    assert "dream_spread" not in text


@pytest.mark.parametrize(
    ("status", "seconds", "is_silent"), [("running", 720, True), ("running", 90, False), ("finished", 720, False), ("interrupted", 720, False)]
)
def test_a_job_that_says_it_runs_and_writes_nothing_is_called_silent(tmp_path: Path, status: Any, seconds: float, is_silent: bool) -> None:
    run = write_run(tmp_path)
    run.write_status(status)
    text = drawn(tmp_path, now=time.time() + seconds)
    assert ("silent for 12 min" in text) == is_silent


def test_slow_steps_are_not_silence(tmp_path: Path) -> None:
    write_run(tmp_path, step_seconds=300.0)
    assert "silent" not in drawn(tmp_path, now=time.time() + 720)
    assert "silent for 40 min" in drawn(tmp_path, now=time.time() + 2400)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, ["not begun", "no config.json yet", "no training step is recorded yet", "none yet"]),
        ({"config.json": '{"recipe"', "status": "gone"}, ["not begun", "no config.json yet"]),
        ({"status": "running\n", "metrics.jsonl": '{"step": 1, "loss": 2.5}\n{"step": 2, "lo'}, ["running", "step 1", "2.5"]),
        ({"metrics.jsonl": '{"step": 1, "loss": null, "loss_nonfinite": "nan", "lr": "x"}\n[]\nnot json\n{"step": "2"}\n'}, ["step 1"]),
        ({"evals.jsonl": '{"step": 0, "who": 3, "accuracy": 1}\n{"step": 0, "who": "student", "accuracy": null}\n'}, ["none yet"]),
    ],
)
def test_an_unfinished_or_damaged_folder_gives_what_can_be_read(tmp_path: Path, files: dict[str, str], said: list[str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    text = drawn(tmp_path)
    assert all(words in text for words in said), text


def test_no_text_of_a_run_commands_the_terminal(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run", recipe=HOSTILE, config={"student": {"hf": f"x/{HOSTILE}"}, "training": {"steps": 5}}, may_change=())
    run.status_path.write_text(HOSTILE)
    record = {**step_metrics(1), f"{HOSTILE}_seconds": 1.0, f"tokens_per_second{HOSTILE}": 1.0}
    run.metrics_path.write_text(json.dumps(record) + "\n")
    run.evals_path.write_text(json.dumps({"step": 1, "who": HOSTILE, "accuracy": 1.0}) + "\n")
    write_log(run, f"{HOSTILE}\n10 %\r100 %\n\udcff\udc9b2J\n")
    text = tool(run.path, "--once").stdout
    assert not re.search(r"[^\n\x20-\x7e\xa0-\uffff]", text), "nothing but what can be seen"
    assert not {"\u202e", "\u202c"} & set(text)
    assert "evil" not in text
    assert "[bold]b[/bold] [/] :boom:" in text, "markup is text"
    assert "100 %" in text
    assert "10 %\n" not in text
    coloured = drawn(run.path, force_terminal=True, color_system="truecolor")
    assert not re.sub(r"\x1b\[[0-9;]*m", "", coloured).count("\x1b"), "colours of the view itself"


@pytest.mark.parametrize(("text", "shown"), [("a\tb", "a    b"), ("\x1b[1;2Hx", "x"), ("\x1b]0;cut", ""), ("x\x1b", "x"), ("\x1b(Bx", "x"), ("é漢 ", "é漢 ")])
def test_foreign_text_becomes_what_can_be_seen(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize(("seconds", "said"), [(-1, "0 s"), (59.4, "59 s"), (60, "1 min"), (720, "12 min"), (3600, "1:00:00"), (90000, "1 day, 1:00:00")])
def test_times_are_said_shortly(seconds: float, said: str) -> None:
    assert span(seconds) == said


def test_what_was_read_is_not_read_again_and_a_continued_run_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = JsonLines(file)
    assert lines.new() == ([], False)
    file.write_text('{"step": 1}\n{"st')
    assert lines.new() == ([{"step": 1}], True)
    with file.open("a") as more:
        more.write('ep": 2}\n')
    assert lines.new() == ([{"step": 2}], False)
    assert lines.new() == ([], False)
    (tmp_path / "other").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    (tmp_path / "other").replace(file)
    assert lines.new() == ([{"step": 1}, {"step": 2}, {"step": 3}], True)


def test_steps_that_run_again_count_once(tmp_path: Path) -> None:
    run = write_run(tmp_path, 10)
    view = RunView(run)
    view.refresh()
    writer = MetricsWriter(run, first_step=8)
    writer.log_step(step_metrics(8))
    writer.close("interrupted")
    view.refresh()
    assert [record["step"] for record in view.steps] == list(range(1, 9))


def test_the_tool_prints_one_frame_where_there_is_no_terminal_and_imports_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    code = (
        "import runpy, sys; main = runpy.run_path('tools/watch.py')['main']; code = main(sys.argv[1:]); "
        "sys.exit(code or 3 * bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "step 30/100" in done.stdout


def test_a_folder_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    done = tool(tmp_path / "nowhere", "--once")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/nowhere is not a run directory: there is no such folder\n"


def test_the_view_follows_a_run_until_it_is_interrupted(tmp_path: Path) -> None:
    run = write_run(tmp_path, 10)
    controller, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 110, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    command = [sys.executable, "tools/watch.py", str(tmp_path), "--every", "0.2"]
    with subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        # A shell that puts the tests in the background has them ignore Ctrl-C, and what they start with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        os.close(terminal)
        try:
            read_until(controller, "step 10/100")
            with run.metrics_path.open("a") as file:
                file.write(json.dumps(step_metrics(11)) + "\n")
            read_until(controller, "step 11/100")
            process.send_signal(signal.SIGINT)
            rest = read_until(controller, "\x1b[?1049l")
            assert "\x1b[?25h" in rest, "the cursor is shown again"
            assert process.wait(10) == 0
        finally:
            process.kill()
            os.close(controller)


def read_until(terminal: int, words: str) -> str:
    """Return what a terminal was sent, up to some words; fail when they do not come."""
    text, deadline = "", time.monotonic() + 20
    while words not in text:
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], f"{words!r} did not come: {text[-2000:]!r}"
        text += os.read(terminal, 65536).decode(errors="replace")
    return text
