"""A frozen Megatron-Core model that scores rollouts: final hidden states at scored positions, on the student's last-stage ranks.

Shapes: B sequences, S padded length, R scored positions of one sample, T scored positions of a micro-batch, G teacher hidden, W slice of the
student's padded vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel

from opd_megatron.data.batches import pad_samples
from opd_megatron.models.forward import forward_hidden, inference_mode
from opd_megatron.models.gpt import DTYPES, build_gpt
from opd_megatron.models.weights import WeightSource, load_head_slice, load_model
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.payload import deliver, plan_payload
from opd_megatron.parallel.world import shared_errors
from opd_megatron.rollout.rollouts import Rollouts


class Teacher:
    """The model without gradients or buffers for them, and its LM head, sharded once as the student's vocabulary is."""

    def __init__(
        self,
        source: WeightSource,
        groups: ModelGroups,
        student_groups: ModelGroups,
        *,
        student_padded_vocab: int,
        precision: Literal["bf16", "fp32"],
        micro_batch: int,
        device: torch.device,
    ) -> None:
        self.architecture = source.architecture
        self.groups = groups
        self.student_groups = student_groups
        self.micro_batch = micro_batch
        self.dtype = DTYPES[precision]
        self.device = device
        # Vocabularies of another multiple than the student's would be padded here; the teacher's own padding is only inside its embedding.
        self.model: GPTModel = build_gpt(source.architecture, groups, precision=precision, vocab_multiple=1).to(device)
        self.head_WG: torch.Tensor | None = None
        with shared_errors():
            load_model(self.model, groups, source, vocab_multiple=1)
            if student_groups.is_last_stage:
                self.head_WG = load_head_slice(source, student_groups, padded_vocab=student_padded_vocab, dtype=self.dtype).to(device)
        self.model.requires_grad_(False)
        self.model.eval()
        self.payload_bytes = 0

    def score(self, rollouts: Rollouts) -> dict[int, torch.Tensor]:
        """Return {sample index: hidden states [R, G]} for the samples of this rank's student replica; empty before the last stage.

        Each teacher replica scores a contiguous share; shares may be uneven or empty, since no collective spans replicas.
        """
        held = self._score_share(rollouts)
        samples = rollouts.samples
        holders: list[list[int]] = [[] for _ in samples]
        needers: list[list[int]] = [[] for _ in samples]
        for groups, ranks in ((self.groups, holders), (self.student_groups, needers)):
            for replica in range(groups.data_size):
                for index in rollouts.share(replica, groups.data_size):
                    ranks[index] = groups.last_stage_ranks(replica)
        width = self.architecture.hidden_size
        plan = plan_payload(holders, needers, [sample.num_scored for sample in samples])
        self.payload_bytes = plan.sent_rows() * width * self.dtype.itemsize
        needed = list(rollouts.share(self.student_groups.data_rank, self.student_groups.data_size)) if self.student_groups.is_last_stage else []
        return dict(zip(needed, deliver(plan, held, needed, width=width, dtype=self.dtype, device=self.device), strict=True))

    def _score_share(self, rollouts: Rollouts) -> dict[int, torch.Tensor]:
        """Return the hidden states of this replica's share, on the ranks of its last stage; similar lengths are padded together."""
        held: dict[int, torch.Tensor] = {}
        share = sorted(rollouts.share(self.groups.data_rank, self.groups.data_size), key=lambda index: rollouts.samples[index].num_tokens)
        with inference_mode(self.model, self.groups):
            for start in range(0, len(share), self.micro_batch):
                chosen = share[start : start + self.micro_batch]
                batch = pad_samples([rollouts.samples[index] for index in chosen], multiple=1, device=self.device)
                hidden_BSG = forward_hidden(self.model, self.groups, batch.tokens_BS)
                if hidden_BSG is not None:
                    hidden_TG = hidden_BSG.flatten(0, 1)[batch.scored_T]
                    held.update(zip(chosen, hidden_TG.split([rollouts.samples[index].num_scored for index in chosen]), strict=True))
        return held
