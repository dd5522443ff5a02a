"""The model that learns: Megatron-Core's GPTModel, its data-parallel wrapper and optimizer, and one optimizer step.

Shapes: B sequences, S padded length, T scored positions, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module

from opd_megatron.config import RunConfig
from opd_megatron.data.batch_plan import TrainingBatches
from opd_megatron.losses.fused_head import FusedDivergence
from opd_megatron.models.gpt import build_gpt, forget_routes, head_weight, hidden_states_only
from opd_megatron.models.layers import packed_sequences
from opd_megatron.models.weights import WeightSource, load_model
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.offload import Offloaded
from opd_megatron.parallel.world import shared_errors
from opd_megatron.training.objective import MicroBatch, Objective
from opd_megatron.training.optimizer import build_optimizer, clip_and_update, gradient_norm, optimizer_state


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Sums over every scored position of the step, equal on all ranks; the means divide once, here."""

    loss: float
    weight: float
    divergence: float
    entropy: float
    drift: float
    drift_max: float
    tokens: float

    @property
    def mean_loss(self) -> float:
        return self.loss / self.weight if self.weight else 0.0

    def per_token(self, total: float) -> float:
        return total / self.tokens if self.tokens else 0.0


class Student:
    """This rank's part of the student."""

    def __init__(self, config: RunConfig, source: WeightSource, groups: ModelGroups, device: torch.device) -> None:
        self.groups = groups
        self.device = device
        self.architecture = source.architecture
        self.batches = TrainingBatches.of(config, groups.data_size)
        self.padded_vocab = source.architecture.padded_vocab_size(groups.layout.tensor, config.student.vocab_multiple)
        self.model = build_gpt(
            source.architecture,
            groups,
            precision=config.training.precision,
            vocab_multiple=config.student.vocab_multiple,
            recompute=config.training.recompute,
        ).to(device)
        with shared_errors():
            load_model(self.model, groups, source, vocab_multiple=config.student.vocab_multiple)
        self._is_half = config.training.precision == "bf16"
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.ddp = [DistributedDataParallel(chunk.config, ddp_config, Float16Module(chunk.config, chunk) if self._is_half else chunk) for chunk in self.model]
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer, self.scheduler = build_optimizer(self.ddp, config.training)
        self._offloads = config.training.offload_optimizer
        self._offloaded: Offloaded | None = None
        self._leave()

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

    def train_step(self, micro_batches: Sequence[MicroBatch], objective: Objective) -> tuple[LossSums, float, bool]:
        """Return (sums, gradient norm, updated). A loss or gradient that is not finite changes no weight; all ranks decide alike."""
        with self.optimizer_on_device():
            return self._update(micro_batches, objective)

    def _update(self, micro_batches: Sequence[MicroBatch], objective: Objective) -> tuple[LossSums, float, bool]:
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run_schedule(micro_batches, objective, forward_only=False)
        norm = gradient_norm(self.optimizer)
        self.scheduler.step(increment=1)
        # A step without a single scored token has no gradient; Adam's momentum alone must not move the weights.
        healthy = math.isfinite(norm) and math.isfinite(sums.loss) and sums.weight > 0
        if healthy:
            clip_and_update(self.optimizer, norm)
        return sums, norm, healthy

    def measure(self, micro_batches: Sequence[MicroBatch], objective: Objective) -> LossSums:
        """Return the sums without gradients or update."""
        self.model.eval()
        try:
            with torch.no_grad():
                return self._run_schedule(micro_batches, objective, forward_only=True)
        finally:
            self.model.train()

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _run_schedule(self, micro_batches: Sequence[MicroBatch], objective: Objective, *, forward_only: bool) -> LossSums:
        """Run Megatron's pipeline schedule over this replica's micro-batches and add up the sums of the whole world."""

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
            return output, lambda hidden_BSH: self._loss(hidden_BSH, micro_batch, objective)

        num_rows, length = micro_batches[0].batch.tokens_BS.shape
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self.ddp],
            model=self.ddp,
            num_microbatches=len(micro_batches),
            seq_length=length * self.groups.layout.context,
            micro_batch_size=num_rows,
            forward_only=forward_only,
        )
        forget_routes(self.model)
        return self._world_sums(results)

    def _loss(self, hidden_BSH: torch.Tensor, micro_batch: MicroBatch, objective: Objective) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (loss sum, count, detached sums) as Megatron's schedule takes them under calculate_per_token_loss."""
        hidden_TH = self._scored_hidden(hidden_BSH, micro_batch)
        result = objective(hidden_TH, head_weight(self.model), micro_batch)
        # The schedule's divisor is a count: weights are one for every scored token.
        return result.loss_sum, result.weight_sum.round().int(), _detached_sums(result, micro_batch)

    def _scored_hidden(self, hidden_BSH: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """Return hidden states [T, H] at scored positions, ready for a head split over the tensor group.

        Each tensor rank's head gives a partial gradient of the hidden states; the backward of these mappings sums them.
        """
        tp_group = self.groups.collection.tp
        if self.groups.layout.sequence:
            whole_SBH = gather_from_sequence_parallel_region(hidden_BSH.transpose(0, 1).contiguous(), tensor_parallel_output_grad=True, group=tp_group)
            return whole_SBH.transpose(0, 1).flatten(0, 1)[micro_batch.batch.scored_T]
        return copy_to_tensor_model_parallel_region(hidden_BSH.flatten(0, 1)[micro_batch.batch.scored_T], group=tp_group)

    def _world_sums(self, results: Sequence[torch.Tensor]) -> LossSums:
        """Add the sums of all replicas; every rank ends with the same numbers. Tensor ranks hold equal sums, so one of them speaks."""
        sums = torch.zeros(_NUM_SUMS, dtype=torch.float64, device=self.device)
        largest = torch.zeros(1, dtype=torch.float64, device=self.device)
        if self.groups.is_last_stage and self.groups.tensor_rank == 0 and results:
            stacked = torch.stack(list(results))
            sums, largest = stacked[:, :-1].sum(0), stacked[:, -1].max().reshape(1)
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        loss, weight, divergence, entropy, drift, tokens = sums.tolist()
        return LossSums(loss=loss, weight=weight, divergence=divergence, entropy=entropy, drift=drift, drift_max=float(largest), tokens=tokens)


_NUM_SUMS = 6


def _detached_sums(result: FusedDivergence, micro_batch: MicroBatch) -> torch.Tensor:
    """Return [loss, weight, divergence, entropy, drift, tokens, largest drift] of one micro-batch.

    Drift is |log-probability when sampled - when recomputed|: the same weights wrote and score, so it shows numerical disagreement only.
    """
    drift = torch.zeros(1, dtype=torch.float64, device=result.divergence_T.device)
    if result.sampled_logp_T is not None:
        drift_T = (result.sampled_logp_T - micro_batch.batch.sampled_logp_T).double().abs()
        drift = torch.cat([drift, drift_T[~drift_T.isnan()]])
    tokens = float(result.divergence_T.numel())
    parts = [result.loss_sum.detach(), result.weight_sum, result.divergence_T.double().sum(), result.student_entropy_T.double().sum(), drift.sum()]
    return torch.stack([*(part.double().reshape(()) for part in parts), drift.new_tensor(tokens), drift.max()])
