"""The frozen model on the ranks that hold it: hidden states of given text, without gradients.

Shapes: B sequences, S padded length, R scored positions of one sample, T scored positions of a micro-batch, G teacher hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel

from opd_megatron.data.batches import pad_samples
from opd_megatron.models.forward import forward_hidden, inference_mode
from opd_megatron.models.gpt import build_gpt
from opd_megatron.models.weights import WeightSource, load_model
from opd_megatron.parallel.context import padded_length
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.offload import Offloaded
from opd_megatron.parallel.world import shared_errors
from opd_megatron.rollout.rollouts import Rollouts


class Scorer:
    """One rank's part of the model, without gradients or buffers for them; `offloaded` keeps its weights on the host between its uses."""

    def __init__(
        self, source: WeightSource, groups: ModelGroups, *, precision: Literal["bf16", "fp32"], micro_batch: int, offloaded: bool, device: torch.device
    ) -> None:
        self.groups = groups
        self.micro_batch = micro_batch
        self.device = device
        # Vocabularies of another multiple than the student's would be padded here; the teacher's own padding is only inside its embedding.
        self.model: GPTModel = build_gpt(source.architecture, groups, precision=precision, vocab_multiple=1).to(device)
        with shared_errors():
            load_model(self.model, groups, source, vocab_multiple=1)
        self.model.requires_grad_(False)
        self.model.eval()
        self.offloaded = _offload(self.model) if offloaded else None

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Have the weights where they are computed with; offloaded ones leave again afterwards."""
        if self.offloaded is None:
            yield
            return
        self.offloaded.arrive()
        try:
            yield
        finally:
            self.offloaded.leave()

    def hidden_rows(self, rollouts: Rollouts) -> dict[int, torch.Tensor]:
        """Return {sample: hidden states [R, G] of the scored positions in this rank's context window} for its replica's share, on the last stage."""
        rows: dict[int, torch.Tensor] = {}
        size, rank = self.groups.layout.context, self.groups.cell.context
        with self.on_device(), inference_mode(self.model, self.groups, context_parallel=True):
            for chosen in scored_together(rollouts, self.groups.data_rank, self.groups.data_size, self.micro_batch):
                samples = [rollouts.samples[index] for index in chosen]
                length = padded_length(max(sample.num_tokens for sample in samples), self.groups.layout)
                batch = pad_samples(samples, length=length, device=self.device).context_window(size=size, rank=rank)
                hidden_BSG = forward_hidden(self.model, self.groups, batch.tokens_BS)
                if hidden_BSG is not None:
                    row_T = batch.scored_T // batch.tokens_BS.size(1)
                    counts = torch.bincount(row_T, minlength=len(chosen)).tolist()
                    rows.update(zip(chosen, hidden_BSG.flatten(0, 1)[batch.scored_T].split(counts), strict=True))
        return rows


def scored_together(rollouts: Rollouts, replica: int, num_replicas: int, micro_batch: int) -> list[Sequence[int]]:
    """Return the samples of one replica's contiguous share, batch by batch, similar lengths together.

    Shares may be uneven or empty: where replicas share experts, `inference_mode` keeps them in step.
    """
    share = sorted(rollouts.share(replica, num_replicas), key=lambda index: rollouts.samples[index].num_tokens)
    return [share[start : start + micro_batch] for start in range(0, len(share), micro_batch)]


def _offload(model: GPTModel) -> Offloaded:
    """Move a frozen model's weights to the host. Where they come back on a stream of their own, each module waits for its own weights only."""
    offloaded = Offloaded(list(model.parameters()), frozen=True)
    offloaded.leave()
    for module in model.modules():
        if own := list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, own=own: offloaded.wait_for(own))
    return offloaded
