"""Weights that nobody trained, for measuring how fast and how large a model is: an architecture is enough, nothing is downloaded and nothing lies on a disk."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import torch

from opd_megatron.models.architecture import Architecture
from opd_megatron.models.weight_map import MappedTensor

# Numbers drawn for a tensor, and then repeated: a prime, so that no two rows of a matrix are equal. Drawing all of 8B parameters would take minutes.
_NUM_DRAWN = 1_048_583


class RandomWeights:
    """A `WeightSource`. `assets` is the folder whose config.json gave the architecture; it need not hold anything else."""

    def __init__(self, architecture: Architecture, assets: Path) -> None:
        self.architecture = architecture
        self.assets = assets

    def read(self, row: MappedTensor) -> torch.Tensor:
        """Return normal numbers of the architecture's own spread, a function of the tensor's name; a norm's weight leaves its input as it is."""
        if len(row.shape) == 1:
            is_bias = row.name.endswith("bias")
            return torch.zeros(row.shape) if is_bias or self.architecture.zero_centered_norms else torch.ones(row.shape)
        size = math.prod(row.shape)
        generator = torch.Generator().manual_seed(zlib.crc32(row.name.encode()))
        drawn = torch.randn(min(size, _NUM_DRAWN), generator=generator) * self.architecture.init_std
        return drawn.repeat(-(-size // drawn.numel()))[:size].view(row.shape)
