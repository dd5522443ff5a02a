"""A configuration that a run wrote is read again as it was, and what no field can hold is refused by its key."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from opd_megatron.config import RunConfig, from_json
from recipes.quickstart import quickstart
from recipes.run import all_recipes


def stored(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_json()))


def test_every_recipe_is_read_as_it_was_written() -> None:
    for name, recipe in all_recipes().items():
        found = from_json(RunConfig, stored(recipe()))
        assert found == recipe(), name
        # Equality of dataclasses is of the same classes; of tuples and lists it is not, so these came back as they were.
        assert found.to_json() == recipe().to_json()


def test_what_an_older_version_did_not_write_has_its_default() -> None:
    values = stored(quickstart())
    del values["evaluation"], values["training"]["recompute"]
    assert from_json(RunConfig, values) == dataclasses.replace(quickstart(), evaluation=RunConfig.__dataclass_fields__["evaluation"].default_factory())  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.warp", 9, "'training.warp'"),
        ("teacher.layout.warp", 9, "'teacher.layout.warp'"),
        ("training.steps", 0, "training.steps=0"),
        ("data", None, "data"),
    ],
)
def test_what_no_field_can_hold_is_refused(key: str, value: Any, message: str) -> None:
    values = node = stored(quickstart())
    *sections, name = key.split(".")
    for section in sections:
        node = node[section]
    if value is None:
        del node[name]
    else:
        node[name] = value
    with pytest.raises(ValueError, match=message):
        from_json(RunConfig, values)
