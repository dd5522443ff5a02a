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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from opd_megatron.align.rows import PairedShard, UnitRows
from opd_megatron.losses.chunk_objectives import ChunkLoss, chunk_softmax
from opd_megatron.losses.class_divergence import top_ids
from opd_megatron.losses.divergences import require_temperature
from opd_megatron.losses.fused_head import FusedDivergence, fused_head
from opd_megatron.losses.vocab_parallel import ShardSoftmax, VocabShard, entropy, picked_logp, require_same, token_chunks, vocab_shard

# Stands for no column at all: its exponential is 0, and differences of it are.
_ABSENT = -1e30


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How the rows are made; the defaults are the paper's. Released code and others differ where named.

    `score`: mean_logprob is Eq. 7; raw_logit takes logits in place of log-probabilities (released code), and is then not invariant to a constant added to
    all logits of a later position. `span_norm`: alpha of a unit is 1 / k of its own tokens, 1 (sum: equal text probabilities then compare equal), or
    1 / max of both. `mask_first_token` takes the first tokens of a unit with a column of its own out of its row, those of both models out of both rows: their
    mass would count twice. `gh_threshold` leaves out rows in which the teacher has less than 1 / threshold of its mass on the columns; 0 keeps all.
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
        if not (self.gh_threshold == 0 or 1 <= self.gh_threshold < math.inf):
            raise ValueError(f"gh_threshold={self.gh_threshold} must be 0 for none, or at least 1: it is one over the teacher's mass on the columns")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 takes every shared token")


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
) -> FusedDivergence:
    """Return sum_n weight_n loss_n over the units, differentiable in the student's hidden states and head; per-row values stand at each unit's first position.

    `teacher_head_CG` has the rows of the teacher's head named by `shard.teacher_ids_C`. All ranks of the group hold the same hidden states and rows. As in
    `fused_head_divergence`, never a [T, V] tensor, the hidden states' gradient is this rank's part, and the head's is complete. Two collectives per chunk,
    one more with `top_k`, none in the backward. `observed` has, for each unit: `shared_mass`, the teacher's probability of all shared tokens together;
    `eos_mass`, at the ends of responses, that to end there; `covered`, 1 for a row with a loss. NaN at other positions.
    ValueError for arguments that disagree.
    """
    require_temperature(temperature)
    scoring = scoring or Scoring()
    for name, count, positions in (("student", len(rows.student_ids_T), student_hidden_TH), ("teacher", len(rows.teacher_ids_U), teacher_hidden_UG)):
        require_same("positions", f"{name}_hidden", positions.size(0), f"rows.{name}_ids", count)
    require_same("rows", "teacher_head_CG", teacher_head_CG.size(0), "shard.teacher_ids_C", len(shard.teacher_ids_C))
    weight_N = rows.has_column_N.new_ones(len(rows), dtype=torch.float32) if unit_weight_N is None else unit_weight_N
    require_same("shapes", "unit_weight_N", tuple(weight_N.shape), "rows", (len(rows),))
    objective = AlignedObjective(teacher_hidden_UG.detach(), teacher_head_CG.detach(), rows, shard, scoring, temperature)
    own = vocab_shard(student_head_WH.size(0), tp_group=tp_group, vocab_size=shard.student_size)
    return fused_head(
        student_hidden_TH,
        student_head_WH,
        objective,
        own,
        weight_N.detach()[rows.unit_of_T],
        temperature,
        chunk_tokens,
        {"sampled_ids_T": rows.student_ids_T},
        accumulate_main_grad,
    )


class _Chunk(NamedTuple):
    """Some of the units: which, and their positions in both models."""

    units: slice
    teacher: slice


class _Reduced(NamedTuple):
    """What the collectives give of one model: mass and picked logit of each position relative to its maximum; of each row the shared tokens' and EOS' sums."""

    max_n: torch.Tensor
    mass_n: torch.Tensor
    picked_n: torch.Tensor
    shared_max_N: torch.Tensor
    shared_mass_N: torch.Tensor
    unmasked_mass_N: torch.Tensor
    eos_max_N: torch.Tensor
    eos_mass_N: torch.Tensor


class _Columns(NamedTuple):
    """Logarithms of one model's rows, in the scale of its raw logits at the first position: shared tokens together, the unit, EOS, and all together."""

    shared_N: torch.Tensor
    unit_N: torch.Tensor
    eos_N: torch.Tensor
    all_N: torch.Tensor
    # Log-sum-exp of the whole vocabulary at the first position, and the unit's column by Eq. 7, whatever the score: 0 where the row has none.
    whole_N: torch.Tensor
    unit_prob_N: torch.Tensor
    # The probability of the token that stands there.
    first_prob_N: torch.Tensor


@dataclass(frozen=True)
class AlignedObjective:
    """A `ChunkObjective` whose rows are positions, unit after unit; a chunk holds whole units."""

    teacher_hidden_UG: torch.Tensor
    teacher_head_CG: torch.Tensor
    rows: UnitRows
    shard: PairedShard
    scoring: Scoring
    temperature: float
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
        chunk = self._chunks[rows.start]
        teacher_shard = VocabShard(0, self.teacher_head_CG.size(0), shard.tp_group)
        dtype, scratch = student.logp_TW.dtype, student.scratch
        teacher = chunk_softmax("teacher", self.teacher_hidden_UG[chunk.teacher], self.teacher_head_CG, teacher_shard, self.temperature, dtype, scratch)
        ours, theirs = self._side("student", student, chunk, rows.start, shard), self._side("teacher", teacher, chunk, chunk.teacher.start, teacher_shard)
        self._mask_(ours, theirs, chunk, shard)
        student_sums, teacher_sums, cross_N, moment_n, owners_n = self._reduce(ours, theirs, shard)
        ours_N, theirs_N = self._columns(ours, student_sums), self._columns(theirs, teacher_sums)
        value_N = self._value(student_sums, teacher_sums, cross_N, ours_N, theirs_N)
        shared_mass_N = teacher_sums.unmasked_mass_N.double() / teacher_sums.mass_n[theirs.first_N].double()
        eos_mass_N = (theirs_N.eos_N - theirs_N.whole_N).exp() if self.shard.bridges_eos else theirs_N.first_prob_N
        eos_mass_N = eos_mass_N.masked_fill(~self.rows.is_end_N[chunk.units], math.nan)
        kept_N = self._kept(shared_mass_N, theirs_N)
        grad_nW = (
            None if scale_N is None else self._gradient(ours, theirs, student_sums, teacher_sums, ours_N, theirs_N, value_N, kept_N).mul_(scale_N[:, None])
        )
        value_N = value_N.masked_fill(~kept_N, 0)
        observed = tuple(_at(ours.first_N, told_N, student.logp_TW, math.nan) for told_N in (shared_mass_N, eos_mass_N, kept_N))
        logp_n = picked_logp(student_sums.picked_n, owners_n, student_sums.mass_n)
        return ChunkLoss(_at(ours.first_N, value_N, student.logp_TW, 0.0), entropy(moment_n, student_sums.mass_n), logp_n, grad_nW, observed)

    def _side(self, model: Literal["student", "teacher"], softmax: ShardSoftmax, chunk: _Chunk, start: int, shard: VocabShard) -> _Side:
        rows, pairs = self.rows, self.shard
        if model == "student":
            first, unit, ids, lengths = rows.student_first_N, rows.unit_of_T, rows.student_ids_T, rows.student_lengths
            columns, eos = pairs.student_columns_K, pairs.student_eos_E
        else:
            first, unit, ids, lengths = rows.teacher_first_N, rows.unit_of_U, rows.teacher_ids_U, rows.teacher_lengths
            columns, eos = torch.arange(pairs.num_pairs, device=first.device), pairs.teacher_eos_E
        size = softmax.logp_TW.size(0)
        first_N, ids_n = first[chunk.units] - start, ids[start : start + size]
        if model == "student":
            local_n, owned_n = ids_n - shard.start, (ids_n >= shard.start) & (ids_n < shard.start + shard.width)
        else:
            local_n = pairs.teacher_column_V[ids_n]
            owned_n = local_n >= 0
        shared_NK = softmax.logp_TW.index_select(0, first_N) if len(first_N) < size else softmax.logp_TW
        shared_NK = shared_NK.index_select(1, columns)
        lengths_2N = torch.stack([rows.student_lengths[chunk.units], rows.teacher_lengths[chunk.units]])
        own_N, longer_N = lengths[chunk.units].double(), lengths_2N.amax(0).double()
        alpha_N = {"own_k": 1 / own_N, "sum": torch.ones_like(own_N), "max_k": 1 / longer_N}[self.scoring.span_norm]
        return _Side(
            softmax=softmax,
            first_N=first_N,
            unit_n=unit[start : start + size] - chunk.units.start,
            local_n=local_n.clamp(min=0, max=max(shard.width - 1, 0)),
            owned_n=owned_n,
            alpha_N=alpha_N.to(first_N.device),
            has_column_N=rows.has_column_N[chunk.units],
            columns_K=columns,
            eos_E=eos,
            shared_NK=shared_NK,
            eos_NE=softmax.logp_TW.index_select(0, first_N).index_select(1, eos) if len(eos) else softmax.logp_TW.new_zeros(len(first_N), 0),
            unmasked_NK=None,
        )

    def _mask_(self, ours: _Side, theirs: _Side, chunk: _Chunk, shard: VocabShard) -> None:
        """Take columns out of rows, the same of both models."""
        if not self.scoring.top_k and not self.scoring.mask_first_token:
            return
        absent_NK = torch.zeros_like(ours.shared_NK, dtype=torch.bool)
        if self.scoring.top_k:
            pairs = VocabShard(self.shard.first_pair, self.shard.num_pairs, shard.tp_group)
            ids_NK = top_ids(ours.shared_NK, self.scoring.top_k, pairs) - pairs.start
            absent_NK.fill_(True)
            row_N1 = torch.arange(len(ids_NK), device=ids_NK.device)[:, None].expand_as(ids_NK)
            here_NK = (ids_NK >= 0) & (ids_NK < pairs.width)
            absent_NK[row_N1[here_NK], ids_NK[here_NK]] = False
        if self.scoring.mask_first_token:
            for side in (ours, theirs):
                # Which pair's column the first token is, if this rank has it.
                here_N = side.owned_n[side.first_N] & side.has_column_N
                is_first_NK = side.local_n[side.first_N][:, None] == side.columns_K[None]
                absent_NK |= is_first_NK & here_N[:, None]
        for side in (ours, theirs):
            side.unmasked_NK = side.shared_NK
            side.shared_NK = side.shared_NK.masked_fill(absent_NK, _ABSENT)

    def _reduce(self, ours: _Side, theirs: _Side, shard: VocabShard) -> tuple[_Reduced, _Reduced, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return both models' sums over all ranks, the KL's cross term, and the moment of the student's entropy: one MAX and one SUM."""
        parts = [part for side in (ours, theirs) for part in side.maxima()]
        maxima = _together(shard.max, parts)
        own_maxima, their_maxima = maxima[:3], maxima[3:]
        ours.shift_(*own_maxima)
        theirs.shift_(*their_maxima)
        to, weights = (theirs, ours) if self.scoring.kind == "reverse_kl" else (ours, theirs)
        difference_NK = torch.sub(weights.shared_NK, to.shared_NK)
        cross_N = (weights.exp_NK * difference_NK).sum(-1)
        sums = _together(shard.sum, [*ours.sums(), *theirs.sums(), cross_N, ours.softmax.entropy_moment(), ours.owned_n.to(cross_N.dtype)])
        *both, cross_N, moment_n, owners_n = sums
        half = len(both) // 2
        return _reduced(own_maxima, both[:half]), _reduced(their_maxima, both[half:]), cross_N, moment_n, owners_n

    def _columns(self, side: _Side, sums: _Reduced) -> _Columns:
        """Return the logarithms of one model's columns: replicated arithmetic in fp64, a few numbers a row."""
        max_n, lse_n = sums.max_n.double(), sums.mass_n.double().log()
        whole_N = (max_n + lse_n)[side.first_N]
        logp_n = sums.picked_n.double() - lse_n
        logp_N = side.scored(logp_n)
        unit_N = logp_N + whole_N if self.scoring.score == "mean_logprob" else side.scored(sums.picked_n.double() + max_n)
        nothing_N = torch.full_like(whole_N, -math.inf)
        unit_N = torch.where(side.has_column_N, unit_N, nothing_N)
        unit_prob_N = torch.where(side.has_column_N, logp_N, nothing_N).exp()
        eos_N = sums.eos_max_N.double() + sums.eos_mass_N.double().log() if self.shard.bridges_eos else nothing_N
        shared_N = sums.shared_max_N.double() + sums.shared_mass_N.double().log()
        return _Columns(shared_N, unit_N, eos_N, torch.stack([shared_N, unit_N, eos_N]).logsumexp(0), whole_N, unit_prob_N, logp_n[side.first_N].exp())

    def _value(self, ours: _Reduced, theirs: _Reduced, cross_N: torch.Tensor, student_N: _Columns, teacher_N: _Columns) -> torch.Tensor:
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

    def _kept(self, shared_mass_N: torch.Tensor, teacher_N: _Columns) -> torch.Tensor:
        """Return which rows have a loss: those whose columns hold enough of the teacher's mass."""
        if not self.scoring.gh_threshold:
            return torch.ones_like(shared_mass_N, dtype=torch.bool)
        mass_N = shared_mass_N + teacher_N.unit_prob_N + (teacher_N.eos_N - teacher_N.whole_N).exp()
        return mass_N.clamp(max=1) * self.scoring.gh_threshold >= 1

    def _gradient(
        self, ours: _Side, theirs: _Side, sums: _Reduced, other: _Reduced, student_N: _Columns, teacher_N: _Columns, value_N: torch.Tensor, kept_N: torch.Tensor
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

    def _spread(self, ours: _Side, sums: _Reduced, grad_NK: torch.Tensor, unit_N: torch.Tensor, eos_N: torch.Tensor) -> torch.Tensor:
        """Return the gradient in the logits from that in the columns."""
        dtype, prob_nW = grad_NK.dtype, ours.softmax.prob_TW
        each_n = (ours.alpha_N * unit_N)[ours.unit_n]
        dense_n = torch.zeros_like(each_n)
        if self.scoring.score == "mean_logprob":
            dense_n = -each_n
            dense_n[ours.first_N] += unit_N
        grad_nW = prob_nW.mul_((dense_n / sums.mass_n.double()).to(dtype)[:, None])
        if len(ours.first_N) == len(grad_nW):
            grad_nW.index_add_(1, ours.columns_K, grad_NK)
        else:
            grad_nW[ours.first_N] = grad_nW[ours.first_N].index_add_(1, ours.columns_K, grad_NK)
        if grad_nW.size(1):
            grad_nW.scatter_add_(1, ours.local_n[:, None], torch.where(ours.owned_n, each_n, 0).to(dtype)[:, None])
        if ours.eos_NE.size(1):
            grad_NE = ours.eos_NE.exp() * (eos_N / sums.eos_mass_N.double()).to(dtype)[:, None]
            grad_nW[ours.first_N[:, None], ours.eos_E[None]] += grad_NE
        return grad_nW


@dataclass
class _Side:
    """One model in one chunk, on this rank: its logits, which become exponentials, and copies of those in shared columns at the units' first positions."""

    softmax: ShardSoftmax
    first_N: torch.Tensor
    unit_n: torch.Tensor
    local_n: torch.Tensor
    owned_n: torch.Tensor
    alpha_N: torch.Tensor
    has_column_N: torch.Tensor
    columns_K: torch.Tensor
    eos_E: torch.Tensor
    shared_NK: torch.Tensor
    eos_NE: torch.Tensor
    # Before columns were taken out; None where none were.
    unmasked_NK: torch.Tensor | None
    exp_NK: torch.Tensor = field(init=False)
    picked_n: torch.Tensor = field(init=False)
    unmasked_mass_N: torch.Tensor = field(init=False)

    def maxima(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.softmax.local_max(), _row_max(self.shared_NK), _row_max(self.eos_NE)

    def shift_(self, max_n: torch.Tensor, shared_max_N: torch.Tensor, eos_max_N: torch.Tensor) -> None:
        """Subtract the maxima over all ranks and exponentiate."""
        logits_nW = self.softmax.logp_TW
        picked_n = logits_nW.gather(1, self.local_n[:, None]).squeeze(1) - max_n if logits_nW.size(1) else torch.zeros_like(max_n)
        self.picked_n = torch.where(self.owned_n, picked_n, 0)
        self.unmasked_mass_N = torch.empty(0)
        if self.unmasked_NK is not None:
            self.unmasked_mass_N = (self.unmasked_NK - max_n[self.first_N][:, None]).exp().sum(-1)
        self.softmax.shift_(max_n)
        self.shared_NK.sub_(_finite(shared_max_N)[:, None])
        self.exp_NK = self.shared_NK.exp()
        self.eos_NE.sub_(_finite(eos_max_N)[:, None])
        if self.unmasked_NK is None:
            # Relative to the whole vocabulary's maximum.
            self.unmasked_mass_N = self.exp_NK.sum(-1) * (shared_max_N - max_n[self.first_N]).exp()

    def scored(self, value_n: torch.Tensor) -> torch.Tensor:
        """Return alpha times the sum over each unit's positions."""
        return self.alpha_N * torch.zeros_like(self.alpha_N).index_add_(0, self.unit_n, value_n)

    def sums(self) -> list[torch.Tensor]:
        return [self.softmax.mass(), self.picked_n, self.exp_NK.sum(-1), self.unmasked_mass_N, self.eos_NE.exp().sum(-1)]


def _reduced(maxima: list[torch.Tensor], sums: list[torch.Tensor]) -> _Reduced:
    max_n, shared_max_N, eos_max_N = maxima
    mass_n, picked_n, shared_mass_N, unmasked_mass_N, eos_mass_N = sums
    # Maxima over nothing were not subtracted.
    return _Reduced(max_n, mass_n, picked_n, _finite(shared_max_N), shared_mass_N, unmasked_mass_N, _finite(eos_max_N), eos_mass_N)


def _row_max(value_NK: torch.Tensor) -> torch.Tensor:
    return value_NK.amax(-1) if value_NK.size(1) else value_NK.new_full((len(value_NK),), -math.inf)


def _finite(max_N: torch.Tensor) -> torch.Tensor:
    return max_N.masked_fill(max_N == -math.inf, 0)


def _together(reduce: Callable[..., tuple[torch.Tensor, ...]], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Reduce vectors of different lengths in one collective."""
    return list(reduce(torch.cat(parts))[0].split([len(part) for part in parts]))


def _at(first_N: torch.Tensor, value_N: torch.Tensor, like_nW: torch.Tensor, elsewhere: float) -> torch.Tensor:
    """Return [n] with each unit's value at its first position."""
    value_n = like_nW.new_full((like_nW.size(0),), elsewhere)
    value_n[first_N] = value_N.to(value_n.dtype)
    return value_n
