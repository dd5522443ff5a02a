"""Which rank does what for one model: a grid that can be printed, without a process group.

Ranks are laid out as Megatron-Core does: tensor fastest, then context, then data, then pipeline. The experts of a mixture-of-experts model cut the
same ranks of a stage anew: expert tensor fastest, then expert, then expert data.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from opd_megatron.config import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One rank's place in its model's grid."""

    tensor: int
    context: int
    data: int
    stage: int


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """One model on `num_ranks` consecutive ranks of the world. Raises ValueError where the layout does not divide them."""

    layout: ParallelLayout
    num_ranks: int
    first_rank: int = 0

    def __post_init__(self) -> None:
        self.layout.data_size(self.num_ranks)

    @property
    def data_size(self) -> int:
        return self.layout.data_size(self.num_ranks)

    @property
    def ranks(self) -> range:
        """The global ranks of the model."""
        return range(self.first_rank, self.first_rank + self.num_ranks)

    @property
    def shape(self) -> dict[str, int]:
        """Sizes of the axes, fastest first, under the names of Megatron-Core's groups."""
        return {"tp": self.layout.tensor, "cp": self.layout.context, "dp": self.data_size, "pp": self.layout.pipeline}

    @property
    def expert_shape(self) -> dict[str, int]:
        """The same for the experts' weights."""
        layout = self.layout
        copies = self.num_ranks // (layout.expert_tensor * layout.expert * layout.pipeline)
        return {"expt_tp": layout.expert_tensor, "ep": layout.expert, "expt_dp": copies, "pp": layout.pipeline}

    def cell(self, rank: int) -> Cell:
        """Return the place of a global rank."""
        places, rest = [], rank - self.first_rank
        for size in self.shape.values():
            rest, place = divmod(rest, size)
            places.append(place)
        return Cell(tensor=places[0], context=places[1], data=places[2], stage=places[3])

    def rank_of(self, *, tensor: int, data: int, stage: int, context: int = 0) -> int:
        """Return the global rank at one cell."""
        layout = self.layout
        return self.first_rank + tensor + layout.tensor * (context + layout.context * (data + self.data_size * stage))

    def last_stage_ranks(self, data: int, context: int = 0) -> list[int]:
        """Return the global ranks, by tensor rank, that hold the LM head for one part of a replica's sequences."""
        return [self.rank_of(tensor=tensor, context=context, data=data, stage=self.layout.pipeline - 1) for tensor in range(self.layout.tensor)]

    def groups(self, axes: Sequence[str]) -> list[list[int]]:
        """Return every set of global ranks that differ along `axes` only, names of `shape` or of `expert_shape`."""
        shape = self.shape if set(axes) <= set(self.shape) else self.expert_shape
        strides = dict(zip(shape, itertools.accumulate(shape.values(), lambda left, right: left * right, initial=1)))
        inside = [name for name in shape if name in axes]
        outside = [name for name in shape if name not in axes]
        return [[first + step for step in _offsets(inside, shape, strides)] for first in _offsets(outside, shape, strides, self.first_rank)]

    def picture(self, name: str) -> str:
        """Return the grid as text: one line per replica, ranks in tensor order, context parts joined by |, stages by arrows."""
        lines = [f"{name}: {self.layout.describe()} x DP{self.data_size}"]
        for data in range(self.data_size):
            lines.append(f"  replica {data}: " + " -> ".join(self._stage_picture(data, stage) for stage in range(self.layout.pipeline)))
        return "\n".join(lines)

    def _stage_picture(self, data: int, stage: int) -> str:
        parts = [
            " ".join(str(self.rank_of(tensor=tensor, context=context, data=data, stage=stage)) for tensor in range(self.layout.tensor))
            for context in range(self.layout.context)
        ]
        return "[" + " | ".join(parts) + "]"


def replica_share(count: int, replica: int, num_replicas: int) -> range:
    """Return the indices of the contiguous share of `count` things that one of several replicas takes; shares differ by one at most."""
    return range(count * replica // num_replicas, count * (replica + 1) // num_replicas)


def _offsets(axes: Sequence[str], shape: dict[str, int], strides: dict[str, int], start: int = 0) -> list[int]:
    """Return start + the offsets of all places along `axes`, the fastest axis innermost."""
    ranges = [range(0, shape[name] * strides[name], strides[name]) for name in reversed(axes)]
    return [start + sum(offsets) for offsets in itertools.product(*ranges)]
