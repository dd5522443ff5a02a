"""Every rank ends with the rows it needs, bit for bit, wherever they were held; and how many bytes of a run cross between its models.

Not covered: CUDA tensors over NCCL, and more than 4 ranks.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.parallel.delivery import Channel, deliver
from opd_megatron.parallel.payload import plan_payload
from tests.pool import RankPool
from tests.runs import metrics_of, run_job, small_config, with_teacher

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
    "one to a tensor group of three": (lambda i: [0], lambda i: [1, 2, 3]),
    "two, one of them in the tensor group of three": (lambda i: [i % 2, 3] if i % 3 else [0], lambda i: [1, 2, 3]),
    "context parts to a tensor pair": (lambda i: [i % 2], lambda i: [2, 3]),
    "nobody": (lambda i: [i % 4], lambda i: []),
}


def _rows_of(sample: int, num_rows: int) -> torch.Tensor:
    """Values that name their place, and that bf16 holds exactly as they are: [R, G] below 256."""
    return (sample * 20 + torch.arange(num_rows)[:, None] * WIDTH + torch.arange(WIDTH)).float().remainder(251)


def _own_group(needers: list[list[int]]) -> dist.ProcessGroup | None:
    """Create the tensor groups among the needers; return this rank's."""
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in sorted({tuple(ranks) for ranks in needers}) if len(ranks) > 1}
    return next((group for ranks, group in groups.items() if dist.get_rank() in ranks), None)


def _exchange(holders: list[list[int]], needers: list[list[int]], rows: list[int], max_rows: int, dtype: torch.dtype, reverse: bool) -> list[int]:
    """Deliver, compare with what was held, and return the samples this rank got."""
    rank = dist.get_rank()
    held = {sample: _rows_of(sample, rows[sample]) for sample, having in enumerate(holders) if rank in having}
    needed = [sample for sample, needing in enumerate(needers) if rank in needing][:: -1 if reverse else 1]
    plan = plan_payload(holders, needers, rows, max_rows=max_rows)
    channel = Channel(width=WIDTH, dtype=dtype, device=torch.device("cpu"), tp_group=_own_group(needers))
    got = deliver(plan, held, needed, channel)
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


# Student, teacher, ranks; how often every row crosses to the student's tensor group, and how often it is sent inside.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], int, int, int]] = {
    "TP2, one rank of the teacher's own": ({"tensor": 2}, {"own": 1}, 3, 1, 1),
    "TP2, TP2 of the teacher's own": ({"tensor": 2}, {"own": 2, "tensor": 2}, 4, 1, 1),
    "TP2+SP, PP2 of the teacher's own": ({"tensor": 2, "sequence": True}, {"own": 2, "pipeline": 2}, 4, 1, 1),
    "CP2, CP2 of the teacher's own": ({"context": 2}, {"own": 2, "context": 2}, 4, 1, 0),
    "TP2, teacher TP2 on its ranks": ({"tensor": 2}, {"tensor": 2}, 2, 0, 0),
    "TP2, a half of the teacher on each of its ranks": ({"tensor": 2}, {}, 2, 0, 1),
}


@pytest.mark.parametrize(("precision", "itemsize"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("name", RUNS)
def test_one_copy_of_the_hidden_states_crosses(models: Path, pool: RankPool, tmp_path: Path, name: str, precision: str, itemsize: int) -> None:
    student, teacher, world_size, crossings, sent_inside = RUNS[name]
    config = with_teacher(small_config(models, **student), **teacher)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1, precision=precision))
    pool.run(run_job, config, tmp_path / "run", world_size=world_size)
    (step,) = metrics_of(tmp_path / "run")
    row_bytes = itemsize * 96
    assert step["payload_bytes_per_token"] == crossings * row_bytes
    # Shares are made even with less than a row a rank: here one row in all, where something crosses to two ranks.
    padding = step["payload_gathered_bytes_per_token"] / row_bytes - sent_inside
    assert 0 <= padding * step["response_tokens"] <= crossings * sent_inside + 1e-6
