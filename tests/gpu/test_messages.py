"""Every collective that a run uses, on the device's tensors: over NCCL where ranks have GPUs of their own, over gloo where they share one.

Not covered: several nodes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.gpu.ranks import on_ranks

pytestmark = pytest.mark.gpu


def _exchange(device: torch.device) -> dict[str, Any]:
    """Return what each kind of message gives on this rank, as lists, and whether it lies on the device."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = torch.arange(4, device=device, dtype=torch.float32) + 10 * rank
    found: dict[str, torch.Tensor] = {}
    found["all_reduce"] = own.clone()
    dist.all_reduce(found["all_reduce"])
    found["largest"] = own.clone()
    dist.all_reduce(found["largest"], op=dist.ReduceOp.MAX)
    found["broadcast"] = own.to(torch.bfloat16)
    dist.broadcast(found["broadcast"], src=size - 1)
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own)
    found["all_gather"] = torch.cat(parts)
    found["all_gather_into_tensor"] = torch.empty(4 * size, device=device)
    dist.all_gather_into_tensor(found["all_gather_into_tensor"], own)
    found["reduce_scatter_tensor"] = torch.empty(4 // size, device=device)
    dist.reduce_scatter_tensor(found["reduce_scatter_tensor"], own)
    # Uneven, as tokens are spread over experts: one to the first rank, three to the second.
    take = [1, 1] if rank == 0 else [3, 3]
    found["all_to_all_single"] = torch.empty(sum(take), device=device)
    dist.all_to_all_single(found["all_to_all_single"], own, take, [1, 3])
    found["batch_isend_irecv"] = torch.empty(4, device=device)
    operations = [dist.P2POp(dist.isend, own, 1 - rank), dist.P2POp(dist.irecv, found["batch_isend_irecv"], 1 - rank)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    found["send and recv"] = torch.full((2,), float(rank), device=device)
    if rank == 0:
        dist.send(found["send and recv"], dst=1)
    else:
        dist.recv(found["send and recv"], src=0)
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    return {"objects": objects, **{name: (value.tolist(), value.device == device) for name, value in found.items()}}


def test_messages_between_two_ranks_arrive() -> None:
    first, second = on_ranks(_exchange, num_ranks=2)
    both = [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]
    for seen in (first, second):
        assert seen["objects"] == [{"rank": 0}, {"rank": 1}]
        assert seen["all_reduce"] == ([10.0, 12.0, 14.0, 16.0], True)
        assert seen["largest"] == seen["broadcast"] == (both[4:], True)
        assert seen["all_gather"] == seen["all_gather_into_tensor"] == (both, True)
        assert seen["send and recv"] == ([0.0, 0.0], True)
    assert (first["reduce_scatter_tensor"], second["reduce_scatter_tensor"]) == (([10.0, 12.0], True), ([14.0, 16.0], True))
    assert (first["all_to_all_single"], second["all_to_all_single"]) == (([0.0, 10.0], True), ([1.0, 2.0, 3.0, 11.0, 12.0, 13.0], True))
    assert (first["batch_isend_irecv"], second["batch_isend_irecv"]) == ((both[4:], True), (both[:4], True))
