"""Every rank ends with the rows it needs, bit for bit, wherever they were held.

Not covered: CUDA tensors over NCCL, and more than 4 ranks.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from opd_megatron.parallel.payload import deliver, plan_payload
from tests.pool import RankPool

WIDTH = 3
NUM_SAMPLES = 12
# Uneven, and now and then above the smaller limit of rows a message.
ROWS = [1 + 5 * i % 7 for i in range(NUM_SAMPLES)]
# Who has sample i, who needs it.
LAYOUTS = {
    "the same ranks": (lambda i: [i % 4], lambda i: [i % 4]),
    "the next rank": (lambda i: [i % 4], lambda i: [(i + 1) % 4]),
    "both ways between two": (lambda i: [i % 2], lambda i: [1 - i % 2]),
    "dedicated ranks": (lambda i: [i % 2], lambda i: [2 + i // 2 % 2]),
    "one to all": (lambda i: [3], lambda i: [0, 1, 2, 3]),
    "all to one": (lambda i: [i % 4], lambda i: [0]),
    "replicas to tensor pairs": (lambda i: [4 * i // NUM_SAMPLES], lambda i: [2 * (2 * i // NUM_SAMPLES), 2 * (2 * i // NUM_SAMPLES) + 1]),
    "tensor pairs to replicas": (lambda i: [2 * (2 * i // NUM_SAMPLES), 2 * (2 * i // NUM_SAMPLES) + 1], lambda i: [4 * i // NUM_SAMPLES]),
    "last stage of TP2xPP2 to the first": (lambda i: [2, 3], lambda i: [0, 1]),
    "nobody": (lambda i: [i % 4], lambda i: []),
}


def _rows_of(sample: int, num_rows: int) -> torch.Tensor:
    """Values that name their place, and that bf16 holds exactly as they are: [R, G] below 256."""
    return (sample * 20 + torch.arange(num_rows)[:, None] * WIDTH + torch.arange(WIDTH)).float().remainder(251)


def _exchange(holders: list[list[int]], needers: list[list[int]], rows: list[int], max_rows: int, dtype: torch.dtype, reverse: bool) -> list[int]:
    """Deliver, compare with what was held, and return the samples this rank got."""
    rank = dist.get_rank()
    held = {sample: _rows_of(sample, rows[sample]) for sample, having in enumerate(holders) if rank in having}
    needed = [sample for sample, needing in enumerate(needers) if rank in needing][:: -1 if reverse else 1]
    plan = plan_payload(holders, needers, rows, max_rows=max_rows)
    got = deliver(plan, held, needed, width=WIDTH, dtype=dtype, device=torch.device("cpu"))
    for sample, tensor in zip(needed, got, strict=True):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, _rows_of(sample, rows[sample]).to(dtype)), sample
    return needed


def _exchange_all(layouts: list[tuple[list[list[int]], list[list[int]]]], max_rows: int, dtype: torch.dtype, reverse: bool) -> list[list[int]]:
    return [_exchange(holders, needers, ROWS, max_rows, dtype, reverse) for holders, needers in layouts]


@pytest.mark.parametrize(("max_rows", "dtype", "reverse"), [(1 << 16, torch.float32, False), (6, torch.float32, True), (1, torch.bfloat16, False)])
def test_what_arrives_is_what_was_held(pool: RankPool, max_rows: int, dtype: torch.dtype, reverse: bool) -> None:
    # All layouts in one world, one after another: a message left over from one would show in the next.
    layouts = [([having(i) for i in range(NUM_SAMPLES)], [needing(i) for i in range(NUM_SAMPLES)]) for having, needing in LAYOUTS.values()]
    by_rank = pool.run(_exchange_all, layouts, max_rows, dtype, reverse)
    for rank, delivered in enumerate(by_rank):
        for (_, needers), samples in zip(layouts, delivered, strict=True):
            assert sorted(samples) == [sample for sample, needing in enumerate(needers) if rank in needing]


def test_a_sample_without_rows_arrives_empty(pool: RankPool) -> None:
    holders, needers = [[i % 4] for i in range(8)], [[(i + 1) % 4] for i in range(8)]
    pool.run(_exchange, holders, needers, [2, 2, 2, 2, 0, 0, 0, 0], 4, torch.float32, False)


def test_a_sample_without_rows_stays_empty_where_it_is_held(pool: RankPool) -> None:
    holders = [[i % 4] for i in range(8)]
    pool.run(_exchange, holders, holders, [2, 2, 2, 2, 0, 0, 0, 0], 4, torch.float32, False)
