"""Moving pieces of samples from the ranks that computed them to the ranks that need them, for any pair of layouts.

Every rank makes the same plan from what all ranks know (who has a piece, who needs it, how many rows it has), so the plan itself costs
no communication. Shapes: R rows of one piece, G columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Transfer:
    """Pieces one rank sends to another in one message."""

    source: int
    target: int
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class PayloadPlan:
    """Rounds of transfers. Each message holds at most `max_rows` rows, or one piece, which bounds the buffers in flight."""

    rounds: tuple[tuple[Transfer, ...], ...]
    num_rows: tuple[int, ...]

    def sent_rows(self) -> int:
        """Return the rows that cross between ranks, for the bytes-per-token metric."""
        return sum(self.num_rows[piece] for step in self.rounds for transfer in step for piece in transfer.pieces)


def plan_payload(holders: Sequence[Sequence[int]], needers: Sequence[Sequence[int]], num_rows: Sequence[int], *, max_rows: int = 1 << 16) -> PayloadPlan:
    """Return the plan for pieces held by any of `holders[i]` and needed by all of `needers[i]`.

    A rank that holds what it needs receives nothing. Otherwise the needers of one piece are spread over its holders.
    """
    pairs: dict[tuple[int, int], list[list[int]]] = {}
    for piece, (having, needing) in enumerate(zip(holders, needers, strict=True)):
        for place, target in enumerate(needing):
            if target in having or num_rows[piece] == 0:
                continue
            messages = pairs.setdefault((having[place % len(having)], target), [[]])
            if messages[-1] and sum(num_rows[i] for i in messages[-1]) + num_rows[piece] > max_rows:
                messages.append([])
            messages[-1].append(piece)
    num_rounds = max((len(messages) for messages in pairs.values()), default=0)
    rounds = tuple(
        tuple(Transfer(source, target, tuple(messages[step])) for (source, target), messages in sorted(pairs.items()) if step < len(messages))
        for step in range(num_rounds)
    )
    return PayloadPlan(rounds, tuple(num_rows))


def deliver(
    plan: PayloadPlan,
    held: Mapping[int, torch.Tensor],
    needed: Sequence[int],
    *,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> list[torch.Tensor]:
    """Return the tensor [R, G] of every piece in `needed`, in that order. Every rank of the plan calls this with what it holds.

    Ranks are those of `group`, by default the world.
    """
    # dist.get_rank(group) counts in the default group, which may be another.
    rank = group.rank() if group is not None else dist.get_rank()
    arrived: dict[int, torch.Tensor] = {}
    for step in plan.rounds:
        operations, incoming = [], []
        for transfer in step:
            if transfer.source == rank:
                message = torch.cat([held[piece] for piece in transfer.pieces]).to(dtype).contiguous()
                operations.append(dist.P2POp(dist.isend, message, transfer.target, group))
            elif transfer.target == rank:
                rows = [plan.num_rows[piece] for piece in transfer.pieces]
                message = torch.empty(sum(rows), width, dtype=dtype, device=device)
                operations.append(dist.P2POp(dist.irecv, message, transfer.source, group))
                incoming.append((transfer.pieces, rows, message))
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()
        for pieces, rows, message in incoming:
            arrived.update(zip(pieces, message.split(rows), strict=True))
    # A piece without rows is not sent.
    nothing = torch.empty(0, width, dtype=dtype, device=device)
    return [arrived[piece] if piece in arrived else (held[piece] if plan.num_rows[piece] else nothing).to(dtype) for piece in needed]
