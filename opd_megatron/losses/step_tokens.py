"""The statistics of all tokens of an optimizer step, from all ranks that hold some, in one order that every rank agrees on.

Shapes: T this rank's response tokens, N those of all ranks, B responses of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.losses.fused_head import TokenStatistics


@dataclass(frozen=True)
class StepTokens:
    """Statistics of all tokens in fp64 on the host, response after response in the order of their ids; and where this rank's are among them.

    A few numbers per token: on the host they cost one copy, and every device decides alike, bit for bit.
    """

    entropy_N: torch.Tensor
    reverse_kl_N: torch.Tensor
    forward_kl_N: torch.Tensor
    lengths: list[int]
    # For each of this rank's tokens its place among the N, and for each of its responses its place among all.
    own_tokens_T: torch.Tensor
    own_responses_B: list[int]
    # Equal on all ranks, whatever each one asked for: that of the group's first rank.
    seed: int

    @property
    def num_tokens(self) -> int:
        return self.entropy_N.numel()

    def spans(self, scope: str) -> list[slice]:
        """Return the tokens of every response for scope "sequence", of all together for "step"."""
        if scope == "step":
            return [slice(0, self.num_tokens)]
        starts = _starts(self.lengths)
        return [slice(start, start + length) for start, length in zip(starts, self.lengths)]


def whole_step(
    statistics: TokenStatistics,
    response_lengths: Sequence[int] | torch.Tensor,
    *,
    dp_group: dist.ProcessGroup | None = None,
    response_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> StepTokens:
    """Return the tokens of all ranks of `dp_group`, of which each holds other responses; without a group, this rank's are all there are.

    `response_ids` are the places of the responses in the step; without them they count in the order of ranks. Four collectives; every rank joins each,
    one without responses too. Raises ValueError, on all ranks alike, where lengths do not fit tokens, or ids are not distinct.
    """
    lengths, ids = as_list(response_lengths), None if response_ids is None else as_list(response_ids)
    values_3T = torch.stack([statistics.student_entropy_T, statistics.reverse_kl_T, statistics.forward_kl_T]).detach().double()
    device = values_3T.device
    header = torch.tensor([len(lengths), values_3T.size(1), -1 if ids is None else len(ids), seed], dtype=torch.int64, device=device)
    headers = [part.tolist() for part in _gather(header, dp_group)]
    lengths_by_rank = _gather_ragged(torch.tensor(lengths, dtype=torch.int64, device=device)[None], [h[0] for h in headers], dp_group)
    ids_by_rank = _gather_ragged(torch.tensor(ids or [], dtype=torch.int64, device=device)[None], [max(h[2], 0) for h in headers], dp_group)
    _require_consistent(headers, [part[0].tolist() for part in lengths_by_rank], ids_by_rank)
    values_3N = torch.cat([part.cpu() for part in _gather_ragged(values_3T, [h[1] for h in headers], dp_group)], 1)
    all_lengths = torch.cat(lengths_by_rank, 1)[0].tolist()
    all_ids = torch.cat(ids_by_rank, 1)[0].tolist() or list(range(len(all_lengths)))
    return _in_order(values_3N, all_lengths, all_ids, 0 if dp_group is None else dp_group.rank(), headers)


def _in_order(values_3N: torch.Tensor, lengths: list[int], ids: list[int], rank: int, headers: list[list[int]]) -> StepTokens:
    """Sort the responses of all ranks by id and find this rank's among them."""
    order = sorted(range(len(lengths)), key=ids.__getitem__)
    starts = _starts(lengths)
    tokens_N = torch.cat([torch.arange(0), *(torch.arange(starts[one], starts[one] + lengths[one]) for one in order)])
    places_N = torch.empty_like(tokens_N)
    places_N[tokens_N] = torch.arange(len(tokens_N))
    rank_of = {one: place for place, one in enumerate(order)}
    first_response, first_token = (sum(header[column] for header in headers[:rank]) for column in (0, 1))
    num_responses, num_tokens, _, _ = headers[rank]
    entropy_N, reverse_kl_N, forward_kl_N = values_3N[:, tokens_N]
    return StepTokens(
        entropy_N=entropy_N,
        reverse_kl_N=reverse_kl_N,
        forward_kl_N=forward_kl_N,
        lengths=[lengths[one] for one in order],
        own_tokens_T=places_N[first_token : first_token + num_tokens],
        own_responses_B=[rank_of[one] for one in range(first_response, first_response + num_responses)],
        seed=headers[0][3],
    )


def _require_consistent(headers: list[list[int]], lengths_by_rank: list[list[int]], ids_by_rank: list[torch.Tensor]) -> None:
    """Raise ValueError for what any rank got wrong: all ranks look at the same numbers, so all of them raise."""
    for rank, (header, lengths) in enumerate(zip(headers, lengths_by_rank)):
        require_lengths(lengths, header[1], f" on rank {rank} of dp_group" if len(headers) > 1 else "")
    counts = [header[2] for header in headers]
    if all(count == -1 for count in counts):
        return
    if counts != [header[0] for header in headers]:
        raise ValueError(f"response_ids number {counts} by rank, for {[header[0] for header in headers]} responses; give one to each response, on every rank")
    ids = torch.cat(ids_by_rank, 1)[0]
    if ids.unique().numel() != ids.numel():
        raise ValueError(f"response_ids must be distinct over all ranks, got {ids.tolist()}")


def require_lengths(lengths: list[int], num_tokens: int, where: str = "") -> None:
    """Raise ValueError unless the lengths are counts that add up to the tokens."""
    if min(lengths, default=0) < 0:
        raise ValueError(f"response_lengths{where} must not be negative, got {min(lengths)}")
    if sum(lengths) != num_tokens:
        raise ValueError(f"response_lengths{where} add up to {sum(lengths)} for {num_tokens} tokens; one length per response, its tokens in that order")


def as_list(numbers: Sequence[int] | torch.Tensor) -> list[int]:
    """Return whole numbers as a list of int."""
    return [int(number) for number in (numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers)]


def _starts(lengths: list[int]) -> list[int]:
    starts, end = [], 0
    for length in lengths:
        starts.append(end)
        end += length
    return starts


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Return a tensor of every rank of the group, of one shape: one collective."""
    if group is None or group.size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _gather_ragged(tensor: torch.Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Return a matrix of every rank, of `sizes` columns by rank: one collective, none where no rank has a column."""
    longest = max(sizes)
    if longest == 0:
        return [tensor for _ in sizes]
    padded = torch.cat([tensor, tensor.new_zeros(tensor.size(0), longest - tensor.size(1))], 1)
    return [part[:, :size] for part, size in zip(_gather(padded, group), sizes)]
