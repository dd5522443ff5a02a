"""What the files of a checkpoint were when it was written: a flipped bit on a disk, a file cut short, or one that is gone shows before anything is loaded.

Ranks share the files among them, so that a large checkpoint is read by all nodes at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from opd_megatron.models.file_digests import Digests, Record, damage_in_file, read_record, write_record
from opd_megatron.parallel.world import agreed_by_rank_0, shared_errors


def write_checksums(folder: Path, own: Digests) -> None:
    """Write size and hash of every file of a folder into it: `own` are those of the files that this rank wrote, the others are rank 0's and small.

    Every rank calls it, once all files are there. ValueError on every rank if one cannot be read.
    """
    parts: list[Digests] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    with shared_errors():
        if dist.get_rank() == 0:
            write_record(folder, {name: entry for part in parts for name, entry in part.items()})


def damage_in_files(folder: Path) -> str | None:
    """Return, the same on every rank, what is wrong with the first damaged file of a folder; None if all are as written, or nobody wrote down how that is."""
    if agreed_by_rank_0(next(folder.iterdir(), None)) is None:
        return "it is empty"
    wanted = agreed_by_rank_0(read_record(folder) if dist.get_rank() == 0 else None)
    if not isinstance(wanted, Record):
        return wanted
    own = [damage for name in _share(list(wanted.files)) if (damage := damage_in_file(folder, name, wanted)) is not None]
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    return next((damage for part in parts for damage in part), None)


def _share(names: Sequence[str]) -> list[str]:
    """Return this rank's files, every so many-th: those of one rank of the run that wrote them stand together."""
    return list(names)[dist.get_rank() :: dist.get_world_size()]
