"""A run's `config.json` -> the configuration that it was written from."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")


def from_json(cls: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Return the config whose `to_json` the values are; what an older version did not write has its default. ValueError for what no field can hold."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - hints.keys())
    if unknown:
        raise ValueError(f"the stored configuration has {prefix + unknown[0]!r}, which this version does not know; use the version that ran it")
    try:
        return cls(**{name: _value(hints[name], value, prefix + name) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"the stored configuration is not whole: {prefix or 'config'}: {error}") from None


def _value(annotation: Any, value: Any, key: str) -> Any:
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    section = next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)
    if section is not None and isinstance(value, Mapping):
        return from_json(section, value, key + ".")
    if isinstance(value, list) and any(typing.get_origin(option) is tuple for option in options):
        return tuple(value)
    return value
