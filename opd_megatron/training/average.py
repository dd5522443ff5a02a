"""The average of a model's weights over the steps, which teaches in place of the last ones (`teacher.weights=ema`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class MovingAverage:
    """a <- decay a + (1 - decay) w after every update, in fp32, of some of this rank's weights; the ranks of a job share all slices among them, each once."""

    def __init__(self, weights: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._weights = dict(weights)
        self._decay = decay
        self.tensors = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, tensor in self.tensors.items():
            tensor.lerp_(self._weights[name].float(), 1 - self._decay)

    def restart(self) -> None:
        """Begin anew with the weights as they are."""
        for name, tensor in self.tensors.items():
            tensor.copy_(self._weights[name].detach())

    @property
    def slices(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """What this rank keeps, by the parameter whose average it is: no other rank keeps the same."""
        return {weight: self.tensors[name] for name, weight in self._weights.items()}
