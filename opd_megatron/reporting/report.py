"""One self-contained HTML file about one run, or several side by side: numbers, curves, what the student wrote before and after."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from opd_megatron.reporting.metrics import RunHistory, read_history
from opd_megatron.reporting.plots import RUN_COLORS, draw_report, write_summary
from opd_megatron.reporting.run_directory import config_leaves, replace_text

MAX_EXAMPLES = 12
MAX_EXAMPLE_CHARACTERS = 4000
NOTHING = "–"
# Of the teacher's accuracy: what counts as having reached it.
_NEARLY = 0.95

# Control characters are shown as their pictures; tab, newline stay. Direction overrides could reorder the text around them.
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_VISIBLE = _CONTROLS | dict.fromkeys((0x7F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response of an example; `verdict` is "correct", "wrong" or the score between them."""

    label: str
    response: str
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Example:
    prompt: str
    reference: str
    answers: list[Answer]


def write_report(run_directories: Sequence[Path], out: Path) -> Path:
    """Write the report of the runs to `out`, and `plots/summary.png` beside it; return `out`.

    Whatever a run lacks is named in the report. Raises ValueError for a folder that does not exist or an `out` that cannot be written.
    """
    if not run_directories:
        raise ValueError("a report needs at least one run directory")
    histories = _with_distinct_names([read_history(Path(path)) for path in run_directories])
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=" · ".join(history.name for history in histories),
            runs=[_describe(history, RUN_COLORS[index % len(RUN_COLORS)]) for index, history in enumerate(histories)],
            rows=_rows(histories),
            settings=_differing_settings(histories),
            plots=draw_report(histories),
        )
    )
    out = Path(out)
    try:
        (out.parent / "plots").mkdir(parents=True, exist_ok=True)
        write_summary(histories, out.parent / "plots" / "summary.png")
        replace_text(out, page)
    except OSError as error:
        raise ValueError(f"report {out} cannot be written: {error.strerror or error}; choose another --out") from error
    return out


def pair_examples(history: RunHistory) -> list[Example]:
    """Return the prompts of the first student evaluation, in recorded order, with what was answered before and after training, and by the teacher."""
    students = [record for record in history.evaluations_of("student") if record.get("examples")]
    if not students:
        return []
    columns = [("before" if students[0]["step"] == 0 else f"step {students[0]['step']}", students[0])]
    if len(students) > 1:
        columns.append((f"after step {students[-1]['step']}", students[-1]))
    columns += [("teacher", record) for record in history.evaluations_of("teacher")[-1:] if record.get("examples")]
    tables = [(label, {example.get("prompt"): example for example in reversed(record["examples"])}) for label, record in columns]
    return [
        Example(
            prompt=_readable(prompt),
            reference=_readable(example.get("answer")),
            answers=[_answer(label, table[prompt]) for label, table in tables if prompt in table],
        )
        for prompt, example in list(tables[0][1].items())[::-1][:MAX_EXAMPLES]
    ]


def _answer(label: str, example: Mapping[str, Any]) -> Answer:
    score = example.get("score")
    verdict = "not graded" if score is None else "correct" if score >= 1 else "wrong" if score <= 0 else f"score {score:.2f}"
    return Answer(label=label, response=_readable(example.get("response")), verdict=verdict)


def _readable(text: Any) -> str:
    """Return untrusted text fit to be shown: its middle left out if long, control characters visible. Escaping is the template's work."""
    text = "" if text is None else str(text)
    if len(text) > MAX_EXAMPLE_CHARACTERS:
        half = MAX_EXAMPLE_CHARACTERS // 2
        text = f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"
    return text.encode("utf-8", errors="replace").decode().translate(_VISIBLE)


def _describe(history: RunHistory, color: str) -> dict[str, Any]:
    return {
        "name": _readable(history.name),
        "color": color,
        "recipe": _readable(history.recipe or "unknown recipe"),
        "status": history.status or "unknown",
        "models": _models(history),
        "tiles": _tiles(history),
        "remarks": [*history.remarks, *_nonfinite_remarks(history)],
        "examples": pair_examples(history),
        "config": _readable_json(history.config),
    }


def _models(history: RunHistory) -> str:
    """Return who learns from whom, as far as the config tells."""
    names = []
    for role in ("student", "teacher"):
        source = history.setting(f"{role}.hf") or history.setting(f"{role}.checkpoint")
        if source:
            names.append(f"{role} {_readable(source)}")
    return ", ".join(names)


def _tiles(history: RunHistory) -> list[tuple[str, str, str]]:
    """Return the four numbers a reader looks for first: caption, value, note."""
    before, after, teacher = _accuracies(history)
    num_prompts = (history.evaluations_of("student") or [{}])[-1].get("prompts")
    change = f"{100 * (after - before):+.1f} points" if before is not None and after is not None else "not evaluated both before and after training"
    share_before = _ratio(before, teacher)
    seconds = sum(history.series("step_seconds")[1])
    return [
        (
            "Teacher accuracy",
            _percent(teacher),
            (f"{num_prompts} held-out prompts" if num_prompts else "held-out prompts") if teacher is not None else "not evaluated",
        ),
        ("Student accuracy", NOTHING if before is after is None else f"{_percent(before)} → {_percent(after)}", change),
        ("Share of the teacher's accuracy", _percent(_ratio(after, teacher)), "" if share_before is None else f"{_percent(share_before)} before training"),
        ("Training", _steps_done(history), f"{_duration(seconds)} in steps" if seconds else "no times recorded"),
    ]


def _rows(histories: Sequence[RunHistory]) -> list[tuple[str, list[str]]]:
    """Return the table of numbers, a column per run; a row that no run has is left out."""
    row_makers: list[tuple[str, Callable[[RunHistory], str]]] = [
        ("Student before training", lambda h: _percent(_accuracies(h)[0])),
        ("Student after training", lambda h: _percent(_accuracies(h)[1])),
        ("Teacher", lambda h: _percent(_accuracies(h)[2])),
        ("Share of the teacher's accuracy", lambda h: _percent(_ratio(_accuracies(h)[1], _accuracies(h)[2]))),
        ("Gap to the teacher closed", lambda h: _percent(_gap_closed(*_accuracies(h)))),
        *((f"pass@{k}, before → after (teacher)", lambda h, k=k: _pass_at(h, k)) for k in _pass_at_ks(histories)),
        (f"Steps to {100 * _NEARLY:.0f} % of the teacher's accuracy", _steps_to_teacher),
        (f"Time to {100 * _NEARLY:.0f} % of the teacher's accuracy, in steps", lambda h: _duration(h.seconds_until(_step_near_teacher(h) or 0))),
        ("Evaluation", _evaluation_setting),
        ("Steps", _steps_done),
        ("Time in steps", lambda h: _duration(h.seconds_until(h.steps[-1]["step"] if h.steps else 0))),
        ("Of it in probes for extrapolated weights", lambda h: _duration(h.probe_seconds())),
        ("Extrapolations accepted", _extrapolations),
        ("Time in evaluations", lambda h: _duration(sum(record.get("seconds") or 0 for record in h.evaluations))),
        ("Time in which training stood still for checkpoints", lambda h: _duration(sum(h.series("checkpoint_seconds")[1]))),
        ("Of the steps, waiting for slower ranks", lambda h: _percent(_ratio(sum(h.series("idle_seconds")[1]) or None, sum(h.series("step_seconds")[1])))),
        ("Tokens per second and GPU, median", lambda h: _median(h, "tokens_per_second_per_gpu", ".4g")),
        ("TFLOP/s and GPU in forward and backward, median", lambda h: _median(h, "train_tflops_per_gpu", ".3g")),
        ("Model FLOP utilization of it", lambda h: _percent(median(values) if (values := h.series("train_model_flop_utilization")[1]) else None)),
        ("Response tokens trained on", lambda h: _count(sum(h.series("response_tokens")[1]))),
        ("Divergence, first → last tenth of steps", lambda h: _first_to_last(h, "divergence")),
        ("Loss, first → last tenth of steps", lambda h: _first_to_last(h, "loss")),
        ("Student entropy, first → last tenth of steps", lambda h: _first_to_last(h, "student_entropy")),
    ]
    rows = [(label, [make(history) for history in histories]) for label, make in row_makers]
    return [(label, cells) for label, cells in rows if any(cell != NOTHING for cell in cells)]


def _accuracies(history: RunHistory) -> tuple[float | None, float | None, float | None]:
    """Return the student's accuracy at the first and the last evaluation (None if there was only one), and the teacher's."""
    students, teachers = history.evaluations_of("student"), history.evaluations_of("teacher")
    return (
        students[0]["accuracy"] if students and students[0]["step"] == 0 else None,
        students[-1]["accuracy"] if students and students[-1]["step"] > 0 else None,
        teachers[-1]["accuracy"] if teachers else None,
    )


def _gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Return the share of the distance from student to teacher that training covered; None where the teacher was not ahead."""
    if before is None or after is None or teacher is None or teacher <= before:
        return None
    return (after - before) / (teacher - before)


def _pass_at_ks(histories: Sequence[RunHistory]) -> list[str]:
    ks = {k for history in histories for record in history.evaluations for k in record.get("pass_at_k") or {}}
    return sorted(ks - {"1"}, key=lambda k: (len(k), k))


def _pass_at(history: RunHistory, k: str) -> str:
    students, teachers = history.evaluations_of("student"), history.evaluations_of("teacher")
    first, last, teacher = (
        ((record.get("pass_at_k") or {}).get(k) for record in (students[0], students[-1], (teachers or [{}])[-1])) if students else (None,) * 3
    )
    return NOTHING if first is None and last is None else f"{_percent(first)} → {_percent(last)} ({_percent(teacher)})"


def _step_near_teacher(history: RunHistory) -> int | None:
    teacher = _accuracies(history)[2]
    return history.step_reaching(_NEARLY * teacher) if teacher else None


def _steps_to_teacher(history: RunHistory) -> str:
    """Return the step of the first evaluation that was near the teacher's, or that none was."""
    if not _accuracies(history)[2] or not history.evaluations_of("student"):
        return NOTHING
    step = _step_near_teacher(history)
    return "not reached" if step is None else str(step)


def _extrapolations(history: RunHistory) -> str:
    """Return how many searches moved the weights, and the responses that all of them cost."""
    accepted, responses = ([search.get(key) or 0 for search in history.searches] for key in ("accepted_k", "num_responses"))
    return f"{sum(k > 0 for k in accepted)} of {len(accepted)} searches, {_count(sum(responses))} responses" if accepted else NOTHING


def _evaluation_setting(history: RunHistory) -> str:
    records = history.evaluations_of("student")
    if not records or not records[-1].get("prompts"):
        return NOTHING
    record = records[-1]
    samples, temperature = record.get("samples_per_prompt", 1), record.get("temperature")
    sampling = "" if temperature is None else ", greedy" if temperature == 0 else f", temperature {temperature:g}"
    return f"{record['prompts']} prompts × {samples}{sampling}"


def _steps_done(history: RunHistory) -> str:
    wanted = history.setting("training.steps")
    done = history.steps[-1]["step"] if history.steps else 0
    return f"{done} of {wanted} steps" if wanted else f"{done} steps"


def _median(history: RunHistory, key: str, form: str) -> str:
    values = history.series(key)[1]
    return f"{median(values):{form}}" if values else NOTHING


def _first_to_last(history: RunHistory, key: str) -> str:
    values = history.series(key)[1]
    tenth = max(1, len(values) // 10)
    return f"{sum(values[:tenth]) / tenth:.4g} → {sum(values[-tenth:]) / tenth:.4g}" if values else NOTHING


def _nonfinite_remarks(history: RunHistory) -> list[str]:
    remarks = []
    for key in sorted({key for record in history.steps for key in record if key.endswith("_nonfinite")}):
        steps = [record["step"] for record in history.steps if key in record]
        remarks.append(f"{key.removesuffix('_nonfinite')} was not finite at {len(steps)} step(s), first at step {steps[0]}")
    return remarks


def _differing_settings(histories: Sequence[RunHistory]) -> list[tuple[str, list[str]]]:
    """Return the config keys whose values differ between the runs, with each run's value."""
    trees = [config_leaves({"recipe": history.recipe, **history.config}) for history in histories]
    keys = sorted(set().union(*trees))
    rows = [(key, [_setting(tree[key]) if key in tree else NOTHING for tree in trees]) for key in keys]
    return [(key, cells) for key, cells in rows if len(set(cells)) > 1]


def _setting(value: Any) -> str:
    return _readable(value) if isinstance(value, str) else _readable_json(value)


def _with_distinct_names(histories: Sequence[RunHistory]) -> list[RunHistory]:
    """Return the runs, with their whole path for a name where the folder's name alone is not unique."""
    names = [history.name for history in histories]
    return [replace(history, name=str(history.directory.path)) if names.count(history.name) > 1 else history for history in histories]


def _environment() -> Environment:
    return Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _readable_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", errors="replace").decode()


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _percent(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{100 * value:.{digits}f} %"


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f") if value else NOTHING


def _duration(seconds: float) -> str:
    """Return h:mm:ss, or seconds where there are few."""
    return NOTHING if not seconds else f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
