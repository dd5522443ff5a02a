"""The largest shapes of one optimizer step: every prompt and every response at its limit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from opd_megatron.data.batch_plan import TrainingBatches, TrainingPlan
from opd_megatron.losses.vocab_parallel import token_chunks
from opd_megatron.models.limits import planned_teacher_prompt
from opd_megatron.models.paging import check_budget, model_block_bytes, num_blocks, num_steps, sequence_blocks, step_tokens, why_not_paged
from opd_megatron.parallel.context import context_rank, padded_length
from opd_megatron.parallel.layout import replica_share
from opd_megatron.planning.payload import longest_samples
from opd_megatron.planning.ranks import PlannedModel, PlannedRank


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The paged cache of one writer: its blocks, the spare one among them, the most tokens of a step, and the steps until all have reached their limit."""

    num_blocks: int
    block_bytes: int
    most_tokens: int
    num_steps: int


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

    @cached_property
    def training_plan(self) -> TrainingPlan:
        """The micro-batches of all replicas, as the run makes them."""
        groups = self._student.groups
        return TrainingBatches.of(self.rank.config, groups.data_size).plan(longest_samples(self.rank.config))

    @property
    def micro_batch_tokens(self) -> int:
        """Positions of one training micro-batch that this rank computes, over its context group."""
        plan = self.training_plan
        return plan.num_rows * plan.row_length // self._student.groups.layout.context

    @property
    def teacher_batch_tokens(self) -> int:
        """The same of one batch that the teacher scores."""
        teacher = self.rank.teacher
        if teacher is None:
            return 0
        layout = teacher.groups.layout
        return self.teacher_batch * padded_length(self.teacher_prompt_tokens + self.response_tokens, layout) // layout.context

    @property
    def teacher_prompt_tokens(self) -> int:
        """The longest prompt that the teacher reads."""
        assert self.rank.teacher_known is not None
        return planned_teacher_prompt(self.rank.config, self.rank.teacher_known.architecture)

    @property
    def scored_tokens(self) -> int:
        """T: positions of the fullest micro-batch that have a loss and lie on this rank."""
        groups, plan = self._student.groups, self.training_plan
        position_R = torch.arange(self.response_tokens) + self.rank.config.data.max_prompt_tokens - 1
        own = context_rank(position_R, plan.lengths[0], groups.layout.context) == groups.cell.context
        return max(map(len, plan.micro_batches[groups.data_rank])) * int(own.sum())

    @property
    def num_micro_batches(self) -> int:
        return len(self.training_plan.micro_batches[0])

    @property
    def num_in_flight(self) -> int:
        """Micro-batches, each on one chunk of layers, whose activations this stage holds at once.

        One per stage from here to the last in the 1F1B schedule; in the interleaved one twice as many further ones, and a whole round for each other chunk:
        `get_pp_rank_microbatches` of Megatron-Core.
        """
        groups, layout = self._student.groups, self._student.groups.layout
        after = layout.pipeline - groups.stage - 1
        warm_up = after if layout.virtual == 1 else 2 * after + (layout.virtual - 1) * layout.pipeline
        return min(self.num_micro_batches * layout.virtual, warm_up + 1)

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
        num_columns = max(self.rank.student_columns, self.rank.teacher_columns)
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

    def is_paged(self, model: PlannedModel) -> bool:
        """Return whether a model is known to write by the dynamic engine; `rollout.engine=auto` is counted so where it has a budget for pages."""
        config = self.rank.config
        if config.rollout.engine == "auto" and config.rollout.kv_cache_gib is not None:
            return why_not_paged(model.known.architecture, model.groups.layout, config.training.precision) is None
        return config.rollout.engine == "dynamic"

    def pages(self, model: PlannedModel, num_sequences: int, response_tokens: int) -> Pages:
        """Return the paged cache in which a writer of the model writes its share of `num_sequences`; ValueError where it holds none of them."""
        config, prompt_tokens = self.rank.config, self.rank.config.data.max_prompt_tokens
        slots, share = self.decoded_sequences(model, num_sequences), -(-num_sequences // model.groups.num_writers)
        size = model_block_bytes(model.known.architecture, model.groups.layout, model.dtype.itemsize)
        check_budget(config.rollout.kv_cache_gib, size, prompt_tokens, response_tokens)
        count = num_blocks(config.rollout.kv_cache_gib, size, slots, sequence_blocks(prompt_tokens, response_tokens))
        most = step_tokens(prompt_tokens, share * prompt_tokens, slots)
        steps = num_steps(share, prompt_tokens, response_tokens, num_slots=slots, free_blocks=count - 1, most_tokens=most)
        return Pages(num_blocks=count, block_bytes=size, most_tokens=most, num_steps=steps)

    def _passed(self, model: PlannedModel, replica: int, num_replicas: int) -> int:
        # Where replicas share experts, all of them make as many passes as the busiest: `models.forward`.
        busiest, num_sequences = model.groups.layout.replicas_share_experts, self.rank.config.num_sequences
        return -(-num_sequences // num_replicas) if busiest else len(replica_share(num_sequences, replica, num_replicas))
