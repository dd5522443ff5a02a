"""Ranks that share a GPU: which GPU a rank gets, and messages through the host, with CPU tensors in the place of CUDA's.

Not covered: CUDA tensors, and gloo's own copies of them (tests/gpu/test_messages.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.parallel.shared_gpu import send_through_host
from opd_megatron.parallel.world import GpuPlace, choose_gpu
from tests.pool import RankPool


@pytest.mark.parametrize(
    ("local_rank", "local_size", "world_size", "num_gpus", "index", "is_shared"),
    [
        (3, 8, 8, 8, 3, False),
        (3, 8, 16, 8, 3, False),
        # Fewer ranks than GPUs.
        (1, 2, 2, 8, 1, False),
        (3, 4, 4, 1, 0, True),
        (3, 4, 4, 2, 1, True),
        (0, 4, 4, 2, 0, True),
        # Slurm: all GPUs are seen, or the task's own.
        (3, None, 8, 8, 3, False),
        (3, None, 8, 1, 0, False),
    ],
)
def test_every_rank_has_a_gpu(local_rank: int, local_size: int | None, world_size: int, num_gpus: int, index: int, is_shared: bool) -> None:
    assert choose_gpu(local_rank, local_size, world_size, num_gpus) == GpuPlace(index=index, is_shared=is_shared)


def test_ranks_without_a_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 ranks on a node of 4 GPUs, in a job of 16.*--nproc-per-node 4"):
        choose_gpu(0, 8, 16, 4)
    with pytest.raises(ValueError, match=r"local rank 4 has no GPU of its own: this node shows 4.*--ntasks-per-node=4"):
        choose_gpu(4, None, 8, 4)


def exchange_with_others() -> dict[str, Any]:
    """Send every kind of point-to-point message once around the ring of ranks; return what arrived, and what was seen on the way."""
    isend = dist.isend
    undo = send_through_host(lambda _tensor: True)
    try:
        assert dist.isend is not isend
        rank, size = dist.get_rank(), dist.get_world_size()
        after, before = (rank + 1) % size, (rank - 1) % size
        seen: dict[str, Any] = {"before": before}
        # A strided tensor, as a transposed activation is.
        message = torch.arange(6.0).reshape(2, 3).T + rank
        batch = torch.empty(3, 2)
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, message, after), dist.P2POp(dist.irecv, batch, before)])
        message.zero_()
        for work in works:
            work.wait()
        single = torch.full((2,), -1, dtype=torch.bfloat16)
        arriving = dist.irecv(single, before)
        leaving = dist.isend(torch.full((2,), rank, dtype=torch.bfloat16), after)
        dist.barrier()
        seen["before it is waited for"] = single.tolist()
        arriving.wait()
        leaving.wait()
        turn = torch.empty(1, dtype=torch.long)
        if rank == 0:
            dist.send(torch.tensor([7]), after)
            dist.recv(turn, before)
        else:
            dist.recv(turn, before)
            dist.send(turn + 1, after)
        return {**seen, "batch": batch, "single": single, "turn": turn.item()}
    finally:
        undo()
        assert dist.isend is isend


def test_messages_through_the_host_arrive_as_they_were_sent(pool: RankPool) -> None:
    for rank, seen in enumerate(pool.run(exchange_with_others, world_size=3)):
        # What became of the sender's tensor afterwards does not matter.
        assert torch.equal(seen["batch"], torch.arange(6.0).reshape(2, 3).T + seen["before"])
        assert seen["single"].tolist() == [seen["before"]] * 2
        # Through the host: the tensor itself is written when it is waited for.
        assert seen["before it is waited for"] == [-1, -1]
        assert seen["turn"] == (7 + 2 if rank == 0 else 7 + rank - 1)
