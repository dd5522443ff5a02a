"""A Hugging Face folder -> a Megatron distributed checkpoint that any layout loads. One process, no model built."""

from __future__ import annotations

import queue
from pathlib import Path

import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from opd_megatron.models.hf_folder import copy_assets, folder_written_whole
from opd_megatron.models.weight_map import MappedTensor, weight_map
from opd_megatron.models.weights import ASSETS_FOLDER, WeightSource, damage_in


def write_checkpoint(source: WeightSource, out: Path) -> None:
    """Write every weight in the source's dtype, the vocabulary unpadded, and beside them what is not weights.

    The folder appears whole or not at all; ValueError if it exists or cannot be written. Holds the whole model in memory.
    """
    with folder_written_whole(out) as folder:
        # Vocabulary rows are stored unpadded; models of any tensor size pad on loading.
        tensors = {row.name: _global_tensor(row, source) for row in weight_map(source.architecture)}
        filesystem_async._results_queue = queue.Queue()
        try:
            dist_checkpointing.save(tensors, str(folder))
        except CheckpointException as error:
            raise ValueError(f"{out} cannot be written: {damage_in(error)}") from error
        copy_assets(source.assets, folder / ASSETS_FOLDER)


def _global_tensor(row: MappedTensor, source: WeightSource) -> ShardedTensor:
    """Return a row as the checkpoint holds it: a whole tensor, or one expert's slice of a stacked one."""
    tensor, experts = source.read(row), source.architecture.experts
    if row.expert is None or experts is None:
        return ShardedTensor.from_rank_offsets(row.megatron, tensor, allow_shape_mismatch=row.is_vocab)
    return ShardedTensor.from_rank_offsets(row.megatron, tensor, (0, row.expert, experts.num_experts), prepend_axis_num=1)
