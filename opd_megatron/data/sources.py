"""Where prompts come from: JSON lines, Parquet, reasoning-gym tasks, Hugging Face datasets. Read lazily, in a fixed order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_megatron.config import DataConfig
from opd_megatron.data.reasoning_tasks import is_reasoning_task, read_reasoning_task
from opd_megatron.data.rows import Row, row_from_record

_OTHER_SUFFIXES = (".json", ".csv", ".tsv", ".txt", ".gz", ".zst", ".arrow")


def read_rows(data: DataConfig) -> Iterator[Row]:
    """Yield the rows of `data.prompts` in their own order; ValueError names the place and the way out."""
    if is_reasoning_task(data.prompts):
        yield from read_reasoning_task(data)
        return
    for index, (where, record) in enumerate(_records(data)):
        yield row_from_record(record, index=index, where=where, data=data)


def check_source(source: str, key: str = "data.prompts") -> None:
    """Raise ValueError for a source that can be refused without reading it: a missing file, or a kind that is not read."""
    path = Path(source).expanduser()
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise ValueError(f"{key}={source!r} does not exist: there is no such file (working directory {Path.cwd()}); check the path")
    elif (path.is_absolute() or source.startswith(".")) and not path.exists():
        raise ValueError(f"{key}={source!r} does not exist; check the path (a dataset of the Hugging Face hub is named OWNER/NAME)")
    elif path.is_file() or path.suffix in _OTHER_SUFFIXES:
        raise ValueError(f"{key}={source!r}: this kind of file is not read; convert it to .jsonl or .parquet")


def _records(data: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    check_source(data.prompts)
    path = Path(data.prompts).expanduser()
    if path.suffix == ".jsonl":
        return _jsonl_records(path)
    if path.suffix == ".parquet":
        return _parquet_records(path)
    return _dataset_records(data, path)


def _jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text ({error}); convert the file to UTF-8 JSON lines") from None
            except ValueError as error:
                raise ValueError(f"{where}: not valid JSON ({error}); each line must be one JSON object") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: {record!r:.80} is not a JSON object; each line must be one, with the prompt under a key")
            yield where, record


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        number = 0
        for batch in batches:
            for record in batch.to_pylist():
                yield f"{path} row {number}", record
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data.prompts={str(path)!r}: not a readable Parquet file ({error}); write it again") from None


def _dataset_records(data: DataConfig, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    dataset = _load_dataset(data, path)
    for number, record in enumerate(dataset):
        yield f"{data.prompts} split {data.split!r} row {number}", record


def _load_dataset(data: DataConfig, path: Path) -> Any:
    """Return one split of a saved dataset folder, or of a dataset by name; `NAME:CONFIG` chooses a configuration."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data.prompts={data.prompts!r} is read as a Hugging Face dataset, which needs: pip install opd-megatron[demo]") from None
    name, _, config = data.prompts.partition(":") if not path.is_dir() else (str(path), "", "")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved_split(datasets.load_from_disk(str(path)), data.split)
        return datasets.load_dataset(name, config or None, split=data.split)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        # FileNotFoundError and ConnectionError, which the library raises for unknown names and without a network, are OSErrors.
        raise ValueError(
            f"data.prompts={data.prompts!r} split={data.split!r} could not be loaded as a Hugging Face dataset: {type(error).__name__}: {error}; "
            "name a .jsonl or .parquet file, reasoning_gym:TASK, a saved dataset folder, or NAME or NAME:CONFIG of a dataset that is cached or reachable"
        ) from None


def _saved_split(saved: Any, split: str) -> Any:
    """Return the split of a saved DatasetDict; a saved single Dataset has no splits and is taken whole."""
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise ValueError(f"the folder has the splits {sorted(saved)}; set data.split to one of them")
    return saved[split]
