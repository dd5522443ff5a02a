"""SimCT: the divergence of two models whose tokenizers differ, on units of text that both can write (arXiv 2605.07711, Eq. 6 to 9).

A unit is a stretch of text between two places where both tokenizations have a boundary. Its row compares the models before the unit: one column for each
token that both vocabularies have, and, where the unit itself is no such token, one column for the unit:

    c_M = log p_M(w | before)                          for a shared token w
    s_M = alpha_M sum_j log p_M(v_j | before, v_<j)    for the unit, v its tokens in M's own tokenization, alpha_M = 1 / k_M   (Eq. 7)
    q_M = softmax over the columns (Eq. 8)             loss = KL(q_S || q_T)   (Eq. 9)

With units of one shared token each, this is the KL of both models on the tokens that they share, renormalised.

The gradient of a row, with w = log q_S - log q_T and L its loss: g_c = q_S(c) (w_c - L) for reverse KL, q_S(c) - q_T(c) for forward KL. In the student's
logits it is g on the columns of shared tokens, and for the unit's own g_u, with p_j the softmax at its j-th position and delta the Kronecker delta:
g_u (delta_{j1} p_1 + alpha (onehot(v_j) - p_j)): every token of the unit gets some.

Shapes: T, U positions of student and teacher, n, u those of one chunk, N its units, K shared pairs on this rank, W, C rows of the heads on this rank,
H, G hidden sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from opd_megatron.align.rows import PairedShard, UnitRows
from opd_megatron.align.sides import Columns, Positions, Reduced, Side, reduce_sides
from opd_megatron.losses.chunk_objectives import ChunkLoss, chunk_softmax
from opd_megatron.losses.class_divergence import top_ids
from opd_megatron.losses.fused_head import FusedDivergence, fused_head
from opd_megatron.losses.logit_scaling import LogitScaling, logit_scalings
from opd_megatron.losses.vocab_parallel import ShardSoftmax, VocabShard, entropy, local_ids, picked_logp, require_same, token_chunks, vocab_shard


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How the rows are made; the defaults are the paper's. Released code and others differ where named.

    `score`: mean_logprob is Eq. 7; raw_logit takes logits in place of log-probabilities (released code), and is then not invariant to a constant added to
    all logits of a later position. `span_norm`: alpha of a unit is 1 / k of its own tokens, 1 (sum: equal text probabilities then compare equal), or
    1 / max of both. `mask_first_token` takes the first tokens of a unit with a column of its own out of its row, those of both models out of both rows: their
    mass would count twice. `gh_threshold` leaves out rows in which the teacher has less than 1 / threshold of its mass on all shared tokens, the unit
    and the ends; 0 keeps all.
    `top_k` looks at that many shared tokens of the row, those that the student finds likeliest; 0 looks at all.
    """

    kind: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    score: Literal["mean_logprob", "raw_logit"] = "mean_logprob"
    span_norm: Literal["own_k", "sum", "max_k"] = "own_k"
    mask_first_token: bool = False
    gh_threshold: float = 0.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("reverse_kl", "forward_kl"):
            raise ValueError(f"kind={self.kind!r} has no form for different tokenizers; use reverse_kl or forward_kl")
        if not (self.gh_threshold == 0 or 1 < self.gh_threshold < math.inf):
            raise ValueError(f"gh_threshold={self.gh_threshold} must be 0 for none, or more than 1: it is one over the teacher's mass on the columns")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 takes every shared token")
        if self.top_k == 1 or (self.top_k == 2 and self.mask_first_token):
            raise ValueError(f"top_k={self.top_k} leaves rows of one column, on which models cannot differ; use more, or 0 for every shared token")


def simct_divergence(
    student_hidden_TH: torch.Tensor,
    student_head_WH: torch.Tensor,
    teacher_hidden_UG: torch.Tensor,
    teacher_head_CG: torch.Tensor,
    rows: UnitRows,
    shard: PairedShard,
    *,
    scoring: Scoring | None = None,
    tp_group: dist.ProcessGroup | None = None,
    unit_weight_N: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    accumulate_main_grad: bool = False,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> FusedDivergence:
    """Return sum_n weight_n loss_n over the units, differentiable in the student's hidden states and head; per-row values stand at each unit's first position.

    `teacher_head_CG` has the rows of the teacher's head named by `shard.teacher_ids_C`. All ranks of the group hold the same hidden states and rows. As in
    `fused_head_divergence`, never a [T, V] tensor, the hidden states' gradient is this rank's part, and the head's is complete. Two collectives per chunk,
    one more with `top_k`, none in the backward. `observed` has, for each unit: `shared_mass`, the teacher's probability of all shared tokens together;
    `eos_mass`, at the ends of responses, that to end there; `covered`, 1 for a row with a loss. NaN at other positions.
    ValueError for arguments that disagree.
    """
    scaling, teacher_scaling = logit_scalings(temperature, student_softcap, teacher_softcap)
    scoring = scoring or Scoring()
    for name, count, positions in (("student", len(rows.student_ids_T), student_hidden_TH), ("teacher", len(rows.teacher_ids_U), teacher_hidden_UG)):
        require_same("positions", f"{name}_hidden", positions.size(0), f"rows.{name}_ids", count)
    require_same("rows", "teacher_head_CG", teacher_head_CG.size(0), "shard.teacher_ids_C", len(shard.teacher_ids_C))
    weight_N = rows.has_column_N.new_ones(len(rows), dtype=torch.float32) if unit_weight_N is None else unit_weight_N
    require_same("shapes", "unit_weight_N", tuple(weight_N.shape), "rows", (len(rows),))
    objective = AlignedObjective(teacher_hidden_UG.detach(), teacher_head_CG.detach(), rows, shard, scoring, teacher_scaling)
    own = vocab_shard(student_head_WH.size(0), tp_group=tp_group, vocab_size=shard.student_size)
    return fused_head(
        student_hidden_TH,
        student_head_WH,
        objective,
        own,
        weight_N.detach()[rows.unit_of_T],
        scaling,
        chunk_tokens,
        {"sampled_ids_T": rows.student_ids_T},
        accumulate_main_grad,
    )


class _Chunk(NamedTuple):
    """Some of the units: which, and their positions in both models."""

    units: slice
    teacher: slice


@dataclass(frozen=True)
class AlignedObjective:
    """A `ChunkObjective` whose rows are positions, unit after unit; a chunk holds whole units."""

    teacher_hidden_UG: torch.Tensor
    teacher_head_CG: torch.Tensor
    rows: UnitRows
    shard: PairedShard
    scoring: Scoring
    teacher_scaling: LogitScaling
    observes: tuple[str, ...] = ("shared_mass", "eos_mass", "covered")
    _chunks: dict[int, _Chunk] = field(default_factory=dict)

    def chunks(self, num_tokens: int, num_columns: int, device: torch.device, chunk_tokens: int | None) -> Iterable[slice]:
        """Return the student's positions of as many whole units as `token_chunks` would give a chunk, of either model; at least one unit."""
        size = next(iter(token_chunks(1 << 62, max(num_columns, self.shard.most_columns), device, chunk_tokens))).stop
        stops = (self.rows.student_stops.contiguous(), self.rows.teacher_stops.contiguous())
        first, position, teacher_position = 0, 0, 0
        while first < len(self.rows):
            fits = min(int(torch.searchsorted(stop_N, start + size, right=True)) for stop_N, start in zip(stops, (position, teacher_position)))
            last = max(fits, first + 1)
            stop, teacher_stop = (int(stop_N[last - 1]) for stop_N in stops)
            self._chunks[position] = _Chunk(slice(first, last), slice(teacher_position, teacher_stop))
            yield slice(position, stop)
            first, position, teacher_position = last, stop, teacher_stop

    def __call__(self, student: ShardSoftmax, rows: slice, shard: VocabShard, scale_N: torch.Tensor | None) -> ChunkLoss:
        chunk, dtype = self._chunks[rows.start], student.logp_TW.dtype
        their_shard, hidden_uG = VocabShard(0, self.teacher_head_CG.size(0), shard.tp_group), self.teacher_hidden_UG[chunk.teacher]
        teacher = chunk_softmax("teacher", hidden_uG, self.teacher_head_CG, their_shard, self.teacher_scaling, dtype, student.scratch)
        ours, theirs = self._student_side(student, chunk, rows, shard), self._teacher_side(teacher, chunk)
        self._mask_(ours, theirs, shard)
        sums, their_sums, (cross_N, moment_n, owners_n) = reduce_sides(ours, theirs, shard, self.scoring.kind)
        options: dict[str, Any] = {"score": self.scoring.score, "bridges_eos": self.shard.bridges_eos}
        ours_N, theirs_N = ours.columns(sums, **options), theirs.columns(their_sums, **options)
        value_N = self._value(sums, their_sums, cross_N, ours_N, theirs_N)
        shared_mass_N = their_sums.unmasked_mass_N.double() / their_sums.mass_n[theirs.at.first_N].double()
        eos_mass_N = (theirs_N.eos_N - theirs_N.whole_N).exp() if self.shard.bridges_eos else theirs_N.first_prob_N
        eos_mass_N = eos_mass_N.masked_fill(~self.rows.is_end_N[chunk.units], math.nan)
        kept_N = self._kept(shared_mass_N, theirs_N)
        grad_nW = None if scale_N is None else self._gradient(ours, theirs, sums, their_sums, ours_N, theirs_N, value_N, kept_N).mul_(scale_N[:, None])
        observed = tuple(_at(ours.at.first_N, told_N, student.logp_TW, math.nan) for told_N in (shared_mass_N, eos_mass_N, kept_N))
        loss_n = _at(ours.at.first_N, value_N.masked_fill(~kept_N, 0), student.logp_TW, 0.0)
        return ChunkLoss(loss_n, entropy(moment_n, sums.mass_n), picked_logp(sums.picked_n, owners_n, sums.mass_n), grad_nW, observed)

    def _student_side(self, softmax: ShardSoftmax, chunk: _Chunk, rows: slice, shard: VocabShard) -> Side:
        units = self.rows
        local_n, owned_n = local_ids(units.student_ids_T[rows], shard)
        at = self._positions(chunk, units.student_first_N, units.unit_of_T[rows], rows.start, units.student_lengths, local_n, owned_n)
        return Side(softmax, at, self.shard.student_columns_K, self.shard.student_eos_E)

    def _teacher_side(self, softmax: ShardSoftmax, chunk: _Chunk) -> Side:
        units, rows = self.rows, chunk.teacher
        column_n = self.shard.teacher_column_V[units.teacher_ids_U[rows]]
        at = self._positions(chunk, units.teacher_first_N, units.unit_of_U[rows], rows.start, units.teacher_lengths, column_n.clamp(min=0), column_n >= 0)
        # The teacher's rows on this rank begin with those of its pairs.
        return Side(softmax, at, torch.arange(self.shard.num_pairs, device=column_n.device), self.shard.teacher_eos_E)

    def _positions(
        self, chunk: _Chunk, first: torch.Tensor, unit_n: torch.Tensor, start: int, lengths: torch.Tensor, local_n: torch.Tensor, owned_n: torch.Tensor
    ) -> Positions:
        own_N = lengths[chunk.units].double()
        longer_N = torch.maximum(self.rows.student_lengths[chunk.units], self.rows.teacher_lengths[chunk.units]).double()
        alpha_N = {"own_k": 1 / own_N, "sum": torch.ones_like(own_N), "max_k": 1 / longer_N}[self.scoring.span_norm]
        first_N = first[chunk.units] - start
        return Positions(first_N, unit_n - chunk.units.start, local_n, owned_n, alpha_N.to(first_N.device), self.rows.has_column_N[chunk.units])

    def _mask_(self, ours: Side, theirs: Side, shard: VocabShard) -> None:
        """Take columns out of rows, the same of both models."""
        if not self.scoring.top_k and not self.scoring.mask_first_token:
            return
        absent_NK = torch.zeros_like(ours.shared_NK, dtype=torch.bool)
        if self.scoring.top_k:
            pairs = VocabShard(self.shard.first_pair, self.shard.num_pairs, shard.tp_group)
            ids_NK = top_ids(ours.shared_NK, self.scoring.top_k, pairs) - pairs.start
            row_N1 = torch.arange(len(ids_NK), device=ids_NK.device)[:, None].expand_as(ids_NK)
            here_NK = (ids_NK >= 0) & (ids_NK < pairs.width)
            absent_NK.fill_(True)[row_N1[here_NK], ids_NK[here_NK]] = False
        if self.scoring.mask_first_token:
            absent_NK |= ours.is_first_token() | theirs.is_first_token()
        ours.mask_(absent_NK)
        theirs.mask_(absent_NK)

    def _value(self, ours: Reduced, theirs: Reduced, cross_N: torch.Tensor, student_N: Columns, teacher_N: Columns) -> torch.Tensor:
        """Return the KL of every row from the means of log-differences under the distribution that comes first."""
        if self.scoring.kind == "reverse_kl":
            first, second, sums, other = student_N, teacher_N, ours, theirs
        else:
            first, second, sums, other = teacher_N, student_N, theirs, ours
        moved_N = sums.shared_max_N.double() - other.shared_max_N.double()
        scale_N = (sums.shared_max_N.double() - first.all_N).exp()
        mean_N = scale_N * (cross_N.double() + sums.shared_mass_N.double() * moved_N)
        for one_N, two_N in ((first.unit_N, second.unit_N), (first.eos_N, second.eos_N)):
            mean_N = mean_N + torch.where(one_N == -math.inf, 0, (one_N - first.all_N).exp() * (one_N - two_N))
        return mean_N - first.all_N + second.all_N

    def _kept(self, shared_mass_N: torch.Tensor, teacher_N: Columns) -> torch.Tensor:
        """Return which rows have a loss: those whose columns hold enough of the teacher's mass."""
        if not self.scoring.gh_threshold:
            return torch.ones_like(shared_mass_N, dtype=torch.bool)
        mass_N = shared_mass_N + teacher_N.unit_prob_N + (teacher_N.eos_N - teacher_N.whole_N).exp()
        return mass_N.clamp(max=1) * self.scoring.gh_threshold >= 1

    def _gradient(
        self, ours: Side, theirs: Side, sums: Reduced, other: Reduced, student_N: Columns, teacher_N: Columns, value_N: torch.Tensor, kept_N: torch.Tensor
    ) -> torch.Tensor:
        """Return dL/dz of the student's logits on this rank, in the storage of its exponentials: no collective."""
        dtype = ours.shared_NK.dtype
        scale_N = torch.where(kept_N, (sums.shared_max_N.double() - student_N.all_N).exp(), 0).to(dtype)
        if self.scoring.kind == "reverse_kl":
            offset_N = (sums.shared_max_N.double() - student_N.all_N) - (other.shared_max_N.double() - teacher_N.all_N) - value_N
            grad_NK = (ours.shared_NK - theirs.shared_NK).add_(offset_N.to(dtype)[:, None]).mul_(ours.exp_NK).mul_(scale_N[:, None])
        else:
            their_scale_N = torch.where(kept_N, (other.shared_max_N.double() - teacher_N.all_N).exp(), 0).to(dtype)
            grad_NK = (ours.exp_NK * scale_N[:, None]).addcmul_(theirs.exp_NK, their_scale_N[:, None], value=-1)
        unit_N, eos_N = (self._slope(one_N, two_N, student_N.all_N, teacher_N.all_N, value_N, kept_N) for one_N, two_N in zip(student_N[1:3], teacher_N[1:3]))
        return self._spread(ours, sums, grad_NK, unit_N, eos_N)

    def _slope(
        self, one_N: torch.Tensor, two_N: torch.Tensor, all_N: torch.Tensor, all_two_N: torch.Tensor, value_N: torch.Tensor, kept_N: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of the loss in one column of every row; 0 where the row has no such column."""
        prob_N, log_ratio_N = (one_N - all_N).exp(), (one_N - all_N) - (two_N - all_two_N)
        slope_N = prob_N * (log_ratio_N - value_N) if self.scoring.kind == "reverse_kl" else prob_N - (two_N - all_two_N).exp()
        return torch.where(kept_N & (one_N > -math.inf), slope_N, 0)

    def _spread(self, ours: Side, sums: Reduced, grad_NK: torch.Tensor, unit_N: torch.Tensor, eos_N: torch.Tensor) -> torch.Tensor:
        """Return the gradient in the logits from that in the columns."""
        dtype, prob_nW = grad_NK.dtype, ours.softmax.prob_TW
        each_n = (ours.at.alpha_N * unit_N)[ours.at.unit_n]
        dense_n = torch.zeros_like(each_n)
        if self.scoring.score == "mean_logprob":
            dense_n = -each_n
            dense_n[ours.at.first_N] += unit_N
        grad_nW = prob_nW.mul_((dense_n / sums.mass_n.double()).to(dtype)[:, None])
        if len(ours.at.first_N) == len(grad_nW):
            grad_nW.index_add_(1, ours.columns_K, grad_NK)
        else:
            grad_nW[ours.at.first_N] = grad_nW[ours.at.first_N].index_add_(1, ours.columns_K, grad_NK)
        if grad_nW.size(1):
            grad_nW.scatter_add_(1, ours.at.local_n[:, None], torch.where(ours.at.owned_n, each_n, 0).to(dtype)[:, None])
        if ours.eos_NE.size(1):
            grad_NE = ours.eos_NE.exp() * (eos_N / sums.eos_mass_N.double()).to(dtype)[:, None]
            grad_nW[ours.at.first_N[:, None], ours.eos_E[None]] += grad_NE
        return grad_nW


def _at(first_N: torch.Tensor, value_N: torch.Tensor, like_nW: torch.Tensor, elsewhere: float) -> torch.Tensor:
    """Return [n] with each unit's value at its first position."""
    value_n = like_nW.new_full((like_nW.size(0),), elsewhere)
    value_n[first_N] = value_N.to(value_n.dtype)
    return value_n
