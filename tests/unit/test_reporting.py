"""The run directory refuses other runs, metrics survive crashes and stay valid JSON, and every state of a run gives a self-contained report.

Not covered: how the report looks, and the bar on a terminal.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from opd_megatron.losses.class_divergence import ALL_KINDS
from opd_megatron.reporting import MetricsWriter, Progress, RunDirectory, read_history
from opd_megatron.reporting.cause import leave_cause
from opd_megatron.reporting.metrics import strict_json
from opd_megatron.reporting.plots import DIVERGENCE_LABELS
from opd_megatron.reporting.report import pair_examples, write_report
from tools import report as report_program

TOOL = Path(__file__).parents[2] / "tools" / "report.py"
CONFIG = {"seed": 1, "student": {"hf": "tiny", "layout": {"tensor": 1}}, "loss": {"kind": "reverse_kl"}, "training": {"steps": 12, "learning_rate": 1e-3}}
HOSTILE = "<script>alert('x')</script> & \"quoted\" \x00\x1b[31m \ud800"


def open_run(path, config=CONFIG, recipe="quickstart", may_change=("training.steps", "checkpoint")):
    return RunDirectory.open(path, recipe=recipe, config=config, may_change=may_change)


def step_metrics(step, **more):
    seconds = {"rollout_seconds": 2.0, "teacher_seconds": 0.5, "train_seconds": 1.0, "step_seconds": 4.0}
    return {
        "step": step,
        "loss": 1 / step,
        "divergence": 1 / step,
        "student_entropy": 0.5,
        "grad_norm": 0.3,
        "lr": 1e-3,
        "response_tokens": 100,
        **seconds,
        **more,
    }


def evaluation(step, who, accuracy, response="fine"):
    examples = [{"prompt": f"question {i} {HOSTILE}", "response": f"{response} {i}", "answer": str(i), "score": float(i % 2)} for i in range(3)]
    return {"step": step, "who": who, "accuracy": accuracy, "prompts": 50, "pass_at_k": {"1": accuracy, "4": accuracy}, "seconds": 1.0, "examples": examples}


def write_run(path, num_steps=12, **more):
    """Write a whole run as the trainer would."""
    run = open_run(path)
    writer = MetricsWriter(run, first_step=1)
    writer.log_evaluation(evaluation(0, "teacher", 0.8, response=f"teacher {HOSTILE}"))
    writer.log_evaluation(evaluation(0, "student", 0.2, response=f"before {HOSTILE}"))
    for step in range(1, num_steps + 1):
        writer.log_step(step_metrics(step, **more))
    writer.log_evaluation(evaluation(num_steps, "student", 0.6, response=f"after {HOSTILE}"))
    writer.close("finished")
    run.write_status("finished")
    return run


class Page(HTMLParser):
    """Tags left open, and every attribute value."""

    def __init__(self, text):
        super().__init__()
        self.open_tags, self.tags, self.values = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [(tag, name, value) for name, value in attrs]
        if tag not in {"meta", "img", "br"}:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag


def assert_valid_and_self_contained(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open_tags
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(value.startswith("data:") for _, name, value in page.values if name in {"src", "href"})
    assert not re.search(r"url\(|@import|https?://", text)
    assert (path.parent / "plots" / "summary.png").read_bytes().startswith(b"\x89PNG")
    return text


# --- the run directory


def test_a_new_folder_holds_the_recipe_and_its_config(tmp_path):
    run = open_run(tmp_path / "deep" / "run")
    assert json.loads(run.config_path.read_text()) == {"recipe": "quickstart", "config": CONFIG}
    assert run.read_status() is None
    run.write_status("running")
    run.write_status("interrupted")
    assert run.read_status() == "interrupted"
    assert sorted(p.name for p in run.path.iterdir()) == ["config.json", "lock", "status"], "atomic writes leave no drafts behind"


def test_a_key_that_may_change_is_taken_over(tmp_path):
    open_run(tmp_path).unlock()
    longer = {**CONFIG, "training": {**CONFIG["training"], "steps": 99}, "checkpoint": {"every_steps": 5}}
    assert open_run(tmp_path, longer).read_description()["config"] == longer


def test_a_mistake_before_the_first_step_leaves_a_new_folder_open_for_its_correction(tmp_path):
    run = open_run(tmp_path)
    run.write_status("running")
    assert run.step_back()
    run.unlock()
    assert list(tmp_path.iterdir()) == []
    open_run(tmp_path, {**CONFIG, "seed": 2})


@pytest.mark.parametrize(("before", "after"), [("finished", "finished"), ("interrupted", "interrupted"), ("running", "crashed"), (None, "crashed")])
def test_a_mistake_takes_nothing_from_a_run_that_was_there(tmp_path, monkeypatch, before, after):
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    first = open_run(tmp_path)
    first.metrics_path.write_text('{"step": 1}\n')
    if before is not None:
        first.write_status(before)
    first.unlock()
    monkeypatch.setenv("OPD_ATTEMPT_DIR", str(attempt))
    run = open_run(tmp_path)
    run.write_status("running")
    assert (attempt / "status").read_text() == "running\n"
    assert run.step_back()
    assert run.read_status() == after
    assert not (attempt / "status").exists(), "a script that asks for this attempt's word must not take the old one for it"
    assert run.metrics_path.read_text() == '{"step": 1}\n'
    run.metrics_path.write_text('{"step": 1}\n{"step": 2}\n')
    assert not run.step_back(), "after a step it is no longer a mistake of the start"


def test_every_kind_of_loss_has_a_label():
    assert set(DIVERGENCE_LABELS) == set(ALL_KINDS)


def test_a_folder_in_use_is_refused_until_its_job_is_done(tmp_path):
    first = open_run(tmp_path)
    with pytest.raises(ValueError, match="another job is running"):
        open_run(tmp_path)
    first.unlock()
    open_run(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EBADF])
def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, caplog, number):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert open_run(tmp_path).config_path.exists()
    assert "cannot be locked" in caplog.text
    assert os.strerror(number) in caplog.text


def test_the_lock_is_one_that_nfs_takes_and_a_dead_job_leaves_none(tmp_path):
    """NFS wants a lock's file open for writing; what stays in the folder is an empty file."""
    run = open_run(tmp_path)
    assert fcntl.fcntl(run._lock, fcntl.F_GETFL) & os.O_RDWR
    run.unlock()
    assert run.lock_path.read_bytes() == b""
    open_run(tmp_path)


def test_the_first_rank_to_fail_leaves_the_cause(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_ATTEMPT_DIR", str(tmp_path))
    for rank in ("3", "1"):
        monkeypatch.setenv("RANK", rank)
        leave_cause("out of memory", is_mistake=rank == "1")
    assert (tmp_path / "cause").read_text() == "rank 3: out of memory\n"
    assert not (tmp_path / "mistake").exists()
    (tmp_path / "cause").unlink()
    leave_cause("no such recipe", is_mistake=True)
    assert (tmp_path / "mistake").exists()
    monkeypatch.setenv("OPD_ATTEMPT_DIR", str(tmp_path / "nowhere"))
    leave_cause("out of memory")


def test_tuples_and_lists_are_the_same_config(tmp_path):
    open_run(tmp_path, {"modules": ("a", "b")}).unlock()
    open_run(tmp_path, {"modules": ["a", "b"]})


@pytest.mark.parametrize(
    ("config", "recipe", "words"),
    [
        (CONFIG, "another", ["another recipe", "'quickstart'", "'another'", "--run-dir"]),
        ({**CONFIG, "seed": 2}, "quickstart", ["seed: 1 in the folder, 2 now"]),
        ({**CONFIG, "student": {"hf": "tiny", "layout": {"tensor": 4}}}, "quickstart", ["student.layout.tensor: 1 in the folder, 4 now"]),
        ({**CONFIG, "training": {"steps": 13, "learning_rate": 1e-4}}, "quickstart", ["training.learning_rate"]),
        ({**CONFIG, "checkpoints": 1}, "quickstart", ["checkpoints: absent in the folder"]),
    ],
)
def test_another_run_is_refused_with_both_values_and_changes_nothing(tmp_path, config, recipe, words):
    run = open_run(tmp_path)
    before = run.config_path.read_text()
    with pytest.raises(ValueError) as refusal:
        open_run(tmp_path, config, recipe)
    assert all(word in str(refusal.value) for word in words)
    assert "training.steps" not in str(refusal.value)
    assert run.config_path.read_text() == before


def test_a_place_that_cannot_hold_a_run_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/run cannot be written: .+"):
        open_run(tmp_path / "file" / "run")
    (tmp_path / "config.json").write_text("{cut")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        open_run(tmp_path)


# --- metrics


def test_nonfinite_numbers_are_written_as_strict_json_with_a_note(tmp_path):
    run = open_run(tmp_path)
    writer = MetricsWriter(run, first_step=1)
    writer.log_step({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    line = run.metrics_path.read_text()  # readable before close: each step is flushed
    writer.close("finished")
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.1,
        "loss_nonfinite": "nan",
        "grad_norm_nonfinite": "inf",
    }
    assert strict_json({"a": [1.0, -math.inf, {"b": math.nan}]}) == {"a": [1.0, None, {"b": None, "b_nonfinite": "nan"}]}


def test_a_continued_run_repeats_no_step_and_survives_a_cut_line(tmp_path):
    run = write_run(tmp_path, num_steps=12)
    with run.metrics_path.open("a") as file:
        file.write('{"step": 13, "lo')
    writer = MetricsWriter(run, first_step=9)
    for step in (9, 10):
        writer.log_step({"step": step, "loss": -1.0})
    writer.close("finished")
    records = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["loss"] for record in records[8:]] == [-1.0, -1.0]
    assert [(r["step"], r["who"]) for r in map(json.loads, run.evals_path.read_text().splitlines())] == [(0, "teacher"), (0, "student")]


def test_a_whole_last_line_without_its_newline_is_kept_apart(tmp_path):
    run = open_run(tmp_path)
    run.metrics_path.write_text('{"step": 1}\n{"step": 2}')
    writer = MetricsWriter(run, first_step=3)
    writer.log_step({"step": 3})
    writer.close("finished")
    assert run.metrics_path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_tensorboard_receives_steps_and_evaluations(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(write_run(tmp_path, num_steps=3).tensorboard)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("evaluation/student_accuracy")] == pytest.approx([0.2, 0.6])


def test_the_last_record_of_a_repeated_step_counts(tmp_path):
    run = open_run(tmp_path)
    run.metrics_path.write_text('{"step": 2, "loss": 1}\n{"step": 1, "loss": 2}\nnot json\n[]\n{"step": 2, "loss": 3}\n')
    history = read_history(tmp_path)
    assert history.series("loss") == ([1, 2], [2, 3])
    assert any("2 unreadable line(s) of 5" in remark for remark in history.remarks)


# --- progress


def test_a_log_gets_one_line_per_step(capsys):
    progress = Progress(10, 8)
    progress.step(step_metrics(8))
    progress.note("a [bold] note")
    progress.step({"step": 9, "loss": math.nan})
    progress.step({"step": 10})
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("step  8/10  loss 0.1250  divergence 0.1250")
    assert lines[0].endswith("left")
    assert lines[1] == "a [bold] note"
    assert "loss nan" in lines[2]


# --- the report


@pytest.mark.parametrize("num_steps", [1, 500])
def test_a_run_gives_its_numbers_and_shows_text_as_text(tmp_path, num_steps):
    write_run(tmp_path, num_steps, response_length_mean=50.0, truncated_fraction=0.1, kept_fraction=0.5, rollout_drift_mean=0.0, rollout_drift_max=0.1)
    text = assert_valid_and_self_contained(write_report([tmp_path], tmp_path / "report.html"))
    assert "20.0 % → 60.0 %" in text
    assert "75.0 %" in text, "share of the teacher's accuracy, 0.6 / 0.8"
    assert "66.7 %" in text, "gap closed, (0.6 - 0.2) / (0.8 - 0.2)"
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text
    assert "\x00" not in text
    assert "\x1b" not in text
    assert all(title in text for title in ("Accuracy on held-out prompts", "Where the time of a step goes", "Truncated responses", "Sampler drift"))


def test_examples_are_paired_by_prompt_whatever_their_order(tmp_path):
    run = open_run(tmp_path)
    records = [evaluation(0, "student", 0.2, "before"), evaluation(5, "student", 0.4, "middle"), evaluation(9, "student", 0.6, "after")]
    records[-1]["examples"] = records[-1]["examples"][:0:-1]
    run.evals_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    pairs = pair_examples(read_history(tmp_path))
    assert [[answer.response for answer in pair.answers] for pair in pairs] == [["before 0"], ["before 1", "after 1"], ["before 2", "after 2"]]
    assert [pair.answers[0].verdict for pair in pairs] == ["wrong", "correct", "wrong"]


def test_several_runs_share_one_report_with_the_settings_that_differ(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "crashed"]
    write_run(paths[0])
    write_run(paths[1])
    open_run(paths[2], {**CONFIG, "seed": 77}, recipe="other<b>").write_status("crashed")
    text = assert_valid_and_self_contained(write_report(paths, tmp_path / "new" / "out.html"))
    assert "3 runs side by side" in text
    assert str(paths[0]) in text, "equal folder names are told apart by their path"
    assert re.search(r"seed</th><td>1</td><td>1</td><td>77</td>", text)
    assert "other&lt;b&gt;" in text


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, ["config.json is missing", "metrics.jsonl is missing", "evals.jsonl is missing", "status is missing"]),
        (
            {"config.json": "[1]", "metrics.jsonl": "", "evals.jsonl": "", "status": "gone"},
            ["not the config of a run", "metrics.jsonl is empty", "evals.jsonl is empty"],
        ),
        ({"metrics.jsonl": '{"step": 1, "loss": null, "loss_nonfinite": "nan"}\n{"st'}, ["1 unreadable line", "loss was not finite at 1 step"]),
        ({"evals.jsonl": '{"step": 0, "who": "teacher", "accuracy": 0}\n'}, ["metrics.jsonl is missing"]),
        ({"evals.jsonl": '{"step": 0, "who": "student", "accuracy": 0.0, "prompts": 4}\n{"step": 0, "who": "nobody"}\n'}, ["metrics.jsonl is missing"]),
        ({"metrics.jsonl": '{"step": 1, "loss": 2.0, "train_seconds": 1, "step_seconds": 1.5}\n'}, ["evals.jsonl is missing"]),
    ],
)
def test_an_incomplete_run_gives_a_report_that_says_what_is_missing(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    text = assert_valid_and_self_contained(write_report([tmp_path], tmp_path / "report.html"))
    assert all(words in text for words in said)


def test_the_command_line_writes_beside_the_first_run_and_imports_no_torch(tmp_path):
    write_run(tmp_path / "run")
    tool = f"import runpy, sys; sys.argv = ['report.py', {str(tmp_path / 'run')!r}]; main = runpy.run_path({str(TOOL)!r})['main']; code = main()"
    done = subprocess.run([sys.executable, "-c", f"{tool}; sys.exit(code or 'torch' in sys.modules)"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert str(tmp_path / "run" / "report.html") in done.stdout
    assert_valid_and_self_contained(tmp_path / "run" / "report.html")


def test_the_command_line_refuses_what_is_no_folder_without_a_traceback(tmp_path):
    done = subprocess.run([sys.executable, str(TOOL), str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nowhere is not a run directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_accuracy_is_told_against_steps_and_against_time_with_the_probes_in_it(tmp_path):
    """The teacher has 80 %, so 76 % is near it: reached after step 8, which is 8 x 4 s and the probes' 10 s of steps 4 and 8."""
    run = open_run(tmp_path / "run")
    writer = MetricsWriter(run, first_step=1)
    writer.log_evaluation(evaluation(0, "teacher", 0.8))
    for step in range(1, 13):
        searched = {"probe_seconds": 5.0, "step_seconds": 9.0, "effopd_accepted_k": step - 4, "effopd_responses": 150} if step in (4, 8) else {}
        writer.log_step(step_metrics(step, **searched))
        if step in (4, 8, 12):
            writer.log_evaluation(evaluation(step, "student", {4: 0.5, 8: 0.77, 12: 0.79}[step]))
    writer.log_search({"step": 4, "accepted_k": 0, "num_responses": 150, "seconds": 5.0, "score": math.nan})
    writer.log_search({"step": 8, "accepted_k": 4, "num_responses": 150, "seconds": 5.0, "score": 0.5})
    # After a stop in it: the metrics of step 1 were written before.
    writer.log_search({"step": 1, "accepted_k": 1, "num_responses": 50, "seconds": 2.0, "score": 0.5})
    writer.close("finished")
    run.write_status("finished")
    history = read_history(run.path)
    assert history.step_reaching(0.76) == 8
    assert history.seconds_until(8) == 44.0
    assert history.step_reaching(0.9) is None
    text = assert_valid_and_self_contained(write_report([run.path], run.report_path))
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", text)
    table = dict(itertools.pairwise(cells))
    assert table["Steps to 95 % of the teacher&#39;s accuracy"] == "8"
    assert table["Time to 95 % of the teacher&#39;s accuracy, in steps"] == "44.0 s"
    assert table["Of it in probes for extrapolated weights"] == "12.0 s"
    assert table["Extrapolations accepted"] == "2 of 3 searches, 350 responses"
    assert "Accuracy against training time" in text
    assert json.loads(run.searches_path.read_text().splitlines()[0])["score"] is None


def test_searches_that_will_be_made_again_are_dropped(tmp_path):
    run = open_run(tmp_path)
    for first_step, steps in ((1, (1, 2, 4)), (3, (4,))):
        writer = MetricsWriter(run, first_step=first_step)
        for step in steps:
            writer.log_search({"step": step, "of": first_step})
        writer.close("finished")
    assert [json.loads(line)["of"] for line in run.searches_path.read_text().splitlines()] == [1, 1, 3]


def test_a_teacher_that_was_never_reached_is_said(tmp_path):
    text = write_report([write_run(tmp_path / "run").path], tmp_path / "report.html").read_text()
    assert "not reached" in text


def test_a_comparison_leaves_the_reports_of_its_runs(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name) for name in ("first", "second"))
    (first.path / "report.html").write_text("of one run")
    assert report_program.main([str(first.path), str(second.path)]) == 0
    assert (first.path / "report.html").read_text() == "of one run"
    assert (first.path / "comparison" / "report.html").is_file()
    assert (first.path / "comparison" / "plots" / "summary.png").is_file()


def test_an_empty_path_is_no_path(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        report_program.main([""])
    assert ended.value.code == 2
    assert "the path is empty" in capsys.readouterr().err
