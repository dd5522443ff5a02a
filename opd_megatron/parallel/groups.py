"""A model's grid seen from this rank, and the process groups Megatron-Core wants for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from opd_megatron.config import ParallelLayout
from opd_megatron.parallel.layout import Cell, RankGrid
from opd_megatron.parallel.megatron import quiet_advice

# Megatron-Core's names for groups, and the axes of the grid along which their ranks differ.
_GROUPS = {
    **{name: (name,) for name in ("tp", "cp", "dp", "pp", "expt_tp", "ep", "expt_dp")},
    "dp_cp": ("cp", "dp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "mp": ("tp", "pp"),
    "tp_ep": ("expt_tp", "ep"),
    "tp_ep_pp": ("expt_tp", "ep", "pp"),
}


@dataclass(frozen=True, kw_only=True)
class ModelGroups:
    """One model's grid, this rank's place in it, and its process groups."""

    grid: RankGrid
    cell: Cell
    collection: ProcessGroupCollection

    @property
    def layout(self) -> ParallelLayout:
        return self.grid.layout

    @property
    def data_size(self) -> int:
        return self.grid.data_size

    @property
    def tensor_rank(self) -> int:
        return self.cell.tensor

    @property
    def expert_tensor_rank(self) -> int:
        return self.collection.expt_tp.rank()

    @property
    def data_rank(self) -> int:
        return self.cell.data

    @property
    def stage(self) -> int:
        return self.cell.stage

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.layout.pipeline - 1

    @property
    def num_writers(self) -> int:
        """How many copies of the model generate at once: a decoding step has one position, so context ranks write responses of their own."""
        return self.data_size * self.layout.context

    @property
    def writer(self) -> int:
        """This rank's place among them, which is its place in the group `dp_cp`."""
        return self.cell.data * self.layout.context + self.cell.context

    @property
    def writing_rank(self) -> int:
        """The global rank that draws this writer's tokens: the last stage's first tensor rank."""
        return self.grid.last_stage_ranks(self.cell.data, self.cell.context)[0]

    def stage_neighbour(self, offset: int) -> int:
        """Return the global rank that holds this rank's slice `offset` stages further; after the last stage comes the first one's next chunk."""
        cell = self.cell
        return self.grid.rank_of(tensor=cell.tensor, context=cell.context, data=cell.data, stage=(cell.stage + offset) % self.layout.pipeline)

    def picture(self, name: str) -> str:
        return self.grid.picture(name)


def student_groups(layout: ParallelLayout, seed: int) -> ModelGroups:
    """Create the student's groups. They are also Megatron's global `parallel_state`, which parts of Megatron-Core still read."""
    quiet_advice()
    grid = RankGrid(layout=layout, num_ranks=dist.get_world_size())
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ModelGroups(grid=grid, cell=grid.cell(dist.get_rank()), collection=ProcessGroupCollection.use_mpu_process_groups())


def teacher_groups(layout: ParallelLayout) -> ModelGroups:
    """Create groups of a second model on the same ranks; every rank of the world calls this.

    Errors of Megatron-Core's global state are avoided by passing this collection to everything the model is built from.
    """
    grid = RankGrid(layout=layout, num_ranks=dist.get_world_size())
    collection = ProcessGroupCollection()
    made: dict[str, dist.ProcessGroup] = {}
    for name, axes in _GROUPS.items():
        # Many names stand for the same ranks: without context parallelism, data and data x context.
        ranks = grid.groups(axes)
        if str(ranks) not in made:
            made[str(ranks)] = dist.new_subgroups_by_enumeration(ranks)[0]
        setattr(collection, name, made[str(ranks)])
    # A frozen model reduces no embedding gradients.
    collection.embd = collection.pos_embd = None  # type: ignore[assignment]
    groups = ModelGroups(grid=grid, cell=grid.cell(dist.get_rank()), collection=collection)
    # On a GPU every weight is drawn through this tracker before its file is read, and ranks that hold no student have not seeded it.
    if not get_cuda_rng_tracker().is_initialized():
        model_parallel_cuda_manual_seed(0, tp_rank=groups.tensor_rank, ep_rank=collection.ep.rank(), etp_rank=collection.expt_tp.rank())
    return groups


def forget_student_groups() -> None:
    """Undo `student_groups`, so that another layout can be set up in this process."""
    parallel_state.destroy_model_parallel()
