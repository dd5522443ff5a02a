"""One record of a data source, whatever its format, as messages, answer and target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_megatron.config import DataConfig

MESSAGES_KEY = "messages"
RESPONSE_KEY = "response"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record before tokenization. `plain` tells a bare string from a message list: only a bare string needs no chat template."""

    index: int
    where: str
    messages: tuple[dict[str, str], ...]
    plain: bool
    answer: str | None
    target: str | None
    solution: str | None
    entry: Any = None


def row_from_record(record: Mapping[str, Any], *, index: int, where: str, data: DataConfig) -> Row:
    """Return the record as a row; ValueError, starting with `where`, for a record without a usable prompt."""
    prompt = _prompt_value(record, where, data)
    answer = _answer_text(record.get(data.answer_key), where, data.answer_key)
    solution = record.get(data.solution_key)
    solution = str(solution) if isinstance(solution, str | int | float) else None
    if isinstance(prompt, str):
        return plain_row(prompt, index=index, where=where, answer=answer, target=_target_text(record, None, answer, where), solution=solution)
    messages, reply = _split_reply(_text_messages(prompt, where), where)
    target = _target_text(record, reply, answer, where)
    return Row(index=index, where=where, messages=messages, plain=False, answer=answer, target=target, solution=solution)


def plain_row(text: str, *, index: int, where: str, answer: str | None, target: str | None, solution: str | None, entry: Any = None) -> Row:
    """Return the row of one user message; ValueError for an empty one."""
    if not text.strip():
        raise ValueError(f"{where}: the prompt is empty; remove the row or fill it")
    messages = ({"role": "user", "content": text},)
    return Row(index=index, where=where, messages=messages, plain=True, answer=answer, target=target, solution=solution, entry=entry)


def _prompt_value(record: Mapping[str, Any], where: str, data: DataConfig) -> Any:
    for key in (data.prompt_key, MESSAGES_KEY):
        if record.get(key) is not None:
            return record[key]
    raise ValueError(
        f"{where}: no prompt under {data.prompt_key!r} and none under {MESSAGES_KEY!r}; the row has {sorted(record)}; set data.prompt_key to one of them"
    )


def _text_messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: the prompt is {value!r:.80}, neither a string nor a list of messages")
    messages = []
    for position, message in enumerate(value):
        present = {key: item for key, item in message.items() if item is not None} if isinstance(message, Mapping) else {}
        if not {"role", "content"} <= set(present):
            raise ValueError(f"{where}: message {position} is {message!r:.80}; each message needs a role and a content")
        for key, item in present.items():
            if not isinstance(item, str):
                raise ValueError(f"{where}: message {position} has {key}={item!r:.80}; only text messages are supported, so make it a string or remove it")
        messages.append(present)
    return messages


def _split_reply(messages: list[dict[str, str]], where: str) -> tuple[tuple[dict[str, str], ...], str | None]:
    """Return the messages before a trailing assistant turn, and that turn's text if there is one."""
    reply = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        roles = [message["role"] for message in messages]
        raise ValueError(f"{where}: the prompt's roles are {roles}; it must end with a user turn for the student to answer")
    return tuple(messages), reply


def _answer_text(value: Any, where: str, key: str) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | Mapping):
        raise ValueError(
            f"{where}: {key}={value!r:.80} is not one reference answer; set data.answer_key to a key with text, or to an absent key for no answers"
        )
    return str(value)


def _target_text(record: Mapping[str, Any], reply: str | None, answer: str | None, where: str) -> str | None:
    if reply is not None:
        return reply
    response = record.get(RESPONSE_KEY)
    if response is None:
        return answer
    if not isinstance(response, str):
        raise ValueError(f"{where}: {RESPONSE_KEY}={response!r:.80} is not text; it is the assistant turn of supervised fine-tuning")
    return response
