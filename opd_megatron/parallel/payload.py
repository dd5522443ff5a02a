"""Moving pieces of samples from the ranks that computed them to the ranks that need them, for any pair of layouts.

A piece is needed by one tensor group of the student, whole on every rank of it. Every rank makes the same plan from what all ranks know (who has a
piece, who needs it, how many rows it has), so the plan itself costs no communication:

- a rank that holds a piece receives nothing of it;
- a piece that some ranks of the group hold stays within the group: each of the others gets it from one of those;
- a piece that none of them holds crosses once: each rank receives a share of its rows, and the group gathers the shares.

In the second case a gather would send the holders what they have, and would first need shares on the others: more bytes, none fewer from outside.
`delivery.py` carries plans out. Shapes: N rows of all pieces that are gathered at once, t ranks of a tensor group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` of one piece."""

    piece: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Transfer:
    """What one rank sends to another in one message."""

    source: int
    target: int
    spans: tuple[Span, ...]

    @property
    def num_rows(self) -> int:
        return sum(span.num_rows for span in self.spans)


@dataclass(frozen=True)
class Gather:
    """Pieces that a tensor group puts together: `shares[i]` are those of their N rows that `ranks[i]` was sent, ceil(N / t) or what is left."""

    ranks: tuple[int, ...]
    pieces: tuple[int, ...]
    shares: tuple[tuple[Span, ...], ...]

    @property
    def share_rows(self) -> int:
        """Return ceil(N / t): the rows that every rank puts in. Shares at the end are filled up to it."""
        return sum(span.num_rows for span in self.shares[0])

    @property
    def whole_rows(self) -> int:
        """Return the rows that every rank ends with, those that filled up shares among them."""
        return len(self.ranks) * self.share_rows


@dataclass(frozen=True)
class Step:
    """Messages that travel at once, and then what of them is gathered. Two ranks exchange one message each way at most."""

    transfers: tuple[Transfer, ...]
    gathers: tuple[Gather, ...]


@dataclass(frozen=True)
class PayloadPlan:
    """Steps in the order in which all ranks take them, each with at most `max_rows` rows, or one piece, a message and a gather: that bounds the buffers."""

    steps: tuple[Step, ...]
    num_rows: tuple[int, ...]

    def sent_rows(self) -> int:
        """Return the rows that reach tensor groups from outside, each once."""
        return sum(span.num_rows for gather in self._gathers() for share in gather.shares for span in share)

    def gathered_rows(self) -> int:
        """Return the rows that ranks receive from their own tensor group: a copy for each rank but one, and what filled up shares: in a gather, less than t."""
        gathered = sum((len(gather.ranks) - 1) * gather.whole_rows for gather in self._gathers())
        return gathered + sum(transfer.num_rows for step in self.steps for transfer in step.transfers) - self.sent_rows()

    def _gathers(self) -> Iterator[Gather]:
        return (gather for step in self.steps for gather in step.gathers)


def plan_payload(holders: Sequence[Sequence[int]], needers: Sequence[Sequence[int]], num_rows: Sequence[int], *, max_rows: int = 1 << 16) -> PayloadPlan:
    """Return the plan for pieces held by any of `holders[i]` and needed by all of `needers[i]`, a tensor group in ascending order.

    Two tensor groups are equal, or share no rank. The needers of one piece are spread over its holders. Pieces without rows do not travel.
    """
    crossing: dict[tuple[int, ...], list[int]] = {}
    copied: dict[tuple[int, int], list[int]] = {}
    for piece, (having, needing) in enumerate(zip(holders, needers, strict=True)):
        if num_rows[piece] == 0 or not needing:
            continue
        inside, lacking = [rank for rank in needing if rank in having], [rank for rank in needing if rank not in having]
        if not inside:
            crossing.setdefault(tuple(needing), []).append(piece)
            continue
        for place, target in enumerate(lacking):
            copied.setdefault((inside[place % len(inside)], target), []).append(piece)
    copies = [
        [Transfer(source, target, tuple(Span(piece, 0, num_rows[piece]) for piece in pieces)) for pieces in _batches(all_pieces, num_rows, max_rows)]
        for (source, target), all_pieces in sorted(copied.items())
    ]
    gathers = [[_gather_of(ranks, pieces, num_rows) for pieces in _batches(all_pieces, num_rows, max_rows)] for ranks, all_pieces in sorted(crossing.items())]
    steps = []
    for at_once in itertools.zip_longest(*copies, *gathers):
        gathered = [item for item in at_once if isinstance(item, Gather)]
        transfers = [item for item in at_once if isinstance(item, Transfer)] + [transfer for gather in gathered for transfer in _sends(gather, holders)]
        steps.append(Step(tuple(transfers), tuple(gathered)))
    return PayloadPlan(tuple(steps), tuple(num_rows))


def _batches(pieces: Sequence[int], num_rows: Sequence[int], max_rows: int) -> list[list[int]]:
    """Return the pieces in order, as many together as have at most `max_rows` rows; one that has more is alone."""
    batches: list[list[int]] = [[]]
    filled = 0
    for piece in pieces:
        if batches[-1] and filled + num_rows[piece] > max_rows:
            batches.append([])
            filled = 0
        batches[-1].append(piece)
        filled += num_rows[piece]
    return batches


def _gather_of(ranks: tuple[int, ...], pieces: Sequence[int], num_rows: Sequence[int]) -> Gather:
    """Return the gather of these pieces' rows, one after another, in shares of equal size as far as they go."""
    starts = list(itertools.accumulate((num_rows[piece] for piece in pieces), initial=0))
    size = -(-starts[-1] // len(ranks))
    shares = []
    for place in range(len(ranks)):
        # Where the share, from place * size on, and a piece overlap.
        cuts = [(piece, max(place * size - first, 0), min((place + 1) * size - first, num_rows[piece])) for piece, first in zip(pieces, starts)]
        shares.append(tuple(Span(piece, start, stop) for piece, start, stop in cuts if start < stop))
    return Gather(ranks, tuple(pieces), tuple(shares))


def _sends(gather: Gather, holders: Sequence[Sequence[int]]) -> list[Transfer]:
    """Return the messages that bring every rank its share, one from each holder that it is spread to."""
    transfers = []
    for place, (target, share) in enumerate(zip(gather.ranks, gather.shares, strict=True)):
        by_source: dict[int, list[Span]] = {}
        for span in share:
            having = holders[span.piece]
            by_source.setdefault(having[place % len(having)], []).append(span)
        transfers += [Transfer(source, target, tuple(spans)) for source, spans in sorted(by_source.items())]
    return transfers
