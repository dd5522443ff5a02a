"""`KEY=VALUE` on the command line -> a changed copy of a frozen config, with the types of its fields."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")
# A password in a URL or after its name; tokens of Hugging Face, GitHub, GitLab, Amazon, and those that begin with sk-.
_CREDENTIALS = re.compile(
    r"://[^/\s@]*:[^/\s@]+@|\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-)[A-Za-z0-9_-]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|(?i:passw(?:or)?d|secret|api_?key|token)=."
)


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Return `config` with every `dotted.key=value` applied at once, so that fields that must change together can.

    Raises ValueError for a word without `=`, an unknown key (close keys are listed), or a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not KEY=VALUE; write e.g. training.steps=10")
        _check_key(config, key)
        if _CREDENTIALS.search(value):
            # Not repeated here: this message may be in a log.
            raise ValueError(
                f"{key} holds what looks like a password or a token, which config.json, logs and the report would show; put it into the environment "
                "(HF_TOKEN, WANDB_API_KEY, MLFLOW_TRACKING_PASSWORD, ...) or a credentials file"
            )
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{word!r} sets an entry of a mapping that another word sets whole; put all of it into one of them")
        if isinstance(node.get(leaf), dict):
            raise ValueError(f"{word!r} sets a mapping whole of which another word sets an entry; put all of it into one of them")
        node[leaf] = value
    return _rebuild(config, tree, prefix="")


def all_keys(config: Any, prefix: str = "") -> list[str]:
    """Return every dotted key of a config, or of a config class, depth first."""
    keys: list[str] = []
    for field, annotation in _fields(config if isinstance(config, type) else type(config)):
        value = None if isinstance(config, type) else getattr(config, field.name)
        section = _dataclass_of(annotation)
        if section is None:
            keys.append(prefix + field.name)
        else:
            keys += all_keys(value if value is not None else section, f"{prefix}{field.name}.")
    return keys


def _fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _dataclass_of(annotation: Any) -> type | None:
    """Return the dataclass inside `X` or `X | None`, or None."""
    for option in typing.get_args(annotation) or (annotation,):
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return option
    return None


def _check_key(config: Any, key: str) -> None:
    """Walk the dotted key through the types; raise ValueError with the close keys at the first name that does not exist."""
    cls: type | None = type(config)
    names = key.split(".")
    for position, name in enumerate(names):
        hints = {field.name: annotation for field, annotation in _fields(cls)} if cls else {}
        if name not in hints:
            known = all_keys(config)
            # The same word in another section is a better guess than another word in the same section.
            by_word = difflib.get_close_matches(names[-1], {k.rsplit(".", 1)[-1] for k in known}, n=2, cutoff=0.75)
            close = [k for k in known if k.rsplit(".", 1)[-1] in by_word] or difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"unknown key {key!r}{hint}")
        if typing.get_origin(hints[name]) is Mapping and position == len(names) - 2:
            return
        cls = _dataclass_of(hints[name])
    if cls is not None:
        raise ValueError(f"{key!r} is a section; set one of {', '.join(f'{key}.{field.name}' for field in dataclasses.fields(cls))}")


def _rebuild(config: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    changes: dict[str, Any] = {}
    hints = typing.get_type_hints(type(config))
    for name, value in tree.items():
        key, annotation, current = prefix + name, hints[name], getattr(config, name)
        section = _dataclass_of(annotation)
        if section is not None:
            changes[name] = _rebuild(current, value, key + ".") if current is not None else _build(section, value, key + ".")
        elif isinstance(value, dict):
            changes[name] = {**current, **{option: _any_json(text) for option, text in value.items()}}
        else:
            changes[name] = _parse(value, annotation, key)
    return dataclasses.replace(config, **changes)


def _build(section: type, tree: Mapping[str, Any], prefix: str) -> Any:
    """Return a section that was None before, from overrides alone."""
    hints = typing.get_type_hints(section)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        inner = _dataclass_of(hints[name])
        values[name] = _build(inner, value, f"{prefix}{name}.") if inner is not None else _parse(value, hints[name], prefix + name)
    return section(**values)


def _any_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _parse(text: str, annotation: Any, key: str) -> Any:
    """Return `text` as the first type of the annotation that takes it."""
    origin = typing.get_origin(annotation)
    if origin is Mapping:
        value = _any_json(text)
        if not isinstance(value, dict):
            raise ValueError(f"{key}={text!r} must be a JSON object")
        return value
    if origin is tuple:
        item = typing.get_args(annotation)[0]
        items = _any_json(text)
        if typing.get_origin(item) is typing.Literal:
            words = items if isinstance(items, list) else text.split(",")
            return tuple(_parse(word, item, key) for word in words)
        if not isinstance(items, list) or not all(type(one) is item for one in items):
            raise ValueError(f"{key}={text!r} must be a JSON list, e.g. [1, 2, 4]")
        return tuple(items)
    if origin is typing.Literal:
        allowed = typing.get_args(annotation)
        if text in allowed:
            return text
        raise ValueError(f"{key}={text!r} must be one of {', '.join(map(str, allowed))}")
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(annotation)
        if type(None) in options and text.lower() in ("none", "null", ""):
            return None
        for option in (o for o in options if o is not type(None)):
            try:
                return _parse(text, option, key)
            except ValueError:
                continue
        names = " or ".join(map(_name, options))
        raise ValueError(f"{key}={text!r} must be {names}")
    if annotation is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise ValueError(f"{key}={text!r} must be true or false")
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            raise ValueError(f"{key}={text!r} must be {'an integer' if annotation is int else 'a number'}") from None
    return text


def _name(option: Any) -> str:
    """Return how an error calls one type of an annotation."""
    if option is type(None):
        return "null"
    if typing.get_origin(option) is typing.Literal:
        return f"one of {', '.join(typing.get_args(option))}"
    return "a JSON list" if typing.get_origin(option) is tuple else option.__name__
