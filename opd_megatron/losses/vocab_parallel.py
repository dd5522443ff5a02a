"""One chunk of tokens over a vocabulary split across tensor-parallel ranks: which columns are real, the collectives, the softmax.

Shapes: T tokens (of one chunk or of all), V vocabulary, W = this rank's slice of V.
Every value named `*_T` that comes out of `VocabShard.max` or `VocabShard.sum` is bit-identical on all ranks of the group.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Size of one fp32 [chunk, W] tensor, of which about five live at once. On CPU a chunk that stays near the caches is faster than a large one.
# A chunk also reads both heads and updates the head's gradient once, which few rows do not pay for: an accelerator wants about a thousand.
CHUNK_BYTES = {"cpu": 16 << 20, "accelerator": 512 << 20}
CHUNK_MIN_TOKENS = 128


@dataclass(frozen=True)
class VocabShard:
    """The real columns of this rank: local columns [0, width) are the global ids [start, start + width); the rest is padding."""

    start: int
    width: int
    tp_group: dist.ProcessGroup | None

    def max(self, *values_T: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the maximum over the ranks of each value, in one collective. It only shifts exponents, so no gradient passes through it."""
        return self._all_reduce(values_T, dist.ReduceOp.MAX, values_T[0].dtype)

    def sum(self, *values_T: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the sum over the ranks of each value, in one collective. The losses write their backward by hand, so it has none of its own.

        Added in fp64: a ring adds each stretch of its buffer in another order of the ranks, and in fp32 equal summands at two places of the
        buffer would get unequal sums. A model would then diverge from itself.
        """
        return self._all_reduce(values_T, dist.ReduceOp.SUM, torch.float64)

    def gather(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return each value of every rank, with a first dimension of R ranks, in one collective. The values have one shape and dtype."""
        packed = torch.stack(values)
        if self.tp_group is None or self.tp_group.size() == 1:
            return packed[:, None].unbind()
        parts = [torch.empty_like(packed) for _ in range(self.tp_group.size())]
        dist.all_gather(parts, packed, group=self.tp_group)
        return torch.stack(parts, 1).unbind()

    def _all_reduce(self, values_T: tuple[torch.Tensor, ...], operation: dist.ReduceOp.RedOpType, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        if self.tp_group is None or self.tp_group.size() == 1:
            return values_T
        packed = torch.stack(values_T).to(dtype)
        dist.all_reduce(packed, op=operation, group=self.tp_group)
        return packed.to(values_T[0].dtype).unbind()


def vocab_shard(num_columns: int, *, tp_group: dist.ProcessGroup | None, vocab_size: int | None, start: int | None = None) -> VocabShard:
    """Return which of this rank's `num_columns` columns are real ids; ids from `vocab_size` on are padding.

    Without `start` every rank is taken to hold the same number of columns, as Megatron's padding guarantees; with it, the ranks tell each other theirs.
    Raises ValueError when `vocab_size` is below 1 or larger than all shards together, or when the shards do not follow each other, on every rank.
    """
    rank, num_ranks = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
    if vocab_size is not None:
        require_count("vocab_size", vocab_size)
    total = num_ranks * num_columns if start is None else _end_of_shards(start, num_columns, tp_group)
    start = rank * num_columns if start is None else start
    if vocab_size is not None and vocab_size > total:
        shards = f"{num_ranks} x {num_columns} = {total} columns" if total == num_ranks * num_columns else f"{total} columns"
        raise ValueError(
            f"vocab_size={vocab_size} is larger than all shards together: {shards}; "
            "pass the true vocabulary size of the head, or shard_start where the shards are uneven"
        )
    width = num_columns if vocab_size is None else min(max(vocab_size - start, 0), num_columns)
    return VocabShard(start, width, tp_group)


def _end_of_shards(start: int, num_columns: int, tp_group: dist.ProcessGroup | None) -> int:
    """Return the columns of all ranks together; ValueError, on every rank, unless each rank's begin where those of the rank before end."""
    spans = [(start, num_columns)]
    if tp_group is not None and tp_group.size() > 1:
        spans = [(0, 0)] * tp_group.size()
        dist.all_gather_object(spans, (start, num_columns), group=tp_group)
    end = 0
    for rank, (first, count) in enumerate(spans):
        if first != end:
            raise ValueError(f"shard_start={first} on rank {rank} of the group must be {end}, where the shards before it end")
        end += count
    return end


def token_chunks(num_tokens: int, num_columns: int, device: torch.device, chunk_tokens: int | None = None) -> Iterator[slice]:
    """Yield row slices of `chunk_tokens`, by default as many rows as fit CHUNK_BYTES. All ranks of a group must cut alike: same T, same W."""
    if chunk_tokens is None:
        budget = CHUNK_BYTES["cpu" if device.type == "cpu" else "accelerator"]
        chunk_tokens = max(CHUNK_MIN_TOKENS, budget // (4 * max(num_columns, 1)))
    require_count("chunk_tokens", chunk_tokens)
    return (slice(first, min(first + chunk_tokens, num_tokens)) for first in range(0, num_tokens, chunk_tokens))


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of the softmax arithmetic: fp32, or fp64 for an fp64 input."""
    return torch.promote_types(tensor.dtype, torch.float32)


class Scratch:
    """Memory by name, for tensors of one size that every chunk of a call needs again.

    A fresh tensor of tens of MiB costs several times the arithmetic on it where the allocator maps its pages anew each time, as glibc does.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return [rows, columns] of uninitialised memory, the same as the last time under this name if it is large enough."""
        held = self._tensors.get(name)
        if held is None or held.size(0) < rows or held.size(1) != columns:
            held = self._tensors[name] = torch.empty(rows, columns, dtype=dtype, device=device)
        return held[:rows]

    def like(self, name: str, tensor_TW: torch.Tensor) -> torch.Tensor:
        """Return memory of a tensor's size."""
        return self.take(name, tensor_TW.size(0), tensor_TW.size(1), tensor_TW.dtype, tensor_TW.device)


class ShardSoftmax:
    """Softmax of one chunk of one model, in place: `local_max`, `shift_`, `mass`, `normalise_`, with a collective of the caller's between the steps.

    `logp_TW` holds raw logits, then logits minus the row maximum, then log-probabilities; `prob_TW` holds exponentials, then probabilities.
    The maximum and the logarithm of the mass are subtracted one after the other: adding a small logarithm to a large maximum would round it away.
    """

    def __init__(self, logits_TW: torch.Tensor, scratch: Scratch | None = None, name: str = "", damping_TW: torch.Tensor | None = None) -> None:
        """Take over `logits_TW`, which is overwritten. Softmaxes that live at once share a `scratch` under different names.

        `damping_TW` is what a gradient in capped logits is multiplied by on its way to the LM head's product; None where nothing is.
        """
        self.logp_TW = logits_TW
        self.prob_TW = logits_TW
        self.damping_TW = damping_TW
        self.scratch = scratch or Scratch()
        self._name = name

    def local_max(self) -> torch.Tensor:
        """Return the row maxima of this rank's columns; -inf where it has none."""
        if self.logp_TW.size(1) == 0:
            return self.logp_TW.new_full((self.logp_TW.size(0),), -math.inf)
        return self.logp_TW.amax(-1)

    def shift_(self, max_T: torch.Tensor) -> None:
        """Subtract the maxima over the whole vocabulary. A fully masked row keeps its -inf logits and gets the mass 0."""
        self.logp_TW.sub_(max_T.masked_fill(max_T == -math.inf, 0)[:, None])
        self.prob_TW = torch.exp(self.logp_TW, out=self.scratch.like(f"exponentials {self._name}", self.logp_TW))

    def mass(self) -> torch.Tensor:
        """Return this rank's part of the softmax denominator."""
        return self.prob_TW.sum(-1)

    def normalise_(self, mass_T: torch.Tensor, moved_T: torch.Tensor | None = None) -> None:
        """Divide by the denominator over the whole vocabulary. The mass inf marks a row to ignore: all its probabilities become 0.

        Where the mass is relative to another maximum than `shift_` subtracted, `moved_T` is the latter minus the former (`moved_maximum`).
        """
        if moved_T is None:
            self.logp_TW.sub_(mass_T.log()[:, None])
            self.prob_TW.div_(mass_T[:, None])
        else:
            # One subtraction: where `moved` is large enough to round the logarithm away, so is every log-probability here.
            self.logp_TW.add_((moved_T - mass_T.log())[:, None])
            self.prob_TW.mul_((moved_T.exp() / mass_T)[:, None])

    def entropy_moment(self) -> torch.Tensor:
        """Return this rank's part of sum_v e^{u_v} u_v, with u the shifted logits. To be called between `shift_` and `normalise_`."""
        return weighted_sum(self.prob_TW, self.logp_TW, self.product())

    def product(self) -> torch.Tensor:
        """Return the one tensor of scratch memory for an entry-wise product; what was in it is gone."""
        return self.term("product")

    def term(self, name: str) -> torch.Tensor:
        """Return scratch memory of this name for one tensor of entries; what was in it is gone."""
        return self.scratch.like(name, self.logp_TW)

    def owned_logit(self, ids_T: torch.Tensor, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logit of each given id and a count of one, both 0 where another rank holds the id."""
        if shard.width == 0:
            return (zeros_T := self.logp_TW.new_zeros(self.logp_TW.size(0))), zeros_T
        local_T, owned_T = local_ids(ids_T, shard)
        logit_T = self.logp_TW.gather(1, local_T[:, None]).squeeze(1)
        return logit_T.masked_fill(~owned_T, 0), owned_T.to(logit_T.dtype)


def local_ids(ids_T: torch.Tensor, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the local column of each id, clamped into this rank's real columns, and whether the rank holds it."""
    local_T = ids_T.long() - shard.start
    return local_T.clamp(0, shard.width - 1), (local_T >= 0) & (local_T < shard.width)


def weighted_sum(weight_TW: torch.Tensor, value_TW: torch.Tensor, product_TW: torch.Tensor) -> torch.Tensor:
    """Return sum_v weight_v value_v with 0 * inf = 0, multiplied in `product_TW`, which may be `value_TW`.

    A NaN weight is dropped here and reaches the result through the mass it is divided by.
    """
    return torch.mul(weight_TW, value_TW, out=product_TW).nansum(-1)


def moved_maximum(old_T: torch.Tensor, new_T: torch.Tensor) -> torch.Tensor:
    """Return old - new; 0 where the old maximum is -inf, because everything relative to it is 0."""
    return (old_T - new_T).masked_fill_(old_T == -math.inf, 0)


def merged_softmax(max_RT: torch.Tensor, mass_RT: torch.Tensor, *moment_RT: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return maximum, mass and moments sum_v e^{u_v} u_v over R slices of the vocabulary from those of each slice, relative to its own maximum."""
    max_T = max_RT.amax(0)
    moved_RT = moved_maximum(max_RT, max_T).double()
    sums = [mass_RT * moved_RT.exp(), *((moment_T + moved_RT * mass_RT) * moved_RT.exp() for moment_T in moment_RT)]
    return max_T, *(parts_RT.sum(0).to(max_T.dtype) for parts_RT in sums)


def entropy(moment_T: torch.Tensor, mass_T: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats, log a - (sum_v e^{u_v} u_v) / a, where a is the mass; 0 for a fully masked row, whose mass is 0."""
    return (mass_T.log() - moment_T / mass_T).masked_fill_(mass_T == 0, 0)


def picked_logp(logit_T: torch.Tensor, owners_T: torch.Tensor, mass_T: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of the picked ids; NaN for an id that no rank holds, so that a wrong id never passes for a likely token.

    In a fully masked row it is -inf.
    """
    return (logit_T - mass_T.log()).masked_fill_(mass_T == 0, -math.inf).masked_fill_(owners_T == 0, math.nan)


def require_count(name: str, value: object) -> None:
    """Raise ValueError unless the value is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def require_ids(name: str, ids_T: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Raise ValueError unless there is one integer id for each row of another tensor, on its device."""
    require_same("shapes", name, tuple(ids_T.shape), f"the tokens of {like_name}", (like.size(0),))
    require_same("devices", name, ids_T.device, like_name, like.device)
    if ids_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must hold ids of dtype torch.int64 or torch.int32, not {ids_T.dtype}")


def require_same(what: str, left_name: str, left: object, right_name: str, right: object) -> None:
    """Raise ValueError naming both arguments and both values when they differ."""
    if left != right:
        raise ValueError(f"{what} must agree: {left_name} has {left}, {right_name} has {right}")
