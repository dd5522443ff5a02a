"""The divergence of every token from both models' logits, with the vocabulary split across tensor-parallel ranks.

Shapes: T tokens, W = this rank's slice of the vocabulary. Formulas: `full_divergence` and `class_divergence`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_megatron.losses.class_divergence import ALL_KINDS, SAMPLED_KINDS, TOP_K_KINDS, ClassChunk, ClassDivergence, cut_out_
from opd_megatron.losses.full_divergence import FULL_KINDS, ChunkDivergence, Divergence
from opd_megatron.losses.logit_scaling import require_temperature
from opd_megatron.losses.vocab_parallel import CHUNK_MIN_TOKENS, ShardSoftmax, VocabShard, compute_dtype, require_ids, require_same, token_chunks, vocab_shard


class _VocabParallelDivergence(torch.autograd.Function):
    """Two collectives per chunk in the forward, none in the backward.

    Saved: both models' logits as given and five numbers per token. The returned value is replicated, so every rank's gradient is the true one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_logits_TW: torch.Tensor,
        teacher_logits_TW: torch.Tensor,
        divergence: Divergence,
        shard: VocabShard,
        temperature: float,
        chunk_tokens: int | None,
    ) -> torch.Tensor:
        """Return the divergences [T] in nats, in the dtype of the arithmetic, the same on all ranks."""
        num_tokens, num_columns = student_logits_TW.shape
        saved_5T = student_logits_TW.new_empty((5, num_tokens), dtype=compute_dtype(student_logits_TW))
        divergence_T = torch.empty_like(saved_5T[0])
        for rows in token_chunks(num_tokens, num_columns, student_logits_TW.device, chunk_tokens):
            student = _chunk_softmax(student_logits_TW[rows], shard, temperature)
            teacher = _chunk_softmax(teacher_logits_TW[rows], shard, temperature)
            evaluated = divergence.evaluate_(student, teacher, shard)
            divergence_T[rows] = evaluated.chunk.value_T
            saved_5T[:, rows] = torch.stack([*evaluated.norms, evaluated.chunk.correction_T])
        ctx.save_for_backward(student_logits_TW, teacher_logits_TW, saved_5T)
        ctx.divergence, ctx.shard, ctx.temperature, ctx.chunk_tokens = divergence, shard, temperature, chunk_tokens
        return divergence_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient [T, W] of the student's logits, in their dtype, 0 on padding; both models' probabilities are made anew, chunk by chunk."""
        student_logits_TW, teacher_logits_TW, saved_5T = ctx.saved_tensors
        grad_TW = torch.zeros_like(student_logits_TW)
        num_tokens, num_columns = student_logits_TW.shape
        for rows in token_chunks(num_tokens, num_columns, student_logits_TW.device, ctx.chunk_tokens):
            student_max_T, teacher_max_T, student_mass_T, teacher_mass_T, correction_T = saved_5T[:, rows]
            student = _chunk_softmax(student_logits_TW[rows], ctx.shard, ctx.temperature)
            student.shift_(student_max_T)
            student.normalise_(student_mass_T)
            teacher = _chunk_softmax(teacher_logits_TW[rows], ctx.shard, ctx.temperature)
            teacher.shift_(teacher_max_T)
            teacher.normalise_(teacher_mass_T)
            # Slopes and probabilities are local to the slice and the correction is already a global sum: nothing is sent.
            chunk_TW = ctx.divergence.gradient(student, teacher, ChunkDivergence(correction_T, correction_T))
            grad_TW[rows, : ctx.shard.width] = chunk_TW.mul_((grad_T[rows] / ctx.temperature)[:, None])
        return grad_TW, None, None, None, None, None


class _ClassDivergence(torch.autograd.Function):
    """One all-gather per chunk in the forward, and one more where ids are chosen; none in the backward.

    Saved: the student's logits as given, and per token the picked ids, the gradient of their classes and two numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_logits_TW: torch.Tensor,
        teacher_logits_TW: torch.Tensor,
        divergence: ClassDivergence,
        shard: VocabShard,
        temperature: float,
        chunk_tokens: int | None,
        sampled_ids_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the divergences [T] in nats, in the dtype of the arithmetic, the same on all ranks."""
        chunks = []
        for rows in token_chunks(student_logits_TW.size(0), student_logits_TW.size(1), student_logits_TW.device, chunk_tokens):
            student = _chunk_softmax(student_logits_TW[rows], shard, temperature)
            teacher = _chunk_softmax(teacher_logits_TW[rows], shard, temperature)
            ids_NK = divergence.pick(student, teacher, shard, None if sampled_ids_T is None else sampled_ids_T[rows])
            chunks.append(divergence.evaluate_(student, teacher, ids_NK, shard)[0])
        ctx.save_for_backward(student_logits_TW, *(tensor for chunk in chunks for tensor in chunk))
        ctx.divergence, ctx.shard, ctx.temperature, ctx.chunk_tokens = divergence, shard, temperature, chunk_tokens
        return torch.cat([chunk.value_N for chunk in chunks]) if chunks else student_logits_TW.new_empty(0, dtype=compute_dtype(student_logits_TW))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient [T, W] of the student's logits, in their dtype, 0 on padding; only the student's rest is made anew, chunk by chunk."""
        student_logits_TW, *saved = ctx.saved_tensors
        grad_TW = torch.zeros_like(student_logits_TW)
        for index, rows in enumerate(token_chunks(student_logits_TW.size(0), student_logits_TW.size(1), student_logits_TW.device, ctx.chunk_tokens)):
            chunk = ClassChunk(*saved[index * len(ClassChunk._fields) : (index + 1) * len(ClassChunk._fields)])
            student = _chunk_softmax(student_logits_TW[rows], ctx.shard, ctx.temperature)
            cut_out_(student, chunk.ids_NK, ctx.shard)
            student.shift_(chunk.own_max_N)
            grad_NW = ctx.divergence.gradient(student.prob_TW, chunk, ctx.shard)
            grad_TW[rows, : ctx.shard.width] = grad_NW.mul_((grad_T[rows] / ctx.temperature)[:, None])
        return grad_TW, *(None,) * 6


def _chunk_softmax(logits_TW: torch.Tensor, shard: VocabShard, temperature: float) -> ShardSoftmax:
    """Return the softmax, not started, of the real columns of some rows: on a copy, in the arithmetic's dtype."""
    return ShardSoftmax(logits_TW[:, : shard.width].to(compute_dtype(logits_TW), copy=True).div_(temperature))


def make_divergence(
    *,
    kind: str,
    beta: float,
    alpha: float | None,
    top_k: int | None,
    support: str | None,
    pointwise_clip: float | None,
    sampled_ids_T: torch.Tensor | None,
) -> Divergence | ClassDivergence:
    """Return the divergence of any kind; ValueError for an unknown one, an option that does not belong to it, or sampled ids that it needs and lacks."""
    if kind not in ALL_KINDS:
        raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(ALL_KINDS)}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must be in [0, 1]")
    if kind in FULL_KINDS:
        for name, value in (("top_k", top_k), ("support", support)):
            if value is not None:
                raise ValueError(f"{name}={value!r} belongs to {', '.join(TOP_K_KINDS)}, not to kind={kind!r}")
        return Divergence(kind=kind, beta=beta, alpha=alpha, pointwise_clip=pointwise_clip)
    if alpha is not None:
        raise ValueError(f"alpha={alpha} belongs to skew_forward and skew_reverse, not to kind={kind!r}")
    divergence = ClassDivergence(kind=kind, top_k=top_k, support=support, pointwise_clip=pointwise_clip)
    if kind in SAMPLED_KINDS and sampled_ids_T is None:
        raise ValueError(f"kind={kind!r} compares the tokens that were sampled; pass their ids as sampled_ids_T, got None")
    return divergence


def vocab_parallel_divergence(
    student_logits_TW: torch.Tensor,
    teacher_logits_TW: torch.Tensor,
    *,
    kind: str,
    tp_group: dist.ProcessGroup | None = None,
    beta: float = 0.5,
    alpha: float | None = None,
    top_k: int | None = None,
    support: str | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    pointwise_clip: float | None = None,
    shard_start: int | None = None,
    sampled_ids_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the divergence of every token in nats, [T], in fp32; differentiable once, in the student's logits.

    The logits are [T, W]: this rank's slice of the vocabulary, or all of it with `tp_group=None`. Ids from `vocab_size` on are padding:
    masked in both models, with a gradient of exactly 0. `kind` and its options are those of `Divergence` (`beta`, `alpha`) and `ClassDivergence`
    (`top_k`, `support`, and `sampled_ids_T` for k1 and k3, NaN for an id outside the vocabulary); `pointwise_clip` is for all but k1 and k3.
    `temperature` divides both models' logits, and no factor of its square is applied. The result is the same on all ranks of the group,
    each of which must run the backward on it. A row that is fully masked in either model has divergence 0 and gradient 0.
    Shards of uneven width need `shard_start`, the global id of the first column, on every rank.
    Raises ValueError for arguments that disagree, an unknown kind, an option outside its range or of another kind, or a temperature that is
    not positive.
    """
    divergence = make_divergence(kind=kind, beta=beta, alpha=alpha, top_k=top_k, support=support, pointwise_clip=pointwise_clip, sampled_ids_T=sampled_ids_T)
    if sampled_ids_T is not None and kind not in SAMPLED_KINDS:
        raise ValueError(f"sampled_ids_T belongs to {' and '.join(SAMPLED_KINDS)}, not to kind={kind!r}")
    require_temperature(temperature)
    for what, student, teacher in (
        ("shapes", tuple(student_logits_TW.shape), tuple(teacher_logits_TW.shape)),
        ("dtypes", student_logits_TW.dtype, teacher_logits_TW.dtype),
        ("devices", student_logits_TW.device, teacher_logits_TW.device),
    ):
        require_same(what, "student_logits_TW", student, "teacher_logits_TW", teacher)
    if student_logits_TW.dim() != 2:
        raise ValueError(f"student_logits_TW must be [tokens, columns], not of shape {tuple(student_logits_TW.shape)}")
    if sampled_ids_T is not None:
        require_ids("sampled_ids_T", sampled_ids_T, "student_logits_TW", student_logits_TW)
    if teacher_logits_TW.is_inference():
        # Such tensors cannot be kept for a backward.
        teacher_logits_TW = teacher_logits_TW.clone()
    shard = vocab_shard(student_logits_TW.size(1), tp_group=tp_group, vocab_size=vocab_size, start=shard_start)
    # All ranks must cut the tokens alike, so a chunk may follow from W only where W is the same everywhere.
    chunk_tokens = None if shard_start is None else CHUNK_MIN_TOKENS
    if isinstance(divergence, ClassDivergence):
        return _ClassDivergence.apply(student_logits_TW, teacher_logits_TW, divergence, shard, temperature, chunk_tokens, sampled_ids_T)
    return _VocabParallelDivergence.apply(student_logits_TW, teacher_logits_TW, divergence, shard, temperature, chunk_tokens)
