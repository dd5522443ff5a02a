"""A decoding step recorded as a CUDA graph, for each padded number of sequences. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch


@cache
def _stream_beside() -> torch.cuda.Stream:
    """Return the one stream of this process for first calls: libraries keep a workspace for every stream that they were ever called on."""
    return torch.cuda.Stream()


class DecodeGraphs:
    """Records at the first step of a size, and replays from then on.

    The recorded addresses are those of the weights and of one paged cache. They live no longer than that cache, which is one `generate`: between two of them
    an optimizer step, EffOPD, offloading or `Student.train_only` may move the weights.
    """

    def __init__(self) -> None:
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        # Of memory: one for all sizes, of which one is replayed at a time.
        self._pool: Any = None

    def of_size(self, num_tokens: int) -> Callable[[Callable[[], torch.Tensor]], torch.Tensor]:
        """Return what runs a step of so many tokens, given the call; it returns the step's output, which the next step overwrites."""
        return partial(self._run, num_tokens)

    def _run(self, num_tokens: int, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        if num_tokens not in self._recorded:
            self._recorded[num_tokens] = self._record(step)
        graph, output = self._recorded[num_tokens]
        graph.replay()
        return output

    def _record(self, step: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # Libraries allocate and choose their kernels in a first call. It writes the keys and values that the replay writes again.
        beside = _stream_beside()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads, which watch collectives or write a checkpoint, go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()
        self._pool = graph.pool()
        return graph, output
