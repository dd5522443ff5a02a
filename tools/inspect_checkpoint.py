"""Tell what a checkpoint is: a Hugging Face folder, a Megatron checkpoint, or a run's directory, of which the newest is shown.

    python tools/inspect_checkpoint.py DIR
    python tools/inspect_checkpoint.py DIR --checksum --tensors --json

Reads headers only. --checksum reads everything: it compares the files with the checkpoint's checksums.json, and prints a checksum of the weights that is
the same for a folder, its Megatron checkpoint in any layout, and what is exported from that. Weights that differ by dtype differ.
Exit code 2 for what is no checkpoint, is damaged, or is a model that is not supported; of the last all that can be told is printed before.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

import opd_megatron
from opd_megatron.conversion.command_line import given_path

_KINDS = {
    "hugging_face": "Hugging Face folder",
    "training": "Megatron checkpoint of a training run",
    "converted": "Megatron checkpoint, converted",
    "megatron": "Megatron checkpoint",
}
_NOT_RECORDED = "not recorded"


def main() -> int:
    parser = argparse.ArgumentParser(description="What a checkpoint is.")
    parser.add_argument("folder", type=given_path, metavar="DIR", help="a Hugging Face folder, a Megatron checkpoint, or a run's directory")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--checksum", action="store_true", help="read all files: verify them, and print a checksum of the weights")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its shape, dtype and files")
    arguments = parser.parse_args()
    opd_megatron.import_megatron()
    from opd_megatron.conversion.inspect import damaged_file, inspect_checkpoint
    from opd_megatron.conversion.weights_checksum import weights_checksum

    try:
        found = inspect_checkpoint(arguments.folder)
        record = found.to_json(tensors=arguments.tensors)
        damage = damaged_file(found.folder) if arguments.checksum else None
        if damage is not None:
            raise ValueError(f"{found.folder} is damaged: {damage}")
        record["files_verified"] = arguments.checksum and found.num_recorded_files is not None
        record["weights_sha256"] = weights_checksum(found.source) if arguments.checksum and found.source is not None else None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record) if arguments.json else _text(record), flush=True)
    if found.problem is not None:
        print(f"error: {found.problem}", file=sys.stderr)
        return 2
    return 0


def _text(record: Mapping[str, Any]) -> str:
    """Return the record as lines of a name and what there is to say."""
    rows = [("folder", record["folder"]), ("kind", _KINDS[record["kind"]]), *_model_rows(record)]
    if record["kind"] != "hugging_face":
        rows += [("optimizer", _counted(record["optimizer"]) or "no"), ("made by", record["made_by"] or _NOT_RECORDED)]
        rows += [("beside", text) for text in [_counted(record["beside"])] if text]
        rows += [("source", str(record["source"]))] if record["source"] else []
    if record["kind"] == "training":
        ranks = f" on {record['world_size']} ranks" if record["world_size"] else ""
        rows += [("step", str(record["step"])), ("layout", f"{record['layout']}{ranks}" if record["layout"] else _NOT_RECORDED)]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rows += [("versions", versions or _NOT_RECORDED), ("files", f"{record['files']:,}, {record['bytes']:,} bytes"), ("checksums", _checksums(record))]
    rows += [("sha256 of weights", record["weights_sha256"])] if record["weights_sha256"] else []
    width = max(len(name) for name, _ in rows) + 2
    lines = [textwrap.fill(text, 160, initial_indent=name.ljust(width), subsequent_indent=" " * width, break_on_hyphens=False) for name, text in rows]
    for tensor in record.get("stored_tensors", ()):
        lines.append(f"{tensor['name']}  {list(tensor['shape'])}  {tensor['dtype']}  {' '.join(tensor['files'])}")
    return "\n".join(lines)


def _model_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    architecture = record["architecture"]
    facts = {key: value for key, value in (architecture or {}).items() if value is not None}
    nested = [(key, _listed(value)) for key, value in facts.items() if isinstance(value, Mapping)]
    flat = _listed({key: value for key, value in facts.items() if not isinstance(value, Mapping)})
    return [
        ("architecture", flat or "not supported"),
        *nested,
        ("parameters", f"{record['parameters']:,}" + ("" if architecture else " as stored")),
        ("weights", _counted(record["weights"]) or "none"),
    ]


def _listed(facts: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in facts.items())


def _counted(counts: Mapping[str, Any] | None) -> str:
    if counts is None:
        return ""
    return f"{counts['tensors']:,} tensors: " + ", ".join(f"{number:,} {dtype}" for dtype, number in sorted(counts["dtypes"].items()))


def _checksums(record: Mapping[str, Any]) -> str:
    if record["recorded_files"] is None:
        return _NOT_RECORDED
    return f"{record['recorded_files']} files " + ("are as they were written" if record["files_verified"] else "recorded, not compared (--checksum)")


if __name__ == "__main__":
    sys.exit(main())
