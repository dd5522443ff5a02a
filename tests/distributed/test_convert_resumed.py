"""Conversions that were broken off go on, or start over where the source or the options are others.

Not covered: disks that fail, locks of network file systems.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd_megatron.conversion.settings import Settings
from opd_megatron.conversion.unfinished import FinishedFile, unfinished_folder
from tests.converting import EACH_DIRECTION, PARTS, SHARDS, TO_HF, TO_MEGATRON, assert_same_weights, converted, flip_a_bit, interrupted, refused, state_of
from tests.model_configs import edit_json


def _words(tool: str, source: Path, out: Path, sizes: tuple[object, ...]) -> tuple[object, ...]:
    return ("--hf" if tool == TO_MEGATRON else "--checkpoint", source, "--out", out, *sizes, "--workers", 1)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@EACH_DIRECTION
@pytest.mark.parametrize(("signal", "code"), [("SIGKILL", -9), ("SIGINT", 75), ("SIGTERM", 75)])
def test_a_conversion_that_was_ended_goes_on(
    request: pytest.FixtureRequest, tmp_path: Path, tool: str, source: str, sizes: tuple[object, ...], pattern: str, signal: str, code: int
) -> None:
    folder, out, partial = request.getfixturevalue(source), tmp_path / "out", tmp_path / "out.partial"
    done = interrupted(tool, signal, 2, *_words(tool, folder, out, sizes))
    assert done.returncode == code, done.stderr
    assert not out.exists()
    assert "Traceback" not in done.stderr
    if code == 75:
        assert done.stderr.splitlines()[-2:] == [f"2 finished files are kept in {partial}: the same command goes on from there", "interrupted"]
    finished = json.loads("[" + ",".join((partial / ".conversion" / "journal.jsonl").read_text().splitlines()[1:]) + "]")
    assert len(finished) == 2
    before = {entry["name"]: (partial / entry["name"]).stat().st_mtime_ns for entry in finished}
    said = converted(tool, folder, out, *sizes)
    assert f"2 of {len(list(out.glob(pattern)))} files are there already" in said
    assert all((out / name).stat().st_mtime_ns == written for name, written in before.items())
    assert not partial.exists()
    # As one that nobody ended.
    converted(tool, folder, tmp_path / "undisturbed", *sizes)
    assert _contents(out) == _contents(tmp_path / "undisturbed")


def _another_source(hf: Path) -> None:
    os.utime(hf / "model-00002-of-00003.safetensors", ns=(0, 0))


def _another_config(hf: Path) -> None:
    edit_json(hf / "generation_config.json", temperature=0.5)


@pytest.mark.parametrize("change", [_another_source, _another_config])
def test_another_source_starts_over(hf: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    out = tmp_path / "out"
    assert interrupted(TO_MEGATRON, "SIGKILL", 2, *_words(TO_MEGATRON, hf, out, PARTS)).returncode == -9
    change(hf)
    said = converted(TO_MEGATRON, hf, out, *PARTS)
    assert f"{out}.partial is of a conversion with another source: starting over" in said
    assert "are there already" not in said
    converted(TO_HF, out, tmp_path / "back")
    assert_same_weights(hf, tmp_path / "back")


def test_other_options_start_over(sharded_checkpoint: Path, sharded_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert interrupted(TO_HF, "SIGKILL", 2, *_words(TO_HF, sharded_checkpoint, out, SHARDS)).returncode == -9
    assert "with another options: starting over" in converted(TO_HF, sharded_checkpoint, out, *SHARDS, "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in state_of(out).values()} == {torch.bfloat16}


@EACH_DIRECTION
def test_a_finished_file_that_was_damaged_is_written_again(
    request: pytest.FixtureRequest, sharded_folder: Path, tmp_path: Path, tool: str, source: str, sizes: tuple[object, ...], pattern: str
) -> None:
    folder, out, partial = request.getfixturevalue(source), tmp_path / "out", tmp_path / "out.partial"
    assert interrupted(tool, "SIGKILL", 3, *_words(tool, folder, out, sizes)).returncode == -9
    first, second, third = [json.loads(line)["name"] for line in (partial / ".conversion" / "journal.jsonl").read_text().splitlines()[1:]]
    flip_a_bit(partial / first)
    (partial / second).write_bytes((partial / second).read_bytes()[:-1])
    (partial / third).unlink()
    said = converted(tool, folder, out, *sizes)
    assert f"{first} has other bytes than were written: writing it again" in said
    assert f"{second} has " in said
    converted(tool, folder, tmp_path / "undisturbed", *sizes)
    assert _contents(out) == _contents(tmp_path / "undisturbed")


def test_two_conversions_into_one_folder_are_not_mixed(sharded_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with unfinished_folder(out, {"another": "process"}, Settings(), replace=False) as unfinished:
        (unfinished.folder / "file").write_bytes(b"1234")
        unfinished.add(FinishedFile(name="file", digest=[4, "hash"], contents=[]))
        message = refused(TO_MEGATRON, sharded_folder, out)
        assert f"another conversion is writing {out}.partial" in message
        assert (unfinished.folder / "file").read_bytes() == b"1234"
    assert {path.name for path in out.iterdir()} == {"file"}
