"""The losses on a GPU: every kind against naive fp64, its Triton kernels against the torch form, and two tensor ranks against one.

Not covered: speed (tools/bench_loss.py --device cuda).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from opd_megatron.losses import fused_head_divergence, triton_divergence
from tests.gpu.ranks import DEVICE, on_ranks
from tests.reference_losses import TOLERANCE, head_problem, naive_divergence, relative_error, with_ids

pytestmark = pytest.mark.gpu

NUM_TOKENS, NUM_COLUMNS = 67, 1280
KINDS: dict[str, dict[str, Any]] = {
    "reverse_kl": {"kind": "reverse_kl"},
    "forward_kl": {"kind": "forward_kl"},
    "jsd": {"kind": "jsd", "beta": 0.3},
    "reverse_kl clipped, warm": {"kind": "reverse_kl", "pointwise_clip": 0.02, "temperature": 1.3},
    "jsd clipped": {"kind": "jsd", "pointwise_clip": 0.005},
    "skew_forward": {"kind": "skew_forward", "alpha": 0.2},
    "skew_reverse": {"kind": "skew_reverse", "alpha": 0.2},
    "topk_tail_forward": {"kind": "topk_tail_forward", "top_k": 16},
    "topk_tail_reverse": {"kind": "topk_tail_reverse", "top_k": 16},
    "topk_renorm_forward": {"kind": "topk_renorm_forward", "top_k": 16},
    "topk_renorm_reverse": {"kind": "topk_renorm_reverse", "top_k": 16},
    "k1": {"kind": "k1"},
    "k3": {"kind": "k3"},
}


def _gradients(device: torch.device | str, case: dict[str, Any], dtype: torch.dtype, rank: int = 0, size: int = 1, group: Any = None) -> list[torch.Tensor]:
    """Return the weighted sum's value and gradients on one of `size` ranks of the vocabulary, from the fused head; on the CPU."""
    models, weight_T = head_problem(NUM_TOKENS, NUM_COLUMNS, dtype)
    columns = slice(rank * NUM_COLUMNS // size, (rank + 1) * NUM_COLUMNS // size)
    hidden, head, teacher_hidden, teacher_head = (tensor.detach().to(device) for tensor in models)
    hidden, head = hidden.requires_grad_(), head[columns].clone().requires_grad_()
    options = {key: value.to(device) if torch.is_tensor(value) else value for key, value in with_ids(case, NUM_TOKENS, NUM_COLUMNS).items()}
    result = fused_head_divergence(hidden, head, teacher_hidden, teacher_head[columns].clone(), token_weight_T=weight_T.to(device), tp_group=group, **options)
    return [tensor.detach().cpu() for tensor in (result.loss_sum.reshape(1), *torch.autograd.grad(result.loss_sum, (hidden, head)))]


def _exact(case: dict[str, Any], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the same by fp64 autograd through full logits, from the same rounded operands."""
    models, weight_T = head_problem(NUM_TOKENS, NUM_COLUMNS, dtype)
    hidden, head, teacher_hidden, teacher_head = (tensor.detach().double() for tensor in models)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    value_T = naive_divergence(hidden @ head.T, teacher_hidden @ teacher_head.T, **with_ids(case, NUM_TOKENS, NUM_COLUMNS))
    loss = (value_T * weight_T.double()).sum()
    return [loss.detach().reshape(1), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_value_and_gradients_are_those_of_fp64(assert_figure: Callable[..., None], name: str, dtype: torch.dtype) -> None:
    ours, exact = _gradients(DEVICE, KINDS[name], dtype), _exact(KINDS[name], dtype)
    worst = max(relative_error(value, reference) for value, reference in zip(ours, exact, strict=True))
    assert_figure(f"loss {name}, gradients against fp64, {dtype}".replace("torch.", ""), worst, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "jsd clipped", "skew_reverse"])
def test_kernels_give_what_the_torch_form_gives(assert_figure: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if DEVICE == "cuda" and not triton_divergence.HAS_TRITON:
        pytest.skip("needs triton, which comes with torch for CUDA")
    if DEVICE == "cpu":
        pytest.importorskip("triton", reason="needs the test extra: triton")
    results = {}
    for on in (True, False):
        monkeypatch.setattr(triton_divergence, "usable_for", lambda _logits, on=on: on)
        results[on] = _gradients(DEVICE, KINDS[name], torch.float32)
    worst = max(relative_error(value, reference) for value, reference in zip(results[True], results[False], strict=True))
    assert_figure(f"loss {name}, Triton kernels against torch", worst, TOLERANCE[torch.float32])


def _sharded(device: torch.device) -> dict[str, list[torch.Tensor]]:
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    return {name: _gradients(device, case, torch.float32, rank, size, dist.group.WORLD) for name, case in KINDS.items()}


def test_two_tensor_ranks_give_what_one_gives(assert_figure: Callable[..., None]) -> None:
    """Over NCCL where there are two GPUs; else over gloo, sharing one."""
    ranks = on_ranks(_sharded, num_ranks=2)
    for name, case in KINDS.items():
        exact = _exact(case, torch.float32)
        hidden = ranks[0][name][1] + ranks[1][name][1]
        head = torch.cat([ranks[0][name][2], ranks[1][name][2]])
        worst = max(relative_error(value, reference) for value, reference in zip((ranks[0][name][0], hidden, head), exact, strict=True))
        assert_figure(f"loss {name}, TP2 against fp64", worst, TOLERANCE[torch.float32])
