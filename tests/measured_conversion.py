"""Convert a folder to a checkpoint and back, `HF CHECKPOINT BACK`, without the half gibibyte for others beside the largest; print memory and the stated bounds.

A program of its own: the peak of a process that has done something else is that of something else.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"

import opd_megatron

opd_megatron.import_megatron()

import torch  # noqa: E402

from opd_megatron.conversion import workers  # noqa: E402
from opd_megatron.conversion.convert import Conversion, convert  # noqa: E402
from opd_megatron.conversion.settings import Settings  # noqa: E402
from opd_megatron.conversion.to_hf import ToHF  # noqa: E402
from opd_megatron.conversion.to_megatron import ToMegatron  # noqa: E402
from opd_megatron.models.weight_map import weight_map  # noqa: E402
from opd_megatron.models.weights import open_weights  # noqa: E402

NUM_WORKERS = 3


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def measure(conversion: Conversion, out: str) -> dict[str, int]:
    before = peak_bytes()
    convert(conversion, Path(out), Settings(workers=NUM_WORKERS, verify=True))
    bound = workers.stated_bytes(max(map(conversion.row_bytes, weight_map(conversion.source.architecture))), NUM_WORKERS)
    return {"grown_bytes": peak_bytes() - before, "bound_bytes": bound}


def main() -> None:
    torch.set_num_threads(1)
    workers.BUFFER_BYTES = 0
    _, hf, checkpoint, back = sys.argv
    there = measure(ToMegatron(open_weights(hf=hf), 64 << 20), checkpoint)
    print(json.dumps([there, measure(ToHF(open_weights(checkpoint=checkpoint), max_shard_bytes=64 << 20), back)]))


if __name__ == "__main__":
    main()
