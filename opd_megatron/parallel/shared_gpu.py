"""Several ranks on one GPU, so that a node with one GPU can check every layout: NCCL refuses two ranks on a device, gloo takes their CUDA tensors.

What gloo does with a CUDA tensor, by torch 2.13's own ProcessGroupGloo:

- broadcast, all_reduce, reduce, all_gather, gather, scatter, all_to_all: copied to pinned host memory and back, on streams of their own;
- reduce_scatter: an all_reduce of the whole, of which each rank keeps its part;
- send and recv: the address is taken for one of the host, and the process ends in "Bad address" (https://github.com/pytorch/pytorch/issues/45995).

So point-to-point messages go through the host here. Every message costs two copies: this is for equality, and no time measured so means anything.
Not served is what gloo does not have on the CPU either without help (`parallel.cpu`): experts split over tensor ranks gather uneven parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


class _Sent:
    """A message on its way, and the host memory that it is read from."""

    def __init__(self, work: Any, host: torch.Tensor) -> None:
        self._work, self._host = work, host

    def wait(self) -> bool:
        return bool(self._work.wait())

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())


class _Received(_Sent):
    """A message that arrives in host memory, and in its tensor once it is waited for."""

    def __init__(self, work: Any, host: torch.Tensor, tensor: torch.Tensor) -> None:
        super().__init__(work, host)
        self._tensor = tensor

    def wait(self) -> bool:
        done = super().wait()
        self._tensor.copy_(self._host)
        return done


def is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def send_through_host(needs_host: Callable[[torch.Tensor], bool] = is_on_gpu) -> Callable[[], None]:
    """Let torch.distributed's isend and irecv, and what is made of them, take tensors that `needs_host` names through the host; return what undoes it.

    `send`, `recv` and `batch_isend_irecv` look these two up in their module; P2POp compares with them there.
    """
    isend, irecv = distributed_c10d.isend, distributed_c10d.irecv

    def isend_from_host(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not needs_host(tensor):
            return isend(tensor, *args, **kwargs)
        # Waits for what writes the tensor: gloo's thread knows no streams.
        host = tensor.detach().to("cpu", copy=True).contiguous()
        return _Sent(isend(host, *args, **kwargs), host)

    def irecv_to_host(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not needs_host(tensor):
            return irecv(tensor, *args, **kwargs)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return _Received(irecv(host, *args, **kwargs), host, tensor)

    def put(send: Any, receive: Any) -> None:
        for module in (distributed_c10d, dist):
            vars(module).update(isend=send, irecv=receive)

    put(isend_from_host, irecv_to_host)
    return lambda: put(isend, irecv)
