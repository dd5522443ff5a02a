"""What a conversion would do, as text: a line for every row of the weight map, and what the disk needs."""

from __future__ import annotations

from collections.abc import Iterator

from opd_megatron.conversion.convert import Conversion, stored_bytes
from opd_megatron.conversion.workers import stated_bytes
from opd_megatron.models.weight_map import MappedTensor, weight_map

_FUSED = {
    "qkv": "query, key and value heads side by side in each key-value group",
    "gate_up": "gate above up",
}


def mapping(conversion: Conversion, workers: int) -> Iterator[str]:
    """Yield the lines. Only headers are read."""
    source, rows = conversion.source, weight_map(conversion.source.architecture)
    for row in rows:
        dtype = str(source.dtype_of(row)).removeprefix("torch.")
        parts = " + ".join(f"{name} {_shape(shape)}" for name, shape in zip(row.hf, row.hf_shapes, strict=True))
        yield f"{row.name}  {_shape(row.shape)} {dtype} = {parts}{_how(row)}"
    total, needed = sum(stored_bytes(source, row) for row in rows), sum(part.num_bytes for part in conversion.parts)
    memory = stated_bytes(max(map(conversion.row_bytes, rows)), workers)
    yield f"{len(rows)} Megatron tensors or experts of {total:,} bytes, {sum(len(row.hf) for row in rows)} Hugging Face tensors"
    yield f"to write: {len(conversion.parts)} files of {needed:,} bytes; memory: at most {memory:,} bytes beside the program"


def _how(row: MappedTensor) -> str:
    """Return how the parts are fused and how ranks split the tensor."""
    ranks = "expert-tensor" if row.expert is not None else "tensor"
    split = f"replicated over {ranks} ranks" if row.split_dim is None else f"split over {ranks} ranks in dimension {row.split_dim}"
    padded = ["padded for them"] if row.is_vocab else []
    fused = [_FUSED[row.kind]] if row.kind in _FUSED else []
    return f"  ({'; '.join([*fused, split, *padded])})"


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
