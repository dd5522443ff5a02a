"""Prompts written by templates, what a privileged teacher reads, and where its response begins.

Not covered: the chat templates of published models; those here end as Qwen3's and DeepSeek-R1's do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config import DataConfig, PrivilegedConfig
from opd_megatron.data import PromptSet, load_prompts
from opd_megatron.data.templates import check_templates, ending_as
from tests.unit.test_data import byte_tokenizer, contents, write_jsonl

# As Qwen3: without thinking, the block is closed before the response begins.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ROWS = [
    {"prompt": "1 + 1?", "answer": "2", "solution": "One and one is two."},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}], "answer": "4", "solution": "Twice two: {{ 4 }}."},
]


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer(template=THINKING)


@pytest.fixture
def template(tmp_path: Path) -> PrivilegedConfig:
    file = tmp_path / "teacher.jinja"
    file.write_text("{{ problem }}\nSolution: {{ solution }}\n")
    return PrivilegedConfig(template=str(file))


def _load(tmp_path: Path, tokenizer: Any, privileged: PrivilegedConfig, rows: list[Any] | None = None, room: int = 1000, **data: Any) -> PromptSet:
    config = DataConfig(prompts=write_jsonl(tmp_path / "rows.jsonl", ROWS if rows is None else rows), **data)
    return load_prompts(config, tokenizer, part="all", privileged=privileged, max_teacher_tokens=room)


def _read(prompts: PromptSet, tokenizer: Any) -> list[tuple[str, str]]:
    return [(tokenizer.decode(prompt.ids), tokenizer.decode(prompt.as_teacher_reads().ids)) for prompt in prompts.prompts]


def test_the_teacher_reads_the_solution_and_the_student_does_not(tmp_path, tokenizer, template):
    first, second = _read(_load(tmp_path, tokenizer, template), tokenizer)
    assert first == ("<|user|>1 + 1?<|assistant|>", "<|user|>1 + 1?\nSolution: One and one is two.<|assistant|>")
    # Only the last message is written; what a row holds is never itself a template.
    assert second[1] == "<|system|>Be brief.<|user|>2 + 2?\nSolution: Twice two: {{ 4 }}.<|assistant|>"


def test_a_students_template_writes_its_prompt_and_the_teachers_takes_the_problem_as_it_is(tmp_path, tokenizer, template):
    (tmp_path / "student.jinja").write_text("{{ problem }} Think step by step.")
    prompts = _load(tmp_path, tokenizer, template, prompt_template=str(tmp_path / "student.jinja"))
    assert contents(prompts)[0] == "1 + 1? Think step by step."
    assert _read(prompts, tokenizer)[0] == ("<|user|>1 + 1? Think step by step.<|assistant|>", "<|user|>1 + 1?\nSolution: One and one is two.<|assistant|>")


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("s<think>\n\n</think>\n\n", "t", "t<think>\n\n</think>\n\n"),
        ("s<think>\n", "t", "t<think>\n"),
        ("s", "t<think>\n\n</think>\n\n", "t"),
        ("s<think>\n\n</think>\n\n", "t<think>\n", "t<think>\n\n</think>\n\n"),
        ("s", "t", "t"),
        ("s<think>\n", "t<think>kept</think>, then<think>\n\n</think>\n\n", "t<think>kept</think>, then<think>\n"),
    ],
)
def test_the_teachers_prompt_ends_as_the_students_does(student, teacher, expected):
    assert ending_as(teacher, student) == expected


def test_the_response_begins_behind_the_same_block_of_thinking(tmp_path, tokenizer, template):
    thinks = replace(template, chat_template_kwargs={"enable_thinking": True})
    student, teacher = _read(_load(tmp_path, tokenizer, thinks, chat_template_kwargs={"enable_thinking": False}), tokenizer)[0]
    assert student.endswith("<|assistant|><think>\n\n</think>\n\n")
    assert teacher.endswith("two.<|assistant|><think>\n\n</think>\n\n")
    as_written = replace(thinks, thinking="template")
    assert _read(_load(tmp_path, tokenizer, as_written, chat_template_kwargs={"enable_thinking": False}), tokenizer)[0][1].endswith("two.<|assistant|>")


@pytest.mark.parametrize("row", [{"prompt": "3?"}, {"prompt": "3?", "solution": "  "}, {"prompt": "3?", "solution": ["3"]}], ids=["absent", "blank", "no text"])
def test_a_row_without_its_solution_is_refused_with_its_place(tmp_path, tokenizer, template, row):
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: the row has no solution, which privileged\.template=.* mentions; set data\.solution_key"):
        _load(tmp_path, tokenizer, template, [*ROWS, row])
    # A template that asks for less takes it.
    (tmp_path / "plain.jinja").write_text("{{ problem }} again")
    assert len(_load(tmp_path, tokenizer, PrivilegedConfig(template=str(tmp_path / "plain.jinja")), [*ROWS, row])) == 3


def test_a_privileged_prompt_that_leaves_no_room_is_dropped_and_counted(tmp_path, tokenizer, template):
    lengths = [len(prompt.teacher_ids or ()) for prompt in _load(tmp_path, tokenizer, template).prompts]
    shorter = _load(tmp_path, tokenizer, template, room=min(lengths))
    assert (len(shorter), shorter.num_dropped_privileged, shorter.num_dropped_long) == (1, 1, 0)
    with pytest.raises(ValueError, match=r"2 with a prompt of more than 5 tokens for the teacher, which leaves it no room .* shorten privileged\.template"):
        _load(tmp_path, tokenizer, template, room=5)


def test_held_out_prompts_stay_for_the_student_where_the_teacher_has_no_room(tmp_path, tokenizer, template):
    data = DataConfig(prompts=write_jsonl(tmp_path / "rows.jsonl", ROWS))
    lengths = [len(prompt.teacher_ids or ()) for prompt in _load(tmp_path, tokenizer, template).prompts]
    prompts = load_prompts(data, tokenizer, part="all", privileged=template, max_teacher_tokens=min(lengths), drop_without_room=False)
    assert [prompt.teacher_ids is None for prompt in prompts.prompts] == [length > min(lengths) for length in lengths]
    assert (len(prompts), prompts.num_dropped_privileged) == (2, 1)


def test_the_fingerprint_notices_a_changed_template(tmp_path, tokenizer, template):
    before = _load(tmp_path, tokenizer, template).fingerprint
    Path(template.template).write_text("{{ problem }} {{ solution }}")
    assert _load(tmp_path, tokenizer, template).fingerprint != before


def test_the_fingerprint_notices_a_changed_solution_where_it_is_read(tmp_path, tokenizer, template):
    changed = [{**ROWS[0], "solution": "Count."}, ROWS[1]]
    with_teacher = {_load(tmp_path, tokenizer, template, rows).fingerprint for rows in (ROWS, changed)}
    without = {_load(tmp_path, tokenizer, PrivilegedConfig(), rows).fingerprint for rows in (ROWS, changed)}
    assert (len(with_teacher), len(without)) == (2, 1)


def test_without_a_chat_template_the_texts_pass_as_they_are(tmp_path, template):
    bare = byte_tokenizer(template=None)
    # What looks like the end of a chat template is the row's own text here.
    rows = [{**ROWS[0], "solution": "It ends with <think>"}]
    assert _read(_load(tmp_path, bare, template, rows), bare) == [("1 + 1?", "1 + 1?\nSolution: It ends with <think>")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ problem }} {{ solutoin }}", r"mentions solutoin; a prompt template knows problem, solution, answer"),
        ("{{ problem ", r"is no Jinja template: "),
        ("{{ solution }}", r"does not mention problem; write "),
        (None, r"cannot be read \(.*No such file"),
    ],
    ids=["unknown variable", "malformed", "no problem", "absent"],
)
def test_templates_that_cannot_be_used_are_refused_before_anything_is_read(tmp_path, text, message):
    file = tmp_path / "teacher.jinja"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=rf"privileged\.template='.*teacher\.jinja' {message}"):
        check_templates(DataConfig(prompts="x.jsonl"), PrivilegedConfig(template=str(file)))


def test_a_students_template_cannot_show_it_the_solution(tmp_path):
    (tmp_path / "student.jinja").write_text("{{ problem }} {{ solution }}")
    with pytest.raises(ValueError, match=r"data\.prompt_template=.* mentions solution; a prompt template knows problem"):
        check_templates(DataConfig(prompts="x.jsonl", prompt_template=str(tmp_path / "student.jinja")), PrivilegedConfig())


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{% for i in range(10**9) %}{% endfor %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"])
def test_whatever_a_template_raises_is_about_the_row(tmp_path, tokenizer, text):
    (tmp_path / "bad.jinja").write_text("{{ problem }}" + text)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: privileged\.template=.* fails on this row: (ZeroDivision|Overflow|Recursion)Error"):
        _load(tmp_path, tokenizer, PrivilegedConfig(template=str(tmp_path / "bad.jinja")))


def test_a_template_cannot_leave_its_sandbox(tmp_path, tokenizer):
    (tmp_path / "bad.jinja").write_text("{{ problem.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: privileged\.template=.* fails on this row: .*unsafe"):
        _load(tmp_path, tokenizer, PrivilegedConfig(template=str(tmp_path / "bad.jinja")))
