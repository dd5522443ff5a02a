"""Carrying out the plans of `payload.py`: messages that travel while the ranks at both ends compute.

Shapes: R rows of one piece, N rows of all pieces that are gathered at once, G columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.parallel.payload import Gather, PayloadPlan, Span, Transfer


@dataclass(frozen=True, kw_only=True)
class Channel:
    """What the rows are, and the groups they travel in: `group` holds all ranks of the plan and counts them (default: the world), `tp_group` gathers.

    `tp_group` is this rank's tensor group of the student; where no gather takes place, there need be none. With a `stream`, everything of a delivery is issued
    there, beside what the GPU computes on its current one; on a CPU gloo's own threads move messages.
    """

    width: int
    dtype: torch.dtype
    device: torch.device
    group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    stream: torch.cuda.Stream | None = None

    @property
    def rank(self) -> int:
        # dist.get_rank(group) counts in the default group, which may be another.
        return self.group.rank() if self.group is not None else dist.get_rank()

    def empty(self, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, self.width, dtype=self.dtype, device=self.device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Issue what is inside on the channel's stream, without waiting for what is computed now."""
        with torch.cuda.stream(self.stream):
            yield

    def take_over(self, computed: Sequence[torch.Tensor]) -> None:
        """Let the channel's stream wait until these tensors are computed, and keep their memory until it has read them."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
            for tensor in computed:
                tensor.record_stream(self.stream)

    def hand_over(self, arrived: Sequence[torch.Tensor]) -> None:
        """Let what is computed from now on wait for the channel's stream, where these tensors were allocated."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
            for tensor in arrived:
                tensor.record_stream(torch.cuda.current_stream())


class Delivery:
    """One plan under way: the messages of its first step are posted when it is made; `arrive` waits for them, gathers, and takes the steps that follow.

    Every rank of the plan makes one with what it holds, {piece: [R, G]}, and lets it arrive. Between two ranks may be messages of several deliveries at once,
    which all ranks begin in one order: gloo tells them apart by `tag`, NCCL by that order.
    """

    def __init__(self, plan: PayloadPlan, held: Mapping[int, torch.Tensor], needed: Sequence[int], channel: Channel, *, tag: int = 0) -> None:
        self._plan, self._needed, self._channel, self._tag = plan, needed, channel, tag
        channel.take_over(list(held.values()))
        with channel.beside():
            self._posted = _Messages(plan.steps[0].transfers, held, channel, tag) if plan.steps else None
        # What is in a message and wanted no more may go: of a teacher's own rank, everything.
        sent_later = {span.piece for step in plan.steps[1:] for transfer in step.transfers if transfer.source == channel.rank for span in transfer.spans}
        wanted = sent_later.union(needed)
        self._held = {piece: rows for piece, rows in held.items() if piece in wanted}

    def arrive(self) -> list[torch.Tensor]:
        """Return the tensor [R, G] of every piece that this rank needs, in the order asked for; once."""
        with self._channel.beside():
            return self._arrive()

    def _arrive(self) -> list[torch.Tensor]:
        channel, plan, held = self._channel, self._plan, self._held
        arrived: dict[int, torch.Tensor] = {}
        for step in plan.steps:
            messages, self._posted = self._posted or _Messages(step.transfers, held, channel, self._tag), None
            received = messages.wait()
            for gather in step.gathers:
                if channel.rank in gather.ranks:
                    share = [received.pop(span) for span in gather.shares[gather.ranks.index(channel.rank)]]
                    whole_NG = _gather(share, gather, channel)
                    sizes = [plan.num_rows[piece] for piece in gather.pieces]
                    arrived.update(zip(gather.pieces, whole_NG[: sum(sizes)].split(sizes), strict=True))
            arrived.update({span.piece: rows for span, rows in received.items()})
        # A piece without rows does not travel.
        nothing = channel.empty(0)
        return [arrived[piece] if piece in arrived else (held[piece] if plan.num_rows[piece] else nothing).to(channel.dtype) for piece in self._needed]


def deliver(plan: PayloadPlan, held: Mapping[int, torch.Tensor], needed: Sequence[int], channel: Channel) -> list[torch.Tensor]:
    """Return the tensor [R, G] of every piece in `needed`, in that order. Every rank of the plan calls this with what it holds, {piece: [R, G]}."""
    return Delivery(plan, held, needed, channel).arrive()


class _Messages:
    """One step's messages of this rank, under way."""

    def __init__(self, transfers: Sequence[Transfer], held: Mapping[int, torch.Tensor], channel: Channel, tag: int) -> None:
        operations: list[dist.P2POp] = []
        self._received: dict[Span, torch.Tensor] = {}
        for transfer in transfers:
            if transfer.source == channel.rank:
                message = torch.cat([held[span.piece][span.start : span.stop] for span in transfer.spans]).to(channel.dtype).contiguous()
                operations.append(dist.P2POp(dist.isend, message, transfer.target, channel.group, tag))
            elif transfer.target == channel.rank:
                message = channel.empty(transfer.num_rows)
                operations.append(dist.P2POp(dist.irecv, message, transfer.source, channel.group, tag))
                self._received.update(zip(transfer.spans, message.split([span.num_rows for span in transfer.spans]), strict=True))
        # They hold the messages until they are done.
        self._operations = operations
        self._requests = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> dict[Span, torch.Tensor]:
        """Return what this rank received, by span; once."""
        for request in self._requests:
            request.wait()
        self._operations.clear()
        return self._received


def _gather(share: Sequence[torch.Tensor], gather: Gather, channel: Channel) -> torch.Tensor:
    """Return the rows [N, G] of all shares, and after them what filled up the last ones."""
    padding = gather.share_rows - sum(rows.size(0) for rows in share)
    share_NG = torch.cat([*share, channel.empty(padding)])
    if len(gather.ranks) == 1:
        return share_NG
    assert channel.tp_group is not None, "a rank of a tensor group gathers"
    whole_NG = channel.empty(gather.whole_rows)
    dist.all_gather_into_tensor(whole_NG, share_NG, group=channel.tp_group)
    return whole_NG
