"""The records of an offline run of Weights & Biases, read from its file: LevelDB's log format around protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 32768
_WHOLE, _FIRST, _LAST = 1, 2, 4


def records(file: Path) -> list[Any]:
    """Return the records that are whole: the file of a process that was killed may end in half of one."""
    from wandb.proto.wandb_internal_pb2 import Record

    return [Record.FromString(chunk) for chunk in _chunks(file.read_bytes())]


def history(file: Path) -> list[dict[str, Any]]:
    """Return the rows of the run's history."""
    rows = [record.history.item for record in records(file) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def _chunks(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B", "not a file of Weights & Biases"
    position, chunk = 7, b""
    while position + 7 <= len(data):
        if _BLOCK_BYTES - position % _BLOCK_BYTES < 7:
            position += _BLOCK_BYTES - position % _BLOCK_BYTES
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        position += 7
        if position + length > len(data):
            return
        chunk = data[position : position + length] if kind in (_WHOLE, _FIRST) else chunk + data[position : position + length]
        position += length
        if kind in (_WHOLE, _LAST):
            yield chunk
