"""A model's place in the job: which rank does what, and the process groups Megatron-Core wants for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from opd_megatron.config import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class ModelGroups:
    """One model's layout on the world, seen from this rank.

    Ranks are laid out as Megatron does: tensor fastest, then data, then pipeline.
    """

    layout: ParallelLayout
    data_size: int
    rank: int
    collection: ProcessGroupCollection

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.layout.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.layout.tensor % self.data_size

    @property
    def stage(self) -> int:
        return self.rank // (self.layout.tensor * self.data_size)

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.layout.pipeline - 1

    def rank_of(self, *, tensor: int, data: int, stage: int) -> int:
        """Return the global rank at one cell of the grid."""
        return tensor + self.layout.tensor * (data + self.data_size * stage)

    def stage_neighbour(self, offset: int) -> int:
        """Return the global rank that holds this rank's slice `offset` stages further."""
        return self.rank_of(tensor=self.tensor_rank, data=self.data_rank, stage=self.stage + offset)

    def last_stage_ranks(self, data: int) -> list[int]:
        """Return the global ranks, by tensor rank, that hold the LM head of one replica."""
        return [self.rank_of(tensor=tensor, data=data, stage=self.layout.pipeline - 1) for tensor in range(self.layout.tensor)]

    def picture(self, name: str) -> str:
        """Return the grid as text: one line per replica and pipeline stage, ranks in tensor order."""
        lines = [f"{name}: {self.layout.describe()} x DP{self.data_size}"]
        for data in range(self.data_size):
            stages = [
                "[" + " ".join(str(self.rank_of(tensor=tensor, data=data, stage=stage)) for tensor in range(self.layout.tensor)) + "]"
                for stage in range(self.layout.pipeline)
            ]
            lines.append(f"  replica {data}: " + " -> ".join(stages))
        return "\n".join(lines)


def student_groups(layout: ParallelLayout, seed: int) -> ModelGroups:
    """Create the student's groups. They are also Megatron's global `parallel_state`, which parts of Megatron-Core still read."""
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return _seen_from_here(layout, ProcessGroupCollection.use_mpu_process_groups())


def teacher_groups(layout: ParallelLayout) -> ModelGroups:
    """Create groups of a second model on the same ranks; every rank of the world calls this.

    Errors of Megatron-Core's global state are avoided by passing this collection to everything the model is built from.
    """
    world_size = dist.get_world_size()
    data_size = layout.data_size(world_size)
    grid = HyperCommGrid([layout.tensor, 1, data_size, layout.pipeline], ["tp", "cp", "dp", "pp"])
    collection = ProcessGroupCollection()
    for name, axes in {"tp": ["tp"], "cp": ["cp"], "dp": ["dp"], "pp": ["pp"], "dp_cp": ["cp", "dp"], "mp": ["tp", "pp"], "tp_cp": ["tp", "cp"]}.items():
        setattr(collection, name, grid.create_pg(axes))
    single, _ = dist.new_subgroups_by_enumeration([[rank] for rank in range(world_size)])
    # Dense models still look up the expert groups; they are those of an expert-parallel size of 1.
    collection.ep, collection.expt_tp, collection.expt_dp = single, collection.tp, collection.dp
    collection.tp_ep, collection.tp_ep_pp = collection.tp, collection.mp
    # A frozen model reduces no embedding gradients.
    collection.embd = collection.pos_embd = None  # type: ignore[assignment]
    return _seen_from_here(layout, collection)


def forget_student_groups() -> None:
    """Undo `student_groups`, so that another layout can be set up in this process."""
    parallel_state.destroy_model_parallel()


def _seen_from_here(layout: ParallelLayout, collection: ProcessGroupCollection) -> ModelGroups:
    world_size = dist.get_world_size()
    return ModelGroups(layout=layout, data_size=layout.data_size(world_size), rank=dist.get_rank(), collection=collection)
