"""Planned activations against what autograd saves, a forward needs, and stages hold at once.

Not covered: GPUs. What CUDA kernels allocate besides tensors, and the temporaries of a backward, are not planned either.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from opd_megatron.config import ParallelLayout, RunConfig, apply_overrides
from tests.planned import PACKED, PUBLISHED, RECOMPUTED, SELECTED, build, longest_rollouts, storages, tiny_config
from tests.pool import RankPool


def saved_bytes(config: RunConfig) -> int:
    """Return the bytes that autograd keeps of one forward of the student."""
    from opd_megatron.models.gpt import build_gpt, hidden_states_only
    from opd_megatron.models.hf_folder import read_architecture
    from opd_megatron.models.layer_options import layers_here
    from opd_megatron.models.layers import RMSNorm, packed_sequences
    from opd_megatron.parallel.groups import student_groups

    groups = student_groups(config.student.layout, 1)
    training = config.training
    options = layers_here(training)
    model = build_gpt(read_architecture(Path(config.student.hf)), groups, precision=training.precision, vocab_multiple=4, options=options)
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    length, limit = (config.data.max_prompt_tokens + config.rollout.max_response_tokens) // config.student.layout.context, config.training.micro_batch_tokens
    packed = packed_sequences([length] * (limit // length)) if limit is not None else None
    tokens_BS = torch.zeros((1, limit) if limit is not None else (config.training.micro_batch, length), dtype=torch.long)
    usual, RMSNorm.forward = RMSNorm.forward, fused_norm
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), hidden_states_only(model):
            model.last(tokens_BS, torch.arange(tokens_BS.size(1)).expand_as(tokens_BS), None, packed_seq_params=packed)
    finally:
        RMSNorm.forward = usual
    if "mixture" in config.student.hf:
        # Experts see matrices: all that is saved counts, but weights, ids of tokens, and the kind of mask (a number on the host) of attention computed again.
        weights = storages(model.parameters())
        kept = storages(tensor for tensor in saved.values() if tensor.shape not in (tokens_BS.shape, (1,)))
        return sum(num_bytes for place, num_bytes in kept.items() if place not in weights)
    # Matrices are no activations: weights, token ids, and the mask that attention over context ranks needs on CPU (flash attention needs none).
    return sum(storages(tensor for tensor in saved.values() if tensor.dim() > 2).values())


def fused_norm(self: torch.nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    if not self.is_zero_centered:
        return FusedRMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]
    return FusedRMSNorm.apply(x.float(), 1 + self.weight.float(), self.eps).type_as(x)  # type: ignore[no-any-return]


class FusedRMSNorm(torch.autograd.Function):
    """Saves what PyTorch's CUDA kernel saves: the input and one number a row. On CPU the norm is several operations, each with its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, scale)
        return (x * scale).to(x.dtype) * weight


def planned_activations(config: RunConfig) -> int:
    from opd_megatron.planning import make_plan

    (term,) = (term for term in make_plan(config, PUBLISHED).ranks[0].terms if term.name == "activations")
    return term.num_bytes


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("student", "layout", "micro_batch"),
    [
        ("student", {}, 1),
        ("student", {}, 4),
        ("student", {"tensor": 2}, 2),
        ("student", {"tensor": 2, "sequence": True}, 2),
        ("llama", {}, 2),
        ("llama", {"tensor": 2, "sequence": True}, 1),
        ("student", {"context": 2}, 1),
        ("llama", {"context": 2}, 2),
        ("gemma2", {}, 2),
        ("gemma2", {"tensor": 2, "sequence": True}, 1),
        ("gemma2", {"context": 2}, 1),
        ("phi3", {"tensor": 2}, 2),
        ("mixture", {}, 2),
        ("mixture", {"expert": 2}, 2),
        ("mixture", {"expert": 2, "tensor": 2, "sequence": True}, 2),
        ("mixture_teacher", {"expert": 2}, 1),
        ("mixture", {"expert_tensor": 2}, 2),
        ("mixture_teacher", {"expert_tensor": 2, "tensor": 2, "sequence": True}, 1),
        ("mixture", {"expert": 2, "expert_tensor": 2}, 2),
    ],
)
def test_autograd_saves_what_was_planned(
    planned_models: Path, pool: RankPool, planner: Callable[..., Any], student: str, layout: dict[str, Any], micro_batch: int, precision: str
) -> None:
    num_ranks = max(2, layout.get("expert", 1) * layout.get("expert_tensor", 1))
    config = tiny_config(planned_models, ParallelLayout(**layout), ParallelLayout(), world_size=num_ranks, precision=precision, micro_batch=micro_batch)
    config = replace(config, student=replace(config.student, hf=str(planned_models / student)))
    # However a router spreads the tokens, the ranks that share experts save as much together as planned.
    assert num_ranks * planner(planned_activations, config) == sum(pool.run(saved_bytes, config, world_size=num_ranks))


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside had at once; views of `others` are none of them."""

    def __init__(self, others: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known or not storage.nbytes():
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, place: int, num_bytes: int) -> None:
        self._known.discard(place)
        self.now -= num_bytes


def forward_peak(config: RunConfig) -> tuple[int, int]:
    """Return the bytes that a forward of the student without gradients needs at once beside its weights, and how many tokens it has."""
    from opd_megatron.models.forward import forward_hidden, inference_mode
    from opd_megatron.models.gpt import build_gpt
    from opd_megatron.models.hf_folder import read_architecture
    from opd_megatron.parallel.groups import student_groups

    groups = student_groups(config.student.layout, 1)
    model = build_gpt(read_architecture(Path(config.student.hf)), groups, precision=config.training.precision, vocab_multiple=4)
    tokens_BS = torch.randint(0, 256, (4, 100), generator=torch.Generator().manual_seed(dist.get_rank()))
    with inference_mode(model, groups), LiveBytes([tokens_BS, *model.parameters()]) as live:
        forward_hidden(model, groups, tokens_BS)
    return live.peak, tokens_BS.numel()


def planned_forward(config: RunConfig) -> int:
    from opd_megatron.models.gpt import DTYPES
    from opd_megatron.models.hf_folder import read_architecture
    from opd_megatron.planning.activations import forward_bytes_per_token

    architecture, itemsize = read_architecture(Path(config.student.hf)), DTYPES[config.training.precision].itemsize
    return forward_bytes_per_token(architecture, config.student.layout, itemsize=itemsize, num_layers=architecture.num_layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "layout", "settings"),
    [
        ("student", {}, [RECOMPUTED]),
        ("student", {"tensor": 2, "sequence": True}, [RECOMPUTED]),
        ("mixture", {"expert": 2}, [RECOMPUTED]),
        ("mixture", {"expert_tensor": 2}, [RECOMPUTED]),
        ("student", {}, [PACKED]),
        ("llama", {"tensor": 2, "sequence": True}, [PACKED]),
        ("mixture", {}, [PACKED]),
        ("mixture", {"expert_tensor": 2}, [PACKED]),
        ("student", {"tensor": 2}, [PACKED, RECOMPUTED]),
        ("gemma2", {}, [PACKED]),
        ("phi3", {}, [RECOMPUTED]),
        ("student", {}, [*SELECTED]),
        ("llama", {"tensor": 2, "sequence": True}, [*SELECTED]),
        ("llama", {"context": 2}, [*SELECTED]),
        ("gemma2", {}, [*SELECTED, PACKED]),
        ("gemma2", {"context": 2}, [*SELECTED]),
        ("mixture", {"expert": 2}, [*SELECTED]),
        ("mixture_teacher", {}, [*SELECTED, PACKED]),
        ("student", {}, ["training.recompute=selective", "training.recompute_modules=core_attn"]),
        ("student", {"tensor": 2}, ["training.recompute=selective"]),
    ],
)
def test_autograd_saves_what_was_planned_of_packs_and_recomputed_layers(
    planned_models: Path, pool: RankPool, planner: Callable[..., Any], student: str, layout: dict[str, Any], settings: list[str]
) -> None:
    config = tiny_config(planned_models, ParallelLayout(**layout), ParallelLayout(), world_size=2, precision="bf16", micro_batch=1)
    config = apply_overrides(replace(config, student=replace(config.student, hf=str(planned_models / student))), settings)
    assert 2 * planner(planned_activations, config) == sum(pool.run(saved_bytes, config, world_size=2))


def most_in_flight(config: RunConfig) -> int:
    """Return how many micro-batches, each on one chunk, this rank has sent forward and not yet backward, at most."""
    from opd_megatron.training.objective import Distillation

    student, teacher = build(config)
    rollouts = longest_rollouts(config)
    objective = Distillation(loss=config.loss, vocab_size=263, tp_group=student.groups.collection.tp, teacher_head_WG=teacher.head_WG)
    now, most = 0, 0

    def forward(*_: Any) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)

    def backward(*_: Any) -> None:
        nonlocal now
        now -= 1

    for chunk in student.model:
        chunk.decoder.register_forward_hook(forward)
        # Where a chunk begins its backward ends.
        chunk.decoder.layers[0].self_attention.linear_qkv.weight.register_post_accumulate_grad_hook(backward)
    student.train_step(student.micro_batches(rollouts, teacher.score(rollouts)), objective)
    return most


def planned_in_flight(config: RunConfig) -> list[int]:
    from opd_megatron.planning.architectures import know_model
    from opd_megatron.planning.payload import step_payload
    from opd_megatron.planning.ranks import plan_rank
    from opd_megatron.planning.step_shape import StepShape

    student, payload = know_model("student", config.student, PUBLISHED), step_payload(config)
    return [StepShape(plan_rank(config, student, None, payload, rank)).num_in_flight for rank in range(config.world_size)]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "batch_prompts"), [({"pipeline": 4}, 16), ({"pipeline": 2, "virtual": 2}, 16), ({"pipeline": 2, "virtual": 2}, 4)])
def test_stages_hold_as_many_micro_batches_as_planned(
    planned_models: Path, pool: RankPool, planner: Callable[..., Any], layout: dict[str, Any], batch_prompts: int
) -> None:
    config = tiny_config(planned_models, ParallelLayout(**layout), ParallelLayout(), world_size=4)
    config = apply_overrides(config, [f"data.batch_prompts={batch_prompts}"])
    assert pool.run(most_in_flight, config) == planner(planned_in_flight, config)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("student", "layout", "world_size"),
    [
        ("wide", {}, 2),
        ("wide_gemma2", {}, 2),
        ("wide_mixture", {}, 2),
        ("wide_mixture", {"expert": 2}, 2),
        ("wide_mixture", {"tensor": 2}, 2),
        ("wide_mixture", {"expert_tensor": 2}, 2),
        ("wide_mixture", {"tensor": 2, "expert_tensor": 2}, 2),
        ("wide_mixture", {"expert": 2, "expert_tensor": 2}, 4),
    ],
)
def test_a_forward_without_gradients_needs_what_was_planned(
    planned_models: Path, pool: RankPool, student: str, layout: dict[str, Any], world_size: int, precision: str
) -> None:
    config = tiny_config(planned_models, ParallelLayout(**layout), ParallelLayout(), world_size=world_size, precision=precision)
    config = replace(config, student=replace(config.student, hf=str(planned_models / student)))
    measured = pool.run(forward_peak, config, world_size=world_size)
    # However tokens are spread. Cosines, sines and the router's logits are not planned, and much of a tiny model.
    assert sum(peak for peak, _ in measured) == pytest.approx(sum(tokens for _, tokens in measured) * planned_forward(config), rel=0.05)
