"""Which samples each replica of a model computes together. Every rank makes the same plan from the lengths of all samples, which all ranks know.

A sample is a prompt with its response. A row is what the model sees as one line of text: one sample padded to the length of the others, or, packed,
several samples one after another.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from opd_megatron.config import ParallelLayout, RunConfig, fp8_multiple
from opd_megatron.parallel.context import padded_length
from opd_megatron.parallel.layout import replica_share


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model has one sample: in which replica, padded to which length."""

    replica: int
    length: int


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """`micro_batches[replica][i]` are indices of samples, `lengths` what each sample is padded to."""

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    lengths: tuple[int, ...]

    def samples_of(self, replica: int) -> list[int]:
        """Return the samples of one replica, in the order in which it computes them."""
        return [index for micro_batch in self.micro_batches[replica] for index in micro_batch]

    def places(self) -> list[Place]:
        """Return the place of every sample, in the order of samples."""
        replica_of = {index: replica for replica in range(len(self.micro_batches)) for index in self.samples_of(replica)}
        return [Place(replica=replica_of[index], length=length) for index, length in enumerate(self.lengths)]

    def rounds(self, num_rounds: int) -> list[tuple[tuple[tuple[int, ...], ...], ...]]:
        """Return the micro-batches of every replica in each of at most `num_rounds` rounds, as even as they can be; in one round, `micro_batches`.

        Of several rounds the last micro-batches come first. What the teacher scores is in ascending length, and beside the last round nothing is computed.
        """
        most = max(map(len, self.micro_batches), default=0)
        count = max(1, min(num_rounds, most))
        cuts = [(most * number // count, most * (number + 1) // count) for number in reversed(range(count))]
        return [tuple(of_replica[start:stop] for of_replica in self.micro_batches) for start, stop in cuts]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(BatchPlan):
    """Every replica has as many micro-batches as the others, all of `num_rows` rows of `row_length` positions: pipeline stages exchange one shape.

    A micro-batch may have fewer samples than rows, or none.
    """

    num_rows: int
    row_length: int
    packed: bool

    @property
    def num_positions(self) -> int:
        """Positions that all replicas compute, padding included."""
        return sum(map(len, self.micro_batches)) * self.num_rows * self.row_length


@dataclass(frozen=True, kw_only=True)
class TrainingBatches:
    """How the student's samples are batched: `micro_batch` rows of one sample each, or with `max_tokens` one row of several samples."""

    layout: ParallelLayout
    num_replicas: int
    micro_batch: int
    max_tokens: int | None = None
    # What a rank's part of a row must be a multiple of, beside what the layout splits.
    rank_multiple: int = 1

    @classmethod
    def of(cls, config: RunConfig, num_replicas: int) -> TrainingBatches:
        """Return what a configuration asks for."""
        training = config.training
        return cls(
            layout=config.student.layout,
            num_replicas=num_replicas,
            micro_batch=training.micro_batch,
            max_tokens=training.micro_batch_tokens,
            rank_multiple=fp8_multiple(training.fp8),
        )

    def plan(self, num_tokens: Sequence[int]) -> TrainingPlan:
        """Return the micro-batches for samples of these lengths; ValueError if one is longer than `max_tokens`."""
        return self._padded(num_tokens) if self.max_tokens is None else self._packed(num_tokens, self.max_tokens)

    def _padded(self, num_tokens: Sequence[int]) -> TrainingPlan:
        shares = [replica_share(len(num_tokens), replica, self.num_replicas) for replica in range(self.num_replicas)]
        largest = max(map(len, shares))
        num_rows = min(self.micro_batch, largest)
        count = self._allowed_count(-(-largest // num_rows))
        starts = range(0, count * num_rows, num_rows)
        length = padded_length(max(num_tokens), self.layout, self.rank_multiple)
        return TrainingPlan(
            micro_batches=tuple(tuple(tuple(share[start : start + num_rows]) for start in starts) for share in shares),
            lengths=(length,) * len(num_tokens),
            num_rows=num_rows,
            row_length=length,
            packed=False,
        )

    def _packed(self, num_tokens: Sequence[int], max_tokens: int) -> TrainingPlan:
        """Use few packs, and fill them evenly; a row, padding included, has at most `max_tokens` positions."""
        multiple, row_multiple = self.layout.sequence_multiple, self.layout.row_multiple * self.rank_multiple
        max_tokens = max_tokens // row_multiple * row_multiple
        lengths = [-(-count // multiple) * multiple for count in num_tokens]
        if max(lengths) > max_tokens:
            raise ValueError(f"a sample of {max(num_tokens)} tokens does not fit into a pack of training.micro_batch_tokens={self.max_tokens}")
        count = self._allowed_count(-(-sum(lengths) // (max_tokens * self.num_replicas)))
        packs = balanced_packs(lengths, count * self.num_replicas)
        while max(sum(lengths[index] for index in pack) for pack in packs) > max_tokens:
            count = self._allowed_count(count + 1)
            packs = balanced_packs(lengths, count * self.num_replicas)
        return TrainingPlan(
            # Heavy packs come first: dealt out like cards, no replica gets all of them.
            micro_batches=tuple(tuple(packs[replica :: self.num_replicas]) for replica in range(self.num_replicas)),
            lengths=tuple(lengths),
            num_rows=1,
            row_length=padded_length(max(sum(lengths[index] for index in pack) for pack in packs), self.layout, self.rank_multiple),
            packed=True,
        )

    def _allowed_count(self, count: int) -> int:
        """Return at least `count` micro-batches: Megatron's interleaved schedule takes them in groups of as many as there are stages."""
        group = self.layout.pipeline if self.layout.virtual > 1 else 1
        return -(-max(count, 1) // group) * group


def balanced_packs(lengths: Sequence[int], num_packs: int) -> list[tuple[int, ...]]:
    """Return `num_packs` sets of samples of about equal length, heaviest first: the longest sample left goes to the lightest pack.

    Graham's LPT rule: the heaviest pack is at most 4/3 - 1 / (3 num_packs) times as heavy as in the best partition (SIAM J. Appl. Math. 17, 1969).
    """
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    weights = [(0, pack) for pack in range(num_packs)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        weight, pack = heapq.heappop(weights)
        packs[pack].append(index)
        heapq.heappush(weights, (weight + lengths[index], pack))
    return [tuple(sorted(packs[pack])) for _, pack in sorted(weights, key=lambda entry: (-entry[0], entry[1]))]


def plan_scoring(num_tokens: Sequence[int], layout: ParallelLayout, num_replicas: int, micro_batch: int) -> BatchPlan:
    """Return the teacher's batches: each replica's contiguous share, similar lengths together, each batch padded to its own longest sample.

    Shares may be uneven or empty: where replicas share experts, `models.forward.inference_mode` keeps them in step.
    """
    lengths = [0] * len(num_tokens)
    replicas = []
    for replica in range(num_replicas):
        share = sorted(replica_share(len(num_tokens), replica, num_replicas), key=lambda index: num_tokens[index])
        batches = [tuple(share[start : start + micro_batch]) for start in range(0, len(share), micro_batch)]
        for batch in batches:
            length = padded_length(max(num_tokens[index] for index in batch), layout)
            for index in batch:
                lengths[index] = length
        replicas.append(tuple(batches))
    return BatchPlan(micro_batches=tuple(replicas), lengths=tuple(lengths))
