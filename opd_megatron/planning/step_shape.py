"""The largest shapes of one optimizer step: every prompt and every response at its limit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opd_megatron.losses.vocab_parallel import token_chunks
from opd_megatron.parallel.context import context_rank, padded_length
from opd_megatron.parallel.layout import replica_share
from opd_megatron.planning.ranks import PlannedModel, PlannedRank


@dataclass(frozen=True)
class StepShape:
    """Counts of one step, as the rank takes part in it."""

    rank: PlannedRank

    @property
    def _student(self) -> PlannedModel:
        assert self.rank.student is not None, "a rank of the teacher's own does not train"
        return self.rank.student

    @property
    def response_tokens(self) -> int:
        return self.rank.config.rollout.max_response_tokens

    @property
    def micro_batch_tokens(self) -> int:
        """Positions of one training micro-batch that this rank computes: B S, over its context group."""
        return self.rank.config.training.micro_batch * self._tokens_of(self._student)

    @property
    def teacher_batch_tokens(self) -> int:
        """The same of one batch that the teacher scores."""
        return self.teacher_batch * self._tokens_of(self.rank.teacher) if self.rank.teacher is not None else 0

    @property
    def scored_tokens(self) -> int:
        """T: positions of one micro-batch that have a loss and lie on this rank."""
        groups, prompt_tokens = self._student.groups, self.rank.config.data.max_prompt_tokens
        position_R = torch.arange(self.response_tokens) + prompt_tokens - 1
        length = padded_length(prompt_tokens + self.response_tokens, groups.layout)
        own = context_rank(position_R, length, groups.layout.context) == groups.cell.context
        return self.rank.config.training.micro_batch * int(own.sum())

    @property
    def num_micro_batches(self) -> int:
        return self.share_of(self._student) // self.rank.config.training.micro_batch

    @property
    def num_in_flight(self) -> int:
        """Micro-batches whose activations this stage holds at once in the 1F1B schedule: one per stage from here to the last."""
        groups = self._student.groups
        return min(self.num_micro_batches, groups.layout.pipeline - groups.stage)

    @property
    def teacher_batch(self) -> int:
        """Sequences that the teacher scores at once."""
        settings = self.rank.config.teacher
        return min(settings.micro_batch, self.share_of(self.rank.teacher)) if settings is not None and self.rank.teacher is not None else 0

    @property
    def num_teacher_batches(self) -> int:
        return -(-self.share_of(self.rank.teacher) // self.teacher_batch) if self.rank.teacher is not None and self.teacher_batch else 0

    @property
    def chunk_tokens(self) -> list[int]:
        """Rows of each chunk of the fused head over one micro-batch, as on an accelerator."""
        num_columns = self.rank.padded_vocab // self.rank.config.student.layout.tensor
        chunks = token_chunks(self.scored_tokens, num_columns, torch.device("cuda"), self.rank.config.loss.chunk_tokens)
        return [rows.stop - rows.start for rows in chunks]

    def share_of(self, model: PlannedModel) -> int:
        """Return how many of the step's sequences this rank's replica of one model passes through it."""
        return self._passed(model, model.groups.data_rank, model.groups.data_size)

    def written_by(self, model: PlannedModel) -> int:
        """Return the same of a model that writes."""
        return self._passed(model, model.groups.writer, model.groups.num_writers)

    def decoded_sequences(self, model: PlannedModel, num_sequences: int) -> int:
        """Return how many of `num_sequences` one of a model's writers decodes together."""
        return min(self.rank.config.rollout.batch_sequences, -(-num_sequences // model.groups.num_writers))

    def _passed(self, model: PlannedModel, replica: int, num_replicas: int) -> int:
        # Where experts are spread over ranks, all replicas make as many passes as the busiest: `models.forward`.
        busiest, num_sequences = model.groups.layout.expert > 1, self.rank.config.num_sequences
        return -(-num_sequences // num_replicas) if busiest else len(replica_share(num_sequences, replica, num_replicas))

    def _tokens_of(self, model: PlannedModel) -> int:
        layout = model.groups.layout
        return padded_length(self.rank.config.data.max_prompt_tokens + self.response_tokens, layout) // layout.context
