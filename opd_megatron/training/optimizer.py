"""Megatron-Core's distributed optimizer, and what it needs where Adam is PyTorch's own, which counts steps by parameter, or a fused one, which does by group.

Megatron-Core takes the fused Adam of Transformer Engine, or else of Apex, where `opd_megatron.packages` found one that works. That was not yet run on a GPU;
`tests/distributed/test_fused_adam.py` runs its branches with an Adam that counts as those do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from opd_megatron.config import TrainingConfig
from opd_megatron.models.gpt import DTYPES


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], training: TrainingConfig, factors: Mapping[torch.nn.Parameter, float]
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """Return the optimizer of all parameters that require a gradient, and the learning-rate schedule, whose state is the step number alone.

    `factors` scale the rate of some parameters. A rank may have no parameter at all.
    """
    _restore_adam_step()
    _state_without_parameters()
    _place_buckets_where_parameters_are_read()
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.learning_rate,
        min_lr=training.min_learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        clip_grad=training.clip_grad,
        bf16=training.precision == "bf16",
        params_dtype=DTYPES[training.precision],
        use_distributed_optimizer=True,
    )
    overrides = {**get_standard_config_overrides(config), **_rate_overrides(training, factors)}
    optimizer = get_megatron_optimizer(config, list(chunks), config_overrides=overrides)
    # Where experts alone train, the part for the others is a stub on every rank, which cannot be saved.
    optimizer.chained_optimizers = [part for part in optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if training.warmup_steps else training.learning_rate,
        max_lr=training.learning_rate,
        min_lr=training.min_learning_rate,
        lr_warmup_steps=training.warmup_steps,
        # A run shorter than its warm-up, as a trial may be, just does not finish it.
        lr_decay_steps=max(training.steps, training.warmup_steps + 1),
        lr_decay_style=training.lr_schedule,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=training.steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def _rate_overrides(training: TrainingConfig, factors: Mapping[torch.nn.Parameter, float]) -> dict[ParamKey, Any]:
    """Return Megatron-Core's overrides, one for each factor. The schedule reads the rates; `lr_mult` tells the groups apart when a checkpoint is loaded."""
    overrides = {}
    for factor in sorted(set(factors.values())):
        scaled = frozenset(id(parameter) for parameter, own in factors.items() if own == factor)
        key = ParamKey(predicate=ParamPredicate(name=f"learning_rate_times_{factor}", fn=lambda parameter, scaled=scaled: id(parameter) in scaled))
        overrides[key] = {"max_lr": training.learning_rate * factor, "min_lr": training.min_learning_rate * factor, "lr_mult": factor}
    return overrides


def learning_rate(optimizer: ChainedOptimizer) -> float:
    """Return the rate of parameters whose factor is 1."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / group["lr_mult"]


def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """Return the global gradient norm, the same on every rank; not finite if any gradient is not."""
    if optimizer.prepare_grads():
        return math.inf
    return float(optimizer.get_grad_norm())


def clip_and_update(optimizer: ChainedOptimizer, norm: float) -> None:
    """Clip to the configured norm and update the weights: ChainedOptimizer.step, after its gradients were found finite."""
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm, use_decoupled_grad=decoupled)
    optimizer.step_with_ready_grads()


def optimizer_state(optimizer: ChainedOptimizer) -> list[torch.Tensor]:
    """Return what the optimizer keeps beside the model's weights: moments, and fp32 master weights where the model has others."""
    tensors: list[torch.Tensor] = []
    for part in optimizer.chained_optimizers:
        inner = getattr(part, "optimizer", None)
        states = inner.state.values() if inner is not None else ()
        tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor) and value.dim() > 0]
        tensors += [master for group in getattr(part, "shard_fp32_from_float16_groups", ()) for master in group if master is not None]
    return tensors


def prime_adam(optimizer: ChainedOptimizer) -> None:
    """Give Adam the state of no update where it has none: what is saved has moments of every parameter, and a step. Every rank calls it.

    A rank without parameters learns the step from the others: rank 0's is the one that a checkpoint keeps.
    """
    steps = [0.0]
    for part in optimizer.chained_optimizers:
        by_parameter = _counts_by_parameter(part)
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                    if by_parameter:
                        state["step"] = torch.tensor(0.0)
                steps.append(float(state["step"] if by_parameter else group.get("step", 0)))
    largest = torch.tensor([max(steps)], device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    for part in optimizer.chained_optimizers:
        part.step_elsewhere = float(largest)
        if not _counts_by_parameter(part):
            for group in part.optimizer.param_groups:
                group["step"] = int(largest)


def unshare_adam_step(optimizer: ChainedOptimizer) -> None:
    """Give every parameter its own step counter after a load, or every group a whole number.

    DistributedOptimizer.load_state_dict hands all parameters one shared tensor, which PyTorch's Adam then counts up once per parameter. A fused Adam takes the
    number that a checkpoint has, which PyTorch's wrote as 12.0, and its kernel only takes 12.
    """
    for part in optimizer.chained_optimizers:
        if _counts_by_parameter(part):
            for state in part.optimizer.state.values():
                if torch.is_tensor(state.get("step")):
                    state["step"] = state["step"].clone()
        else:
            for group in part.optimizer.param_groups:
                if "step" in group:
                    group["step"] = int(group["step"])


def has_finite_state(optimizer: ChainedOptimizer) -> bool:
    """Return whether every master weight and moment of this rank is a finite number."""
    adams = [part.optimizer for part in optimizer.chained_optimizers]
    values = [
        value
        for adam in adams
        for group in adam.param_groups
        for parameter in group["params"]
        for value in (parameter.detach(), *adam.state.get(parameter, {}).values())
    ]
    return all(bool(value.isfinite().all()) for value in values if isinstance(value, torch.Tensor))


def restart_adam(optimizer: ChainedOptimizer) -> None:
    """Begin the moments anew, as if there had been no update."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            # A fused Adam counts by group, PyTorch's by parameter.
            if "step" in group:
                group["step"] = 0
        for state in part.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()


def _counts_by_parameter(part: Any) -> bool:
    return isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _restore_adam_step() -> None:
    """Let a load pass where PyTorch's Adam keeps 'step' per parameter and the checkpoint keeps it per group (KeyError in 0.16.1 to 0.19.2)."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(original, "keeps_step", False):
        return

    def set_states(self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"].clone()}
        original(self, model_param, tensors)

    set_states.keeps_step = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _state_without_parameters() -> None:
    """Let a rank without a single parameter to train be saved: DistributedOptimizer.state_dict asserts that its Adam has one 'step' (0.16.1 to 0.19.2).

    A pipeline stage whose layers are frozen has none, nor has a data-parallel rank whose share of the few that train is empty.
    """
    original = DistributedOptimizer.state_dict
    if getattr(original, "takes_none", False):
        return

    def state_dict(self: DistributedOptimizer) -> dict[str, Any]:
        """Return what the original does, {"optimizer": {"param_groups": [...]}}; without parameters, with the step of the other ranks."""
        adam: Any = self.optimizer
        if not _counts_by_parameter(self) or adam.state:
            return original(self)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in adam.state_dict()["param_groups"]]
        return {"optimizer": {"param_groups": [{**group, "step": getattr(self, "step_elsewhere", 0.0)} for group in groups]}}

    state_dict.takes_none = True  # type: ignore[attr-defined]
    DistributedOptimizer.state_dict = state_dict


def _place_buckets_where_parameters_are_read() -> None:
    """Let a save find every parameter's state when a buffer has several padded buckets (0.16.1 to 0.19.2).

    `get_parameter_state_dp_zero` strings the buckets together without their padding, and the `fully_reshardable` format then cuts out
    parameters at their padded places. A tied embedding under pipeline parallelism has a bucket of its own, so its stage saved shifted weights.
    """
    original = DistributedOptimizer.get_parameter_state_dp_zero
    if getattr(original, "keeps_padding", False):
        return

    def parameter_state(self: DistributedOptimizer, *args: Any, **kwargs: Any) -> Any:
        """Return what the original does, {buffer: {dtypes: {key: flat tensor}}} or None, with the padding between buckets put back into every tensor."""
        state = original(self, *args, **kwargs)
        for index, buffer in enumerate(self.buffers):
            for tensors in (state or {}).get(index, {}).values():
                for key in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[key] = _with_padding(tensors[key], buffer)
        return state

    parameter_state.keeps_padding = True  # type: ignore[attr-defined]
    DistributedOptimizer.get_parameter_state_dp_zero = parameter_state


def _with_padding(unpadded: torch.Tensor, buffer: Any) -> torch.Tensor:
    starts = [0, *accumulate(bucket.numel_unpadded for bucket in buffer.buckets)]
    if all(bucket.offset == start for bucket, start in zip(buffer.buckets, starts, strict=False)):
        return unpadded
    whole = unpadded.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        whole[bucket.offset : bucket.offset + bucket.numel_unpadded] = unpadded[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return whole
