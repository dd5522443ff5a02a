"""One model's part of the rows of a chunk of units: its logits in the columns, the sums that all ranks need, and what these say of each row.

Shapes: n positions of this model in the chunk, N units, K shared pairs and E ends on this rank, W this rank's columns of the model's vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from opd_megatron.losses.vocab_parallel import ShardSoftmax, VocabShard


@dataclass(frozen=True)
class Positions:
    """Where the N units of a chunk are among its n positions: the first of each, the unit of each, the token there, and this rank's column of it if it has one.

    `alpha_N` is what the sum of a unit's scores is multiplied by; `has_column_N` marks units that are a column of their own.
    """

    first_N: torch.Tensor
    unit_n: torch.Tensor
    local_n: torch.Tensor
    owned_n: torch.Tensor
    alpha_N: torch.Tensor
    has_column_N: torch.Tensor


class Reduced(NamedTuple):
    """What the collectives give of one model: mass and picked logit of each position relative to its maximum; of each row the shared tokens' and ends' sums."""

    max_n: torch.Tensor
    mass_n: torch.Tensor
    picked_n: torch.Tensor
    shared_max_N: torch.Tensor
    shared_mass_N: torch.Tensor
    unmasked_mass_N: torch.Tensor
    eos_max_N: torch.Tensor
    eos_mass_N: torch.Tensor


class Columns(NamedTuple):
    """Logarithms of one model's rows, in the scale of its logits at the first position: shared tokens together, the unit, the ends, and all together."""

    shared_N: torch.Tensor
    unit_N: torch.Tensor
    eos_N: torch.Tensor
    all_N: torch.Tensor
    # Log-sum-exp of the whole vocabulary there, and the unit's column by Eq. 7, whatever the score: 0 where the row has none.
    whole_N: torch.Tensor
    unit_prob_N: torch.Tensor
    # The probability of the token that stands there.
    first_prob_N: torch.Tensor


@dataclass
class Side:
    """Logits of one model, which become exponentials, and copies of those in shared columns and ends at the units' first positions."""

    softmax: ShardSoftmax
    at: Positions
    columns_K: torch.Tensor
    eos_E: torch.Tensor
    shared_NK: torch.Tensor = field(init=False)
    eos_NE: torch.Tensor = field(init=False)
    # Before columns were taken out; None where none were.
    unmasked_NK: torch.Tensor | None = None
    exp_NK: torch.Tensor = field(init=False)
    picked_n: torch.Tensor = field(init=False)
    unmasked_mass_N: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        logits_nW, first_N = self.softmax.logp_TW, self.at.first_N
        first_NW = logits_nW.index_select(0, first_N) if len(first_N) < len(logits_nW) else logits_nW
        self.shared_NK, self.eos_NE = first_NW.index_select(1, self.columns_K), first_NW.index_select(1, self.eos_E)

    def mask_(self, absent_NK: torch.Tensor) -> None:
        """Take columns out of rows."""
        self.unmasked_NK = self.shared_NK
        self.shared_NK = self.shared_NK.masked_fill(absent_NK, _ABSENT)

    def is_first_token(self) -> torch.Tensor:
        """Return [N, K] where a shared column is the first token of a unit that has a column of its own."""
        at = self.at
        here_N = at.owned_n[at.first_N] & at.has_column_N
        return (at.local_n[at.first_N][:, None] == self.columns_K[None]) & here_N[:, None]

    def maxima(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return this rank's maxima of positions, and of each row's shared columns and ends."""
        return self.softmax.local_max(), _row_max(self.shared_NK), _row_max(self.eos_NE)

    def shift_(self, max_n: torch.Tensor, shared_max_N: torch.Tensor, eos_max_N: torch.Tensor) -> None:
        """Subtract the maxima over all ranks and exponentiate."""
        logits_nW, first_max_N = self.softmax.logp_TW, max_n[self.at.first_N]
        picked_n = logits_nW.gather(1, self.at.local_n[:, None]).squeeze(1) - max_n if logits_nW.size(1) else torch.zeros_like(max_n)
        self.picked_n = torch.where(self.at.owned_n, picked_n, 0)
        self.softmax.shift_(max_n)
        self.shared_NK.sub_(_finite(shared_max_N)[:, None])
        self.exp_NK = self.shared_NK.exp()
        self.eos_NE.sub_(_finite(eos_max_N)[:, None])
        # Relative to the whole vocabulary's maximum.
        if self.unmasked_NK is None:
            self.unmasked_mass_N = self.exp_NK.sum(-1) * (shared_max_N - first_max_N).exp()
        else:
            self.unmasked_mass_N = (self.unmasked_NK - first_max_N[:, None]).exp().sum(-1)

    def sums(self) -> list[torch.Tensor]:
        """Return this rank's parts of the sums of `Reduced`, in its order."""
        return [self.softmax.mass(), self.picked_n, self.exp_NK.sum(-1), self.unmasked_mass_N, self.eos_NE.exp().sum(-1)]

    def columns(self, sums: Reduced, *, score: Literal["mean_logprob", "raw_logit"], bridges_eos: bool) -> Columns:
        """Return the logarithms of the rows: replicated arithmetic in fp64, a few numbers a row."""
        first_N, has_column_N = self.at.first_N, self.at.has_column_N
        max_n, lse_n = sums.max_n.double(), sums.mass_n.double().log()
        whole_N, logp_n = (max_n + lse_n)[first_N], sums.picked_n.double() - lse_n
        logp_N = self._scored(logp_n)
        unit_N = logp_N + whole_N if score == "mean_logprob" else self._scored(sums.picked_n.double() + max_n)
        nothing_N = torch.full_like(whole_N, -math.inf)
        unit_N = torch.where(has_column_N, unit_N, nothing_N)
        eos_N = sums.eos_max_N.double() + sums.eos_mass_N.double().log() if bridges_eos else nothing_N
        shared_N = sums.shared_max_N.double() + sums.shared_mass_N.double().log()
        unit_prob_N = torch.where(has_column_N, logp_N, nothing_N).exp()
        return Columns(shared_N, unit_N, eos_N, torch.stack([shared_N, unit_N, eos_N]).logsumexp(0), whole_N, unit_prob_N, logp_n[first_N].exp())

    def _scored(self, value_n: torch.Tensor) -> torch.Tensor:
        """Return alpha times the sum over each unit's positions."""
        return self.at.alpha_N * torch.zeros_like(self.at.alpha_N).index_add_(0, self.at.unit_n, value_n)


def reduce_sides(ours: Side, theirs: Side, shard: VocabShard, kind: Literal["reverse_kl", "forward_kl"]) -> tuple[Reduced, Reduced, list[torch.Tensor]]:
    """Return both models' sums over all ranks, and those of the KL's cross term [N], the student's entropy moment [n] and owners of its tokens [n].

    One MAX and one SUM. The cross term is sum e^x (x - y) over shared columns, x of the distribution that comes first, each relative to its maximum.
    """
    maxima = _together(shard.max, [*ours.maxima(), *theirs.maxima()])
    ours.shift_(*maxima[:3])
    theirs.shift_(*maxima[3:])
    one, other = (ours, theirs) if kind == "reverse_kl" else (theirs, ours)
    cross_N = (one.exp_NK * (one.shared_NK - other.shared_NK)).sum(-1)
    extra = [cross_N, ours.softmax.entropy_moment(), ours.at.owned_n.to(cross_N.dtype)]
    own_sums, their_sums = ours.sums(), theirs.sums()
    sums = _together(shard.sum, [*own_sums, *their_sums, *extra])
    half = len(own_sums)
    return _reduced(maxima[:3], sums[:half]), _reduced(maxima[3:], sums[half : 2 * half]), sums[2 * half :]


# Stands for no column at all: its exponential is 0, and differences of it are.
_ABSENT = -1e30


def _reduced(maxima: list[torch.Tensor], sums: list[torch.Tensor]) -> Reduced:
    max_n, shared_max_N, eos_max_N = maxima
    mass_n, picked_n, shared_mass_N, unmasked_mass_N, eos_mass_N = sums
    # Maxima over nothing were not subtracted.
    return Reduced(max_n, mass_n, picked_n, _finite(shared_max_N), shared_mass_N, unmasked_mass_N, _finite(eos_max_N), eos_mass_N)


def _row_max(value_NK: torch.Tensor) -> torch.Tensor:
    return value_NK.amax(-1) if value_NK.size(1) else value_NK.new_full((len(value_NK),), -math.inf)


def _finite(max_N: torch.Tensor) -> torch.Tensor:
    return max_N.masked_fill(max_N == -math.inf, 0)


def _together(reduce: Callable[..., tuple[torch.Tensor, ...]], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Reduce vectors of different lengths in one collective."""
    return list(reduce(torch.cat(parts))[0].split([len(part) for part in parts]))
