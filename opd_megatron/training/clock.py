"""Where the time of a step goes, on every rank: by phase, and in waiting for slower ranks."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from opd_megatron.parallel.offload import peak_bytes, start_peak

# Beside the phases of a step: parts of a phase, and what happens between two steps.
PARTS = ("forward_backward", "optimizer")
BETWEEN = ("evaluation", "checkpoint")
_IDLE = "idle"
# A phase that does nothing takes less.
_NOTHING_SECONDS = 1e-3
# A share of the step that a straggler costs.
_WORTH_NAMING = 0.02


class StepClock:
    """Measures the phases of a step on this rank. After each phase the ranks wait for the slowest, so that nobody's time counts as another phase's."""

    def __init__(self, phases: Sequence[str], device: torch.device) -> None:
        self._phases, self._device = tuple(phases), device
        self._between = dict.fromkeys(BETWEEN, 0.0)
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self._started = time.perf_counter()
        self._seconds = dict.fromkeys((*self._phases, *PARTS, _IDLE), 0.0)
        self._peak_bytes = dict.fromkeys(self._phases, 0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add how long a phase takes on this rank and the most memory it has in use, then wait for the other ranks."""
        with self.part(name):
            start_peak()
            yield
        self._peak_bytes[name] = max(self._peak_bytes[name], peak_bytes())
        done = time.perf_counter()
        dist.barrier()
        self._seconds[_IDLE] += time.perf_counter() - done

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add how long a part of a phase takes on this rank."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self._seconds[name] += time.perf_counter() - started

    @contextmanager
    def between(self, name: str) -> Iterator[None]:
        """Add how long training stands still between two steps: it is told with the next one."""
        started = time.perf_counter()
        yield
        self._between[name] += time.perf_counter() - started

    def finish(self) -> StepTimes:
        """Return what the step that began last took, on all ranks; every rank calls it."""
        step_seconds = time.perf_counter() - self._started
        own = {**self._seconds, **self._between}
        self._between = dict.fromkeys(BETWEEN, 0.0)
        rows = [torch.empty(len(own), dtype=torch.float64, device=self._device) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, torch.tensor(list(own.values()), dtype=torch.float64, device=self._device))
        peaks = torch.tensor(list(self._peak_bytes.values()), dtype=torch.int64, device=self._device)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        by_rank = dict(zip(own, torch.stack(rows).T.tolist(), strict=True))
        return StepTimes(by_rank, self._phases, dict(zip(self._peak_bytes, peaks.tolist(), strict=True)), step_seconds)


class StepTimes:
    """What one step took: seconds of every rank by phase, the largest peak of memory of any rank, and the time from the step's begin to its end."""

    def __init__(self, by_rank: Mapping[str, Sequence[float]], phases: Sequence[str], peak_bytes: Mapping[str, int], step_seconds: float) -> None:
        self.by_rank = by_rank
        self.step_seconds = step_seconds
        self.seconds = {name: sum(values) / len(values) for name, values in by_rank.items()}
        self._phases, self._peak_bytes = phases, peak_bytes

    def spread_seconds(self, phase: str) -> float:
        """Return how much longer a phase took on the slowest rank than on the one in the middle."""
        values = sorted(self.by_rank[phase])
        return values[-1] - values[len(values) // 2]

    def slowest_rank(self, phase: str) -> int:
        values = self.by_rank[phase]
        return max(range(len(values)), key=values.__getitem__)

    def metrics(self) -> dict[str, float | int]:
        """Return means over the ranks, which together with `idle_seconds` make up the step; who was slowest, and by how much; memory."""
        found: dict[str, float | int] = {f"{name}_seconds": seconds for name, seconds in self.seconds.items()}
        for phase in self._phases:
            if len(self.by_rank[phase]) > 1 and self.seconds[phase] > _NOTHING_SECONDS:
                found[f"{phase}_slowest_rank"] = self.slowest_rank(phase)
                found[f"{phase}_spread_seconds"] = self.spread_seconds(phase)
        return {**found, **{f"{phase}_peak_bytes": num_bytes for phase, num_bytes in self._peak_bytes.items()}, "step_seconds": self.step_seconds}


class StragglerWatch:
    """Says, once for each, which rank keeps being the slowest of a phase: a throttled GPU, a node with another job on it.

    Ranks wait for one another inside of `train` (gradients, stages), where all take the same time; the others begin and end alone.
    """

    def __init__(self, phases: Sequence[str], *, window: int = 10, often: float = 0.8, share: float = 0.2) -> None:
        """Every rank calls it. A rank is named that was slowest in `often` of the last `window` steps, and took `share` longer than the one in the middle."""
        self._nodes = [""] * dist.get_world_size()
        dist.all_gather_object(self._nodes, socket.gethostname())
        self._often, self._share = often, share
        # Of each of the last steps: the slowest rank, by how much, what the one in the middle took, and the whole step.
        self._seen: dict[str, deque[tuple[int, float, float, float]]] = {phase: deque(maxlen=window) for phase in phases}
        self._named: set[tuple[str, int]] = set()

    def notice(self, step: StepTimes, note: Callable[[str], None]) -> None:
        """Take a step into account."""
        for phase, seen in self._seen.items():
            rank, spread = step.slowest_rank(phase), step.spread_seconds(phase)
            seen.append((rank, spread, max(step.by_rank[phase]) - spread, step.step_seconds))
            own = [times for who, *times in seen if who == rank]
            longer, middle, whole = (sum(column) for column in zip(*own, strict=True))
            is_often = len(seen) == seen.maxlen and len(own) >= self._often * len(seen)
            if not is_often or longer <= self._share * middle or longer <= _WORTH_NAMING * whole or (phase, rank) in self._named:
                continue
            self._named.add((phase, rank))
            others = f"in {len(own)} of the last {len(seen)} steps, and took {100 * longer / middle:.0f} % longer than the rank in the middle"
            note(f"rank {rank} on {self._nodes[rank]} was the slowest in the phase {phase!r} {others}")
