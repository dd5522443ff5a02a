"""The frozen model on the ranks that hold it: hidden states of given text, without gradients.

Shapes: B sequences, S padded length, R scored positions of one sample, T scored positions of a micro-batch, G teacher hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from opd_megatron.data.batch_plan import BatchPlan, plan_scoring
from opd_megatron.data.batches import on_device, pad_samples
from opd_megatron.models.forward import forward_hidden, inference_mode, lend_experts
from opd_megatron.models.gpt import LOCAL, ModelChunks, build_gpt
from opd_megatron.models.layer_options import LayerOptions
from opd_megatron.models.weights import WeightSource, load_model
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.offload import Offloaded
from opd_megatron.parallel.world import shared_errors
from opd_megatron.rollout.rollouts import Rollouts


class Scorer:
    """One rank's part of the model, without gradients or buffers for them; `offloaded` keeps its weights on the host between its uses."""

    def __init__(
        self,
        source: WeightSource,
        groups: ModelGroups,
        *,
        precision: Literal["bf16", "fp32"],
        micro_batch: int,
        offloaded: bool,
        device: torch.device,
        options: LayerOptions = LOCAL,
    ) -> None:
        self.groups = groups
        self.micro_batch = micro_batch
        self.device = device
        # Vocabularies of another multiple than the student's would be padded here; the teacher's own padding is only inside its embedding.
        self.model = build_gpt(source.architecture, groups, precision=precision, vocab_multiple=1, options=options).to(device)
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

    @contextmanager
    def changing_weights(self) -> Iterator[None]:
        """Have room on the device for weights that are all written anew; offloaded ones leave as they then are."""
        if self.offloaded is None:
            yield
            return
        self.offloaded.arrive_empty()
        yield
        self.offloaded.leave()

    def score(self, rollouts: Rollouts, take: Callable[[dict[int, torch.Tensor]], None], *, num_rounds: int = 1) -> None:
        """Compute hidden states [R, G] of the scored positions in this rank's context window, of its replica's share of the samples.

        After each of the rounds of `BatchPlan.rounds`, `take` has {sample: hidden states} of its samples: on the last stage, and nothing on the others.
        """
        rollouts = rollouts.as_teacher_reads()
        plan = plan_scoring(rollouts.num_tokens, self.groups.layout, self.groups.data_size, self.micro_batch)
        rounds = [of_replicas[self.groups.data_rank] for of_replicas in plan.rounds(num_rounds)]
        with self.on_device(), inference_mode(self.model, self.groups, context_parallel=True):
            for number, micro_batches in enumerate(rounds, start=1):
                take(self._hidden_rows(rollouts, plan, micro_batches, is_last=number == len(rounds)))

    def _hidden_rows(self, rollouts: Rollouts, plan: BatchPlan, micro_batches: Sequence[tuple[int, ...]], *, is_last: bool) -> dict[int, torch.Tensor]:
        """Return the hidden states of one round."""
        rows: dict[int, torch.Tensor] = {}
        size, rank = self.groups.layout.context, self.groups.cell.context
        for chosen in micro_batches:
            samples = [rollouts.samples[index] for index in chosen]
            batch = pad_samples(samples, length=plan.lengths[chosen[0]]).context_window(size=size, rank=rank)
            # Counted on the host: the GPU must not be waited for between two micro-batches.
            counts = torch.bincount(batch.scored_T // batch.tokens_BS.size(1), minlength=len(chosen)).tolist()
            hidden_BSG = forward_hidden(self.model, self.groups, on_device(batch.tokens_BS, self.device))
            if hidden_BSG is not None:
                rows.update(zip(chosen, hidden_BSG.flatten(0, 1)[on_device(batch.scored_T, self.device)].split(counts), strict=True))
        if not is_last:
            # Done with less than others, a replica lends its experts before it waits for what those score; after the last round `inference_mode` does.
            lend_experts(self.model, self.groups)
        return rows


def _offload(model: ModelChunks) -> Offloaded:
    """Move a frozen model's weights to the host. Where they come back on a stream of their own, each module waits for its own weights only."""
    offloaded = Offloaded(list(model.parameters()), frozen=True)
    offloaded.leave()
    for module in model.modules():
        if own := list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, own=own: offloaded.wait_for(own))
    return offloaded
