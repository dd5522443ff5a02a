"""LM head and loss in one function: hidden states in, their gradient and the head's out, and never a [T, V] tensor.

Shapes: T tokens, N tokens of one chunk, V vocabulary, W = this rank's slice of V, H / G = student / teacher hidden size.

The gradient is computed in the forward, chunk by chunk, because the logits exist only then: four products per token instead of the six
of a backward that recomputes them. It follows that token weights are inputs here, and that the backward can only scale by one number.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_megatron.losses.chunk_objectives import ChunkObjective, CrossEntropyObjective, DivergenceObjective, chunk_softmax, chunk_statistics
from opd_megatron.losses.divergences import make_divergence
from opd_megatron.losses.head_products import add_head_gradient_, hidden_gradient
from opd_megatron.losses.logit_scaling import LogitScaling, logit_scalings
from opd_megatron.losses.vocab_parallel import Scratch, VocabShard, compute_dtype, require_ids, require_same, token_chunks, vocab_shard

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FusedDivergence:
    """Weighted sum of the tokens' losses, differentiable, with its weight total; and detached per-token values for every row, kept or not.

    `observed` is what a kind tells of a row besides, by name.
    """

    loss_sum: torch.Tensor
    weight_sum: torch.Tensor
    divergence_T: torch.Tensor
    student_entropy_T: torch.Tensor
    sampled_logp_T: torch.Tensor | None
    observed: dict[str, torch.Tensor]

    @property
    def clipped_T(self) -> torch.Tensor | None:
        """How many vocabulary entries (classes, for the top-k kinds) `pointwise_clip` clips, a whole number; None without a clip."""
        return self.observed.get("clipped")


@dataclass(frozen=True)
class TokenStatistics:
    """Student entropy and both KL divergences of every token, in nats, detached. reverse = KL(student||teacher), forward = KL(teacher||student)."""

    student_entropy_T: torch.Tensor
    reverse_kl_T: torch.Tensor
    forward_kl_T: torch.Tensor


class _FusedHead(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of tokens; the backward scales them by the upstream number and sends nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        head_WH: torch.Tensor,
        weight_T: torch.Tensor,
        objective: ChunkObjective,
        shard: VocabShard,
        scaling: LogitScaling,
        chunk_tokens: int | None,
        grad_enabled: bool,
        accumulate_main_grad: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the loss sum and, detached, each token's loss, entropy, picked log-probability and what the objective observes [T].

        Saved are the sum's gradients [T, H] and [W, H].
        """
        needs_hidden, needs_head = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        grad_TH = torch.zeros_like(hidden_TH) if needs_hidden else None
        grad_WH = torch.zeros_like(head_WH, dtype=weight_T.dtype) if needs_head else None
        value_T, entropy_T, picked_logp_T = (torch.empty_like(weight_T) for _ in range(3))
        observed = [torch.empty_like(weight_T) for _ in objective.observes]
        scratch = Scratch()
        chunks = list(objective.chunks(hidden_TH.size(0), head_WH.size(0), hidden_TH.device, chunk_tokens))
        for rows, num_kept in zip(chunks, _num_kept(weight_T, chunks)):
            scale_N = weight_T[rows] / scaling.temperature if num_kept > 0 and (needs_hidden or needs_head) else None
            student = chunk_softmax("student", hidden_TH[rows], head_WH, shard, scaling, weight_T.dtype, scratch, keep_damping=scale_N is not None)
            chunk = objective(student, rows, shard, scale_N)
            value_T[rows], entropy_T[rows] = chunk.value_N, chunk.entropy_N
            if chunk.picked_logp_N is not None:
                picked_logp_T[rows] = chunk.picked_logp_N
            for whole_T, part_N in zip(observed, chunk.observed_N, strict=True):
                whole_T[rows] = part_N
            if chunk.grad_NW is not None:
                if student.damping_TW is not None:
                    chunk.grad_NW.mul_(student.damping_TW)
                dropped_some = num_kept < chunk.grad_NW.size(0)
                _add_gradients(chunk.grad_NW, rows, weight_T[rows] if dropped_some else None, hidden_TH, head_WH, grad_TH, grad_WH)
        ctx.save_for_backward(grad_TH, grad_WH)
        ctx.head_dtype, ctx.head_WH = head_WH.dtype, head_WH if accumulate_main_grad else None
        ctx.mark_non_differentiable(value_T, entropy_T, picked_logp_T, *observed)
        # The loss of a dropped token may be anything, even NaN (a label outside the vocabulary): it is left out, not multiplied by 0.
        return (weight_T * value_T).masked_fill_(weight_T == 0, 0).sum(), value_T, entropy_T, picked_logp_T, *observed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the saved gradients times the upstream number, each in its input's dtype; the head's goes to its `main_grad` where that was asked for."""
        grad_TH, grad_WH = ctx.saved_tensors
        scaled_TH = None if grad_TH is None else (grad_TH * grad_sum).to(grad_TH.dtype)
        if ctx.head_WH is not None and grad_WH is not None:
            return scaled_TH, _add_to_main_grad(ctx.head_WH, grad_WH, grad_sum), *(None,) * 7
        scaled_WH = None if grad_WH is None else (grad_WH * grad_sum).to(ctx.head_dtype)
        return scaled_TH, scaled_WH, *(None,) * 7


def _add_to_main_grad(head_WH: torch.Tensor, grad_WH: torch.Tensor, grad_sum: torch.Tensor) -> torch.Tensor | None:
    """Add the head's gradient to its `main_grad`, mark it as added, and return what autograd is given instead.

    As Megatron-Core's gradient_accumulation_fusion: a parameter that carries the mark gets a placeholder, so that the data-parallel hook runs.
    Zeros, where Megatron leaves memory as it is: a caller without that hook finds a `.grad` that changes nothing.
    """
    head_WH.main_grad.addcmul_(grad_WH, grad_sum.to(grad_WH.dtype))  # type: ignore[attr-defined]
    if not hasattr(head_WH, "grad_added_to_main_grad"):
        return None
    head_WH.grad_added_to_main_grad = True
    return torch.zeros_like(head_WH)


def _require_main_grad(head_WH: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless the head has a `main_grad` of its shape, in the dtype of the arithmetic."""
    main_grad = getattr(head_WH, "main_grad", None)
    if main_grad is None:
        raise ValueError("accumulate_main_grad=True needs student_head_WH.main_grad, got None; pass the parameter itself, or False")
    for what, left, right in (("shapes", tuple(head_WH.shape), tuple(main_grad.shape)), ("dtypes", dtype, main_grad.dtype)):
        require_same(what, "the gradient of student_head_WH", left, "student_head_WH.main_grad", right)


def _num_kept(weight_T: torch.Tensor, chunks: list[slice]) -> list[int]:
    """Return how many tokens of each chunk have a weight: one wait for the device in all."""
    return torch.stack([weight_T[rows].count_nonzero() for rows in chunks]).tolist() if chunks else []


def _add_gradients(
    grad_NW: torch.Tensor,
    rows: slice,
    weight_N: torch.Tensor | None,
    hidden_TH: torch.Tensor,
    head_WH: torch.Tensor,
    grad_TH: torch.Tensor | None,
    grad_WH: torch.Tensor | None,
) -> None:
    """Write one chunk's gradient of the hidden states and add its gradient of the head, each where it is wanted; of the rows with weight only."""
    hidden_NH, width = hidden_TH[rows], grad_NW.size(1)
    if weight_N is not None:
        kept = weight_N.nonzero().squeeze(1)
        grad_NW, hidden_NH = grad_NW[kept], hidden_NH[kept]
    if grad_TH is not None:
        grad_NH = hidden_gradient(grad_NW, head_WH[:width]).to(grad_TH.dtype)
        if weight_N is None:
            grad_TH[rows] = grad_NH
        else:
            grad_TH[rows].index_copy_(0, kept, grad_NH)
    if grad_WH is not None:
        add_head_gradient_(grad_WH[:width], grad_NW, hidden_NH)


def fused_head_divergence(
    student_hidden_TH: torch.Tensor,
    student_head_WH: torch.Tensor,
    teacher_hidden_TG: torch.Tensor,
    teacher_head_WG: torch.Tensor,
    *,
    kind: str,
    tp_group: dist.ProcessGroup | None = None,
    token_weight_T: torch.Tensor | None = None,
    beta: float = 0.5,
    alpha: float | None = None,
    top_k: int | None = None,
    support: str | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    pointwise_clip: float | None = None,
    chunk_tokens: int | None = None,
    sampled_ids_T: torch.Tensor | None = None,
    accumulate_main_grad: bool = False,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> FusedDivergence:
    """Return sum_t weight_t divergence_t of two models given by hidden states and LM heads; kinds and options are those of `vocab_parallel_divergence`.

    All ranks of the group hold the same hidden states, the same T, and W rows of each head (Megatron pads the vocabulary so that W is equal).
    **The gradient of `student_hidden_TH` is this rank's part only; the caller sums it over the group**, which Megatron's
    `copy_to_tensor_model_parallel_region`, or its sequence-parallel gather, applied to the hidden states before this call, does in its backward.
    The head's gradient is complete. Neither the teacher nor the weights get one.

    Rows of weight 0 give no gradient and still get their divergence and entropy. With `sampled_ids_T`, `sampled_logp_T` is their log-probability
    under the student at `temperature`, NaN for an id outside the vocabulary. `chunk_tokens` must be the same on all ranks; None fits CHUNK_BYTES.
    With `accumulate_main_grad` the backward adds the head's gradient, in fp32, to `student_head_WH.main_grad` and sets `grad_added_to_main_grad`
    where the head has that attribute, as Megatron-Core's gradient_accumulation_fusion does.
    A model with a `softcap` c has the logits c tanh(hidden @ head^T / c), before the temperature; each model has its own, or None.
    Two collectives per chunk in the forward, one for k1 and k3, none in the backward.
    Raises ValueError for arguments that disagree, an unknown kind, an option outside its range or of another kind, or a temperature that is
    not positive.
    """
    divergence = make_divergence(kind=kind, beta=beta, alpha=alpha, top_k=top_k, support=support, pointwise_clip=pointwise_clip, sampled_ids_T=sampled_ids_T)
    scaling, teacher_scaling = logit_scalings(temperature, student_softcap, teacher_softcap)
    _require_pair(student_hidden_TH, student_head_WH, teacher_hidden_TG, teacher_head_WG)
    objective = DivergenceObjective(teacher_hidden_TG.detach(), teacher_head_WG.detach(), divergence, teacher_scaling, sampled_ids_T)
    ids = {} if sampled_ids_T is None else {"sampled_ids_T": sampled_ids_T}
    shard = vocab_shard(student_head_WH.size(0), tp_group=tp_group, vocab_size=vocab_size)
    return fused_head(student_hidden_TH, student_head_WH, objective, shard, token_weight_T, scaling, chunk_tokens, ids, accumulate_main_grad)


def fused_head_cross_entropy(
    student_hidden_TH: torch.Tensor,
    student_head_WH: torch.Tensor,
    target_ids_T: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    token_weight_T: torch.Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    accumulate_main_grad: bool = False,
    student_softcap: float | None = None,
) -> FusedDivergence:
    """Return sum_t weight_t (-log p(target_t)) for supervised fine-tuning; `divergence_T` holds the cross entropy of every token.

    As `fused_head_divergence` in everything else, two collectives per chunk. A target outside the vocabulary (an ignore label) has cross entropy
    NaN, which is left out of the sum where its weight is 0.
    """
    scaling, _ = logit_scalings(1.0, student_softcap, None)
    _require_head("student", student_hidden_TH, student_head_WH)
    shard = vocab_shard(student_head_WH.size(0), tp_group=tp_group, vocab_size=vocab_size)
    ids = {"target_ids_T": target_ids_T}
    objective = CrossEntropyObjective(target_ids_T)
    return fused_head(student_hidden_TH, student_head_WH, objective, shard, token_weight_T, scaling, chunk_tokens, ids, accumulate_main_grad)


def fused_head(
    hidden_TH: torch.Tensor,
    head_WH: torch.Tensor,
    objective: ChunkObjective,
    shard: VocabShard,
    token_weight_T: torch.Tensor | None,
    scaling: LogitScaling,
    chunk_tokens: int | None,
    ids: dict[str, torch.Tensor],
    accumulate_main_grad: bool,
) -> FusedDivergence:
    """Check the per-token arguments, run the objective and name its results; the log-probabilities of `ids`, when given, are among them."""
    dtype = compute_dtype(hidden_TH)
    weight_T = hidden_TH.new_ones(hidden_TH.size(0), dtype=dtype) if token_weight_T is None else token_weight_T.detach().to(dtype)
    require_same("shapes", "token_weight_T", tuple(weight_T.shape), "the tokens of student_hidden_TH", (hidden_TH.size(0),))
    require_same("devices", "token_weight_T", weight_T.device, "student_hidden_TH", hidden_TH.device)
    for name, ids_T in ids.items():
        require_ids(name, ids_T, "student_hidden_TH", hidden_TH)
    if accumulate_main_grad:
        _require_main_grad(head_WH, dtype)
    with _exact_products(hidden_TH):
        loss_sum, value_T, entropy_T, picked_logp_T, *observed = _FusedHead.apply(
            hidden_TH, head_WH, weight_T, objective, shard, scaling, chunk_tokens, torch.is_grad_enabled(), accumulate_main_grad
        )
    return FusedDivergence(loss_sum, weight_T.sum(), value_T, entropy_T, picked_logp_T if ids else None, dict(zip(objective.observes, observed, strict=True)))


def _exact_products(hidden_TH: torch.Tensor) -> torch.autocast:
    """Keep a surrounding autocast from computing these products in another dtype than their operands'."""
    return torch.autocast(hidden_TH.device.type, enabled=False)


def token_statistics(
    student_hidden_TH: torch.Tensor,
    student_head_WH: torch.Tensor,
    teacher_hidden_TG: torch.Tensor,
    teacher_head_WG: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> TokenStatistics:
    """Return entropy, reverse and forward KL of every token, without gradient: two collectives per chunk. Arguments as in `fused_head_divergence`."""
    scaling, teacher_scaling = logit_scalings(temperature, student_softcap, teacher_softcap)
    _require_pair(student_hidden_TH, student_head_WH, teacher_hidden_TG, teacher_head_WG)
    shard = vocab_shard(student_head_WH.size(0), tp_group=tp_group, vocab_size=vocab_size)
    num_tokens, num_columns = student_hidden_TH.size(0), student_head_WH.size(0)
    dtype = compute_dtype(student_hidden_TH)
    scratch = Scratch()
    statistics_3T = student_hidden_TH.new_empty((3, num_tokens), dtype=dtype)
    with torch.no_grad(), _exact_products(student_hidden_TH):
        for rows in token_chunks(num_tokens, num_columns, student_hidden_TH.device, chunk_tokens):
            student = chunk_softmax("student", student_hidden_TH[rows], student_head_WH, shard, scaling, dtype, scratch)
            teacher = chunk_softmax("teacher", teacher_hidden_TG[rows], teacher_head_WG, shard, teacher_scaling, dtype, scratch)
            statistics_3T[:, rows] = torch.stack(chunk_statistics(student, teacher, shard))
    return TokenStatistics(*statistics_3T)


def _require_head(model: str, hidden_TH: torch.Tensor, head_WH: torch.Tensor) -> None:
    """Raise ValueError unless hidden states and head of one model fit together."""
    size = "H" if model == "student" else "G"
    hidden, head = f"{model}_hidden_T{size}", f"{model}_head_W{size}"
    if hidden_TH.dim() != 2 or head_WH.dim() != 2:
        raise ValueError(f"{hidden} and {head} must be matrices, not of shapes {tuple(hidden_TH.shape)} and {tuple(head_WH.shape)}")
    require_same("hidden sizes", hidden, hidden_TH.size(1), head, head_WH.size(1))
    require_same("dtypes", hidden, hidden_TH.dtype, head, head_WH.dtype)
    require_same("devices", hidden, hidden_TH.device, head, head_WH.device)
    if hidden_TH.dtype not in _DTYPES:
        # A token's weight is in the gradient before any loss scale is: in fp16 it would vanish.
        raise ValueError(f"{hidden} and {head} have dtype {hidden_TH.dtype}; use one of {', '.join(map(str, _DTYPES))}")


def _require_pair(student_hidden_TH: torch.Tensor, student_head_WH: torch.Tensor, teacher_hidden_TG: torch.Tensor, teacher_head_WG: torch.Tensor) -> None:
    """Raise ValueError unless two models given by hidden states and heads describe the same tokens and the same slice of the vocabulary."""
    _require_head("student", student_hidden_TH, student_head_WH)
    _require_head("teacher", teacher_hidden_TG, teacher_head_WG)
    require_same("token counts", "student_hidden_TH", student_hidden_TH.size(0), "teacher_hidden_TG", teacher_hidden_TG.size(0))
    require_same("vocabulary slices", "student_head_WH", student_head_WH.size(0), "teacher_head_WG", teacher_head_WG.size(0))
    require_same("devices", "student_hidden_TH", student_hidden_TH.device, "teacher_hidden_TG", teacher_hidden_TG.device)
