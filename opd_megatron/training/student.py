"""The model that learns: Megatron-Core's GPTModel, its data-parallel wrapper and optimizer, and one optimizer step.

Shapes: B sequences, S padded length, T scored positions, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module

from opd_megatron.align.rows import PairedShard, paired_shard
from opd_megatron.align.vocabulary import SharedVocabulary
from opd_megatron.config import RunConfig
from opd_megatron.data.batch_plan import TrainingBatches
from opd_megatron.losses.fused_head import FusedDivergence, TokenStatistics
from opd_megatron.models.allocation import Allocation
from opd_megatron.models.forward import without_recomputation
from opd_megatron.models.gpt import build_gpt, forget_routes, head_weight, hidden_states_only, keep_recomputed_gradients
from opd_megatron.models.layer_options import layers_here
from opd_megatron.models.layers import packed_sequences
from opd_megatron.models.weight_map import EMBEDDING, weight_map
from opd_megatron.models.weights import WeightSource, load_model, named_global_parameters
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.offload import Offloaded
from opd_megatron.parallel.world import shared_errors
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.teacher.teacher import TeacherRows
from opd_megatron.training.average import MovingAverage
from opd_megatron.training.batching import MicroBatches
from opd_megatron.training.objective import Distillation, MicroBatch, Objective
from opd_megatron.training.optimizer import build_optimizer, clip_and_update, gradient_norm, learning_rate, optimizer_state


@dataclass(frozen=True)
class Observed:
    """What an objective told of the rows besides: the sum, the rows that have the value, and those where it is not 0."""

    total: float
    rows: float
    nonzero: float

    @property
    def mean(self) -> float:
        return self.total / self.rows if self.rows else math.nan


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over every position of the step that is trained on, equal on all ranks; the means divide once, here."""

    loss: float
    divergence: float
    entropy: float
    drift: float
    drift_max: float
    # What the loss sum is divided by, and the positions that were scored: fewer than that where a teacher with another tokenizer compares units.
    tokens: float
    scored: float
    observed: Mapping[str, Observed]

    @property
    def rows(self) -> float:
        """Rows that have a loss: the scored positions, or the units."""
        return self.observed["covered"].total if "covered" in self.observed else self.scored

    def per_token(self, total: float) -> float:
        return _mean(total, self.tokens)

    def per_scored(self, total: float) -> float:
        return _mean(total, self.scored)

    def per_row(self, total: float) -> float:
        return _mean(total, self.rows)


def _mean(total: float, count: float) -> float:
    return total / count if count else 0.0


# Gradients that travel together under `training.overlap_grad_reduce`, at least; None is Megatron-Core's choice, 40 million or more.
BUCKET_NUMBERS: int | None = None

# (hidden states after the last stage, their micro-batch) -> (loss sum, count, what is reported), as Megatron's schedule takes them.
LossFunction = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Student:
    """This rank's part of the student."""

    def __init__(self, config: RunConfig, source: WeightSource, groups: ModelGroups, device: torch.device) -> None:
        self.groups = groups
        self.device = device
        self.architecture = source.architecture
        self.training = config.training
        self.options = layers_here(config.training)
        self.batches = TrainingBatches.of(config, groups.data_size)
        self.padded_vocab = source.architecture.padded_vocab_size(groups.layout.tensor, config.student.vocab_multiple)
        self.model = build_gpt(
            source.architecture,
            groups,
            precision=config.training.precision,
            vocab_multiple=config.student.vocab_multiple,
            options=self.options,
        ).to(device)
        with shared_errors():
            load_model(self.model, groups, source, vocab_multiple=config.student.vocab_multiple)
        self._is_half = config.training.precision == "bf16"
        self.model.config.finalize_model_grads_func = finalize_model_grads
        # Of the weights over the steps, where that is the teacher.
        self.average: MovingAverage | None = None
        self._offloads = config.training.offload_optimizer
        self._offloaded: Offloaded | None = None
        self.ddp: list[DistributedDataParallel] = []
        self.train_only(Allocation.of(config.modules, source.architecture))

    def train_only(self, allocation: Allocation) -> None:
        """Train these tensors from here on, with an optimizer that knows nothing yet; the others stay as they are."""
        self._leave_buffers()
        factors = {}
        for name, parameter in named_global_parameters(self.model, self.architecture):
            parameter.requires_grad_(name in allocation.trained)
            if name in allocation.factors:
                factors[parameter] = allocation.factors[name]
        if self.options.recomputes_from_inputs and EMBEDDING not in allocation.trained:
            keep_recomputed_gradients(self.model)
        self.ddp = self._wrapped()
        self.optimizer, self.scheduler = build_optimizer(self.ddp, self.training, factors)
        self.allocation, self._offloaded = allocation, None
        self._leave()

    def _wrapped(self) -> list[DistributedDataParallel]:
        """Return the chunks with buffers for their gradients; a bucket travels when the last micro-batch has filled it (`overlap_grad_reduce`), or after it."""
        config, overlap = self.model.config, self.training.overlap_grad_reduce
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, bucket_size=BUCKET_NUMBERS
        )
        chunks = [
            # Of the chunks of one rank the first ends its backward last: only its gradients have to be on their way before all are there.
            DistributedDataParallel(config, settings, Float16Module(config, chunk) if self._is_half else chunk, disable_bucketing=overlap and place > 0)
            for place, chunk in enumerate(self.model)
        ]
        if overlap:
            # How Megatron's schedules hold the gradients back until the last micro-batch.
            holds = [chunk.no_sync for chunk in chunks]
            config.no_sync_func = holds if len(holds) > 1 else holds[0]  # type: ignore[assignment]
        return chunks

    def describe_trained(self) -> str:
        """Return one line on what trains, and what its gradients take on this rank, for the log."""
        rows = weight_map(self.architecture)
        numbers, trained = (sum(math.prod(row.shape) for row in chosen) for chosen in (rows, [row for row in rows if row.name in self.allocation.trained]))
        rates = f"; {len(self.allocation.factors)} tensors have a learning rate of their own" if self.allocation.factors else ""
        gradients = sum(buffer.numel * buffer.grad_dtype.itemsize for chunk in self.ddp for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))
        return f"training {trained:,} of {numbers:,} parameters ({trained / numbers:.1%}), {gradients:,} bytes of gradients on rank {dist.get_rank()}{rates}"

    def _leave_buffers(self) -> None:
        """Take the parameters out of the buffers of an earlier DistributedDataParallel, and its hooks off them."""
        for chunk in self.ddp:
            # They hold one another in a circle through C++, which Python never collects.
            chunk.grad_accs.clear()
        for parameter in self.model.parameters() if self.ddp else ():
            parameter.data = parameter.data.clone()
            parameter.__dict__.pop("main_grad", None)
        self.ddp = []
        self.model.config.no_sync_func = None

    def paired_shard(self, vocabulary: SharedVocabulary) -> PairedShard:
        """Return how this rank's columns of the vocabulary are paired with another one."""
        size = self.groups.layout.tensor
        return paired_shard(vocabulary, rank=self.groups.tensor_rank, num_ranks=size, student_columns=self.padded_vocab // size).to(self.device)

    @contextmanager
    def optimizer_on_device(self) -> Iterator[None]:
        """Have the optimizer's state and the gradient buffers where they are computed with; `training.offload_optimizer` keeps them away otherwise."""
        if self._offloaded is not None:
            self._offloaded.arrive()
            for chunk in self.ddp:
                chunk.restore_grad_buffers()
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        if not self._offloads:
            return
        state = optimizer_state(self.optimizer)
        # Adam makes its moments in its first step, and a checkpoint brings others.
        if self._offloaded is None or not self._offloaded.holds(state):
            self._offloaded = Offloaded(state, frozen=False)
        self._offloaded.leave()
        for chunk in self.ddp:
            chunk.offload_grad_buffers()

    def micro_batches(self, rollouts: Rollouts, teacher: TeacherRows | None) -> MicroBatches:
        """Return this replica's share of a step."""
        return MicroBatches(rollouts=rollouts, plan=self.batches.plan(rollouts.num_tokens), groups=self.groups, teacher=teacher, device=self.device)

    def train_step(
        self, micro_batches: MicroBatches, objective: Objective, measured: Callable[[str], AbstractContextManager[Any]] = nullcontext
    ) -> tuple[LossSums, float, bool]:
        """Return (sums, gradient norm, updated). A loss or gradient that is not finite changes no weight; all ranks decide alike.

        `measured` is entered around its two parts, "forward_backward" and "optimizer".
        """
        with self.optimizer_on_device():
            with measured("forward_backward"):
                sums = self._make_gradients(micro_batches, objective)
            with measured("optimizer"):
                return sums, *self._update(sums)

    def _make_gradients(self, micro_batches: MicroBatches, objective: Objective) -> LossSums:
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._world_sums(self._run_schedule(micro_batches, partial(self._loss, objective), forward_only=False), objective)

    def _update(self, sums: LossSums) -> tuple[float, bool]:
        norm = gradient_norm(self.optimizer)
        self.scheduler.step(increment=1)
        # A step without a single row has no gradient; Adam's momentum alone must not move the weights.
        healthy = math.isfinite(norm) and math.isfinite(sums.loss) and sums.rows > 0
        if healthy:
            clip_and_update(self.optimizer, norm)
            if self.average is not None:
                self.average.update()
        return norm, healthy

    def measure(self, micro_batches: MicroBatches, objective: Objective) -> LossSums:
        """Return the sums without gradients or update."""
        return self._world_sums(self._forward_only(micro_batches, partial(self._loss, objective)), objective)

    def statistics(self, micro_batches: MicroBatches, objective: Distillation, temperature: float) -> TokenStatistics:
        """Return entropy and divergences of every response token of the step, samples in order, the same on every rank."""
        statistics_3N = torch.zeros(3, micro_batches.rollouts.num_response_tokens, device=self.device)

        def note(hidden_BSH: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """Keep what one micro-batch's rows show; its loss is 0."""
            found = objective.statistics(self._scored_hidden(hidden_BSH, micro_batch), head_weight(self.model), micro_batch, temperature)
            # Tensor ranks hold equal numbers, so one of them speaks; every token lies on one rank of the others.
            if self.groups.tensor_rank == 0:
                statistics_3N[:, micro_batch.token_T] = torch.stack([found.student_entropy_T, found.reverse_kl_T, found.forward_kl_T]).float()
            return hidden_BSH.new_zeros(()), torch.zeros((), dtype=torch.int, device=self.device), statistics_3N.new_zeros(())

        self._forward_only(micro_batches, note)
        dist.all_reduce(statistics_3N)
        return TokenStatistics(*statistics_3N)

    def _forward_only(self, micro_batches: MicroBatches, loss: LossFunction) -> list[torch.Tensor]:
        self.model.eval()
        try:
            with torch.no_grad(), without_recomputation(self.model):
                return self._run_schedule(micro_batches, loss, forward_only=True)
        finally:
            self.model.train()

    @property
    def learning_rate(self) -> float:
        return learning_rate(self.optimizer)

    def _run_schedule(self, micro_batches: MicroBatches, loss: LossFunction, *, forward_only: bool) -> list[torch.Tensor]:
        """Run Megatron's pipeline schedule over this replica's micro-batches; return what `loss` reports of each, on the last stage."""

        def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            """Return this stage's output, after the last one hidden states [B, S, H], and the function that makes the micro-batch's loss of them."""
            micro_batch = next(batches)
            batch = micro_batch.batch
            tokens_BS = batch.tokens_BS
            positions_BS = torch.arange(tokens_BS.size(1), device=self.device).expand_as(tokens_BS)
            # Float16Module would otherwise return the last stage's hidden states as an fp32 copy.
            keep_dtype = {"fp32_output": False} if self._is_half else {}
            with hidden_states_only(self.model):
                output = model(tokens_BS, positions_BS, None, packed_seq_params=packed_sequences(batch.sequences) if batch.packed else None, **keep_dtype)
            return output, lambda hidden_BSH: loss(hidden_BSH, micro_batch)

        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self.ddp],
            model=self.ddp,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches.plan.row_length,
            micro_batch_size=micro_batches.plan.num_rows,
            forward_only=forward_only,
        )
        forget_routes(self.model)
        return list(results)

    def _loss(self, objective: Objective, hidden_BSH: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (loss sum, count, detached sums) as Megatron's schedule takes them under calculate_per_token_loss."""
        hidden_TH = self._scored_hidden(hidden_BSH, micro_batch)
        result = objective(hidden_TH, head_weight(self.model), micro_batch)
        # The schedule divides by a count; weights other than one are scaled for it (training.importance).
        count = torch.full((), micro_batch.count, dtype=torch.int, device=self.device)
        return result.loss_sum, count, _detached_sums(result, micro_batch)

    def _scored_hidden(self, hidden_BSH: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """Return hidden states [T, H] at scored positions, ready for a head split over the tensor group.

        Each tensor rank's head gives a partial gradient of the hidden states; the backward of these mappings sums them.
        """
        tp_group, cp_group, scored_T = self.groups.collection.tp, self.groups.collection.cp, micro_batch.batch.scored_T
        if self.groups.layout.sequence:
            whole_SBH = gather_from_sequence_parallel_region(hidden_BSH.transpose(0, 1).contiguous(), tensor_parallel_output_grad=True, group=tp_group)
            hidden_NH = whole_SBH.transpose(0, 1).flatten(0, 1)
        else:
            hidden_NH = hidden_BSH.flatten(0, 1)
        if micro_batch.units is not None and self.groups.layout.context > 1:
            # A unit's tokens may lie in several windows; the backward of the gather sums each window's gradient over the ranks that used it.
            hidden_NH = gather_from_sequence_parallel_region(hidden_NH.contiguous(), tensor_parallel_output_grad=True, group=cp_group)
        hidden_TH = hidden_NH[scored_T]
        return hidden_TH if self.groups.layout.sequence else copy_to_tensor_model_parallel_region(hidden_TH, group=tp_group)

    def _world_sums(self, results: Sequence[torch.Tensor], objective: Objective) -> LossSums:
        """Add the sums of all replicas; every rank ends with the same numbers. Tensor ranks hold equal sums, so one of them speaks."""
        sums = torch.zeros(_NUM_SUMS + _NUM_OBSERVED * len(objective.observes), dtype=torch.float64, device=self.device)
        largest = torch.zeros(1, dtype=torch.float64, device=self.device)
        if self.groups.is_last_stage and self.groups.tensor_rank == 0 and results:
            stacked = torch.stack(list(results))
            sums, largest = stacked[:, :-1].sum(0), stacked[:, -1].max().reshape(1)
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        loss, divergence, entropy, drift, tokens, scored, *rest = sums.tolist()
        observed = {name: Observed(*rest[_NUM_OBSERVED * place :][:_NUM_OBSERVED]) for place, name in enumerate(objective.observes)}
        return LossSums(
            loss=loss, divergence=divergence, entropy=entropy, drift=drift, drift_max=float(largest), tokens=tokens, scored=scored, observed=observed
        )


_NUM_SUMS, _NUM_OBSERVED = 6, 3


def _detached_sums(result: FusedDivergence, micro_batch: MicroBatch) -> torch.Tensor:
    """Return [loss, divergence, entropy, drift, tokens, scored, largest drift] of one micro-batch, and before the last three numbers for whatever was observed.

    Drift is |log-probability when sampled - when recomputed|: the same weights wrote and score, so it shows numerical disagreement only.
    """
    drift = torch.zeros(1, dtype=torch.float64, device=result.divergence_T.device)
    if result.sampled_logp_T is not None:
        drift_T = (result.sampled_logp_T - micro_batch.batch.sampled_logp_T).double().abs()
        # Of given text nothing is known. Nothing here waits for the GPU: neither a selection by a mask nor a number copied to it.
        drift = torch.cat([drift, drift_T.masked_fill(drift_T.isnan(), 0.0)])
    counts = [drift.new_full((), count) for count in (micro_batch.count, result.divergence_T.numel())]
    parts = [result.loss_sum.detach(), result.divergence_T.double().sum(), result.student_entropy_T.double().sum(), drift.sum()]
    told = [value for observed_T in result.observed.values() for value in _observed(observed_T)]
    return torch.stack([*(part.double().reshape(()) for part in parts), *counts, *told, drift.max()])


def _observed(value_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sum, rows and nonzero rows; NaN marks a row to which the value does not belong."""
    has_T = ~value_T.isnan()
    return value_T.double().nansum(), has_T.sum().double(), (has_T & (value_T != 0)).sum().double()
