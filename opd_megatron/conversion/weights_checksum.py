"""One number for the weights of a model, the same for a Hugging Face folder, its Megatron checkpoint of any layout, and the folder exported from that.

SHA-256 over lines `name dtype shape sha256-of-bytes` of all Hugging Face tensors, sorted by name. Sharding, file order, vocabulary padding, optimizer state
and a tied head that is stored twice do not enter. A dtype does: the one a tensor is read in (`HFWeights.read`), not that of a run's fp32 master weights.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch

from opd_megatron.models.weight_map import MappedTensor, weight_map
from opd_megatron.models.weight_slices import to_hf
from opd_megatron.models.weights import WeightSource

# Reading, and hashing without Python's lock. Each thread holds one row of the weight map, twice where it is fused of parts.
_THREADS = 4


def weights_checksum(source: WeightSource) -> str:
    """Return the checksum as hexadecimal digits; ValueError where the source's files are damaged."""

    def lines(row: MappedTensor) -> list[str]:
        return [_line(name, part) for name, part in to_hf(row, source.read(row), source.architecture).items()]

    pool = ThreadPoolExecutor(_THREADS)
    try:
        found = [line for row_lines in pool.map(lines, weight_map(source.architecture)) for line in row_lines]
    finally:
        pool.shutdown(cancel_futures=True)
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()


def _line(name: str, tensor: torch.Tensor) -> str:
    data = tensor.contiguous().view(torch.uint8).numpy().data
    return f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}\n"
