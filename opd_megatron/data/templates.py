"""From a row to the text that each model reads: the files that write the last user message, the chat template, and where the response begins."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from opd_megatron.config import DataConfig, PrivilegedConfig
from opd_megatron.data.rows import Row

_RESERVED_TEMPLATE_KWARGS = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors")

# A block of thinking that the end of a prompt leaves open, or closes: Qwen3 and DeepSeek-R1 write the same tags.
_THINKING_AT_END = re.compile(r"<think>\s*(</think>\s*)?\Z")


class PromptTemplate:
    """A Jinja file, sandboxed. `variables` are those it mentions; each must have a value in every row."""

    def __init__(self, path: str, key: str, known: Collection[str]) -> None:
        """Read the file named by the configuration's `key`; ValueError if it is missing, malformed, or mentions other variables than `known`."""
        self.where = f"{key}={path!r}"
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(text)))
            self._template = environment.from_string(text)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.where} cannot be read ({error}); name a Jinja file (working directory {Path.cwd()})") from None
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.where} is no Jinja template: {error}") from None
        if unknown := sorted(self.variables - set(known)):
            raise ValueError(f"{self.where} mentions {', '.join(unknown)}; a prompt template knows {', '.join(known)}")
        if "problem" not in self.variables:
            raise ValueError(f"{self.where} does not mention problem; write {{{{ problem }}}} where the message of the data belongs")

    def render(self, values: Mapping[str, str | None], where: str) -> str:
        """Return the message for one row; ValueError, starting with `where`, if a variable that the template mentions has no value."""
        for name in sorted(self.variables):
            if values[name] is None or not str(values[name]).strip():
                raise ValueError(
                    f"{where}: the row has no {name}, which {self.where} mentions; set data.{name}_key to a key that has it, or remove the row "
                    "(held-out rows need it for evaluation.teacher=true alone)"
                )
        try:
            return self._template.render(values)
        except Exception as error:
            # A template is the user's program: whatever it raises is about this row.
            raise ValueError(f"{where}: {self.where} fails on this row: {type(error).__name__}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ReadText:
    """What one row becomes: the messages that the student is asked, the text that it reads, and what a teacher reads that does not read the same."""

    messages: tuple[dict[str, str], ...]
    student: str
    teacher: str | None
    # Its last user message, before any chat template.
    teacher_message: str | None


class PromptText:
    """The texts of rows, by the configuration's templates and the tokenizer's chat template.

    A tokenizer without a chat template takes prompts that are bare strings, as they are, and refuses message lists. `teacher_tokenizer` is given where
    it is not the student's: its chat template then writes what the teacher reads, up to where that one has a response begin.
    """

    def __init__(self, data: DataConfig, tokenizer: Any, privileged: PrivilegedConfig, teacher_tokenizer: Any = None) -> None:
        """Open the templates; ValueError if one cannot be used."""
        self.tokenizer = tokenizer
        self.teacher_tokenizer = tokenizer if teacher_tokenizer is None else teacher_tokenizer
        self._data, self._privileged = data, privileged
        self._student, self._teacher = check_templates(data, privileged)

    def of(self, row: Row) -> ReadText:
        """Return the texts of one row; ValueError, starting with where the row is, if a template does not take it."""
        kwargs = self._data.chat_template_kwargs
        messages = _written(row, self._student)
        student = self._rendered(row, messages, kwargs, self.tokenizer, "student")
        same_tokenizer = self.teacher_tokenizer is self.tokenizer
        if self._teacher is None and same_tokenizer:
            return ReadText(messages=messages, student=student, teacher=None, teacher_message=None)
        told = _written(row, self._teacher) if self._teacher is not None else messages
        teacher = self._rendered(row, told, {**kwargs, **self._privileged.chat_template_kwargs}, self.teacher_tokenizer, "teacher")
        # Without a chat template, the end is the row's own text. Other families think in other words.
        if self._privileged.thinking == "student" and has_chat_template(self.tokenizer) and same_tokenizer:
            teacher = ending_as(teacher, student)
        return ReadText(messages=messages, student=student, teacher=teacher, teacher_message=told[-1]["content"])

    @staticmethod
    def _rendered(row: Row, messages: Sequence[dict[str, str]], kwargs: Mapping[str, Any], tokenizer: Any, role: str) -> str:
        if not has_chat_template(tokenizer):
            if not row.plain:
                raise ValueError(
                    f"{row.where}: the prompt is a message list and the {role}'s tokenizer has no chat template; "
                    "use plain string prompts or add a chat template"
                )
            return messages[0]["content"]
        try:
            return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **kwargs)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"{row.where}: the {role}'s chat template refuses the messages ({error}); check their roles and data.chat_template_kwargs"
            ) from None


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether prompts are conversations that a template writes; else they are plain text."""
    return tokenizer.chat_template is not None


def check_templates(data: DataConfig, privileged: PrivilegedConfig) -> tuple[PromptTemplate | None, PromptTemplate | None]:
    """Return the student's template and the teacher's, None where there is none; ValueError if one cannot be used."""
    for key, kwargs in (("data", data.chat_template_kwargs), ("privileged", privileged.chat_template_kwargs)):
        if reserved := sorted(set(kwargs) & set(_RESERVED_TEMPLATE_KWARGS)):
            raise ValueError(
                f"{key}.chat_template_kwargs must not set {', '.join(reserved)}: prompts are always rendered up to the generation prompt; remove it"
            )
    student = PromptTemplate(data.prompt_template, "data.prompt_template", ("problem",)) if data.prompt_template else None
    teacher = PromptTemplate(privileged.template, "privileged.template", ("problem", "solution", "answer")) if privileged.template else None
    return student, teacher


def _written(row: Row, template: PromptTemplate | None) -> tuple[dict[str, str], ...]:
    """Return the row's messages with the last one as the template writes it."""
    if template is None:
        return row.messages
    *before, last = row.messages
    values = {"problem": last["content"], "solution": row.solution, "answer": row.answer}
    return (*before, {**last, "content": template.render(values, row.where)})


def ending_as(text: str, model: str) -> str:
    """Return a rendered prompt that ends as `model` does: before, within or after a block of thinking.

    A response is read from the same place by both models: a teacher that still expects to open its thinking would put all its probability on a tag
    at the first token.
    """
    end = _THINKING_AT_END.search(model)
    return _THINKING_AT_END.sub("", text) + (end.group() if end else "")
