"""EffOPD (arXiv 2605.11739, section 4.1): after steps 1, 2, 4, 8, ... the weights go on along what they moved, as far as a few prompts get no worse.

    delta = W - anchor;  candidates W + 2 k delta, k = 1 .. 5;  the first that is refused ends the search;  anchor = the accepted weights

The optimizer's fp32 masters move, and the weights that are rounded from them; moments, schedule and gradients are untouched. All is elementwise, so each rank
moves its own shards; only scores and norms are exchanged, and every rank takes the decision that rank 0 took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch

from opd_megatron.config import EffOPDConfig
from opd_megatron.models.modules import module_kind
from opd_megatron.models.weight_map import weight_map
from opd_megatron.models.weights import named_global_parameters
from opd_megatron.parallel.world import agreed_by_rank_0
from opd_megatron.training.masters import MasterShard, are_finite, host_copy, master_shards, module_updates, publish, put_back, whole_slices
from opd_megatron.training.optimizer import restart_adam
from opd_megatron.training.search_scores import Scored, SearchScore
from opd_megatron.training.student import Student

Weights = TypeVar("Weights", torch.Tensor, Mapping[str, torch.Tensor])


def extrapolation_candidates(weights: Weights, anchor: Weights, *, max_k: int = 5, spacing: float = 2.0) -> Iterator[tuple[int, Weights]]:
    """Yield (k, weights + spacing k (weights - anchor)) for k = 1 .. max_k (arXiv 2605.11739, Eq. 2): of one tensor, or of each in a mapping.

    The released code's recursion w <- w + f (w - anchor), f = 2, 2/3, 2/5, 2/7, 2/9, gives the same up to rounding.
    """
    for k in range(1, max_k + 1):
        if isinstance(weights, torch.Tensor):
            yield k, _extrapolated(weights, anchor, k * spacing)  # type: ignore[arg-type]
        else:
            yield k, {name: _extrapolated(weight, anchor[name], k * spacing) for name, weight in weights.items()}  # type: ignore[call-overload,misc]


def _extrapolated(weight: torch.Tensor, anchor: torch.Tensor, multiple: float) -> torch.Tensor:
    return weight + multiple * (weight - anchor)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One that was scored. `standard_error` is that of the gain over the best before it, paired by prompt; None where the score is no mean over prompts."""

    k: int
    score: float
    gain: float
    standard_error: float | None
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class Search:
    """What was tried after one step. `accepted_k` 0 is plain distillation; `skipped` says why nothing was tried."""

    step: int
    update_norm: float
    score: float | None = None
    candidates: tuple[Candidate, ...] = ()
    num_responses: int = 0
    seconds: float = 0.0
    skipped: str | None = None

    @property
    def accepted_k(self) -> int:
        return max((candidate.k for candidate in self.candidates if candidate.accepted), default=0)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "accepted_k": self.accepted_k}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Search:
        """Return what `to_json` was made of; TypeError or KeyError for another record."""
        fields = {key: value for key, value in record.items() if key not in ("accepted_k", "candidates")}
        search = cls(**fields, candidates=tuple(Candidate(**candidate) for candidate in record["candidates"]))
        if type(search.step) is not int or type(search.update_norm) is not float or search.accepted_k != record["accepted_k"]:
            raise TypeError(f"{record} is no search")
        return search

    def metrics(self) -> dict[str, float | int]:
        """Return what metrics.jsonl has of it, at its step."""
        best = max((one.score for one in self.candidates if one.accepted), default=self.score)
        return {
            "effopd_update_norm": self.update_norm,
            "effopd_accepted_k": self.accepted_k,
            "effopd_candidates": len(self.candidates),
            "effopd_responses": self.num_responses,
            **({"effopd_score_before": self.score, "effopd_score_after": best} if self.score is not None and best is not None else {}),
        }

    def summary(self) -> str:
        """Return one line for the log."""
        if self.skipped is not None:
            return f"no extrapolation after step {self.step}: {self.skipped}"
        tried = ", ".join(f"k={one.k} {one.score:.4g}{_plus_minus(one.standard_error)}" for one in self.candidates)
        taken = f"k={self.accepted_k} accepted" if self.accepted_k else "none accepted"
        return f"extrapolation after step {self.step}: {taken}; score {self.score:.4g}, {tried} ({self.num_responses} responses, {self.seconds:.1f} s)"


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" (gain ±{error:.2g})"


@dataclass(kw_only=True)
class EffOPD:
    """The search of one run. Every rank of the student has one and calls it alike; `anchor` and `history` are all of its state."""

    settings: EffOPDConfig
    student: Student
    score: SearchScore
    # Names of the rows that move.
    moved: frozenset[str]
    note: Callable[[str], None]
    history: list[Search] = field(default_factory=list)
    # This rank's shards of the weights that the last search left, by row name, in host memory.
    anchor: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with self.student.optimizer_on_device():
            self.anchor = host_copy(self._shards())

    def is_pending(self, step: int) -> bool:
        """Return whether the search that follows this step is still to be made."""
        return self.settings.is_due(step) and not any(search.step == step for search in self.history)

    def maybe_probe(self, step: int, should_stop: Callable[[], bool]) -> Search | None:
        """Search where one follows this step; return what came of it.

        None, with the weights as they were, if none is due or all ranks `should_stop` in between: then it is made after the resume. So it is after a
        ValueError, which all ranks raise together; any other error ends the job, whose checkpoint has the weights before the search.
        """
        if not self.is_pending(step):
            return None
        started = time.perf_counter()
        with self.student.optimizer_on_device():
            shards = self._shards()
            backup = host_copy(shards)
            norm = self._norm(shards)
        if not math.isfinite(norm):
            search: Search | None = Search(step=step, update_norm=norm, skipped="the update holds numbers that are not finite")
        elif norm == 0:
            search = Search(step=step, update_norm=norm, skipped="no weight has moved since the last search")
        else:
            search = self._search(step, norm, backup, should_stop)
        if search is None:
            return None
        if search.accepted_k:
            with self.student.optimizer_on_device():
                if self.settings.reset_moments:
                    restart_adam(self.student.optimizer)
                # In the place of the old anchor: there are never more than two copies.
                for shard in self._shards():
                    self.anchor[shard.row.name].copy_(shard.master.detach())
        else:
            self.anchor = backup
        if not self.history:
            self.note(describe_moved(self.student, self.moved))
        search = replace(search, seconds=time.perf_counter() - started)
        self.history.append(search)
        self.note(search.summary())
        return search

    def _search(self, step: int, norm: float, backup: Mapping[str, torch.Tensor], should_stop: Callable[[], bool]) -> Search | None:
        """Return the search with the weights at its last accepted candidate; None, at `backup`, if it was to stop."""
        measure = self.score.begin(step)
        best = measure()
        if not math.isfinite(best.score):
            return Search(step=step, update_norm=norm, num_responses=best.num_responses, skipped=f"the weights before it score {best.score}")
        if self.settings.accept == "ge" and best.marks and not any(best.marks):
            return Search(step=step, update_norm=norm, num_responses=best.num_responses, skipped="no answer is right, and nothing can be worse than that")
        first, candidates, responses, kept = best.score, [], best.num_responses, 0
        try:
            for k in range(1, self.settings.max_k + 1):
                if should_stop():
                    # What was accepted so far is not kept: the whole search is made again.
                    self._go_to(0, backup)
                    return None
                is_finite = self._go_to(k, backup)
                scored = measure() if is_finite else Scored(math.nan)
                candidate = self._judge(k, scored, best)
                candidates.append(candidate)
                responses += scored.num_responses
                if not candidate.accepted:
                    break
                best, kept = scored, k
        except ValueError:
            # All ranks are here. After another error they may not be, and the collective within would wait for those that are elsewhere.
            self._go_to(0, backup)
            raise
        if kept != len(candidates):
            self._go_to(kept, backup)
        return Search(step=step, update_norm=norm, score=first, candidates=tuple(candidates), num_responses=responses)

    def _judge(self, k: int, scored: Scored, best: Scored) -> Candidate:
        """Compare a candidate with the best before it; rank 0 decides."""
        gain, needed = scored.score - best.score, self.settings.min_gain
        accepted = math.isfinite(scored.score) and (gain > needed or (self.settings.accept == "ge" and gain >= needed))
        return Candidate(k=k, score=scored.score, gain=gain, standard_error=_paired_error(scored.marks, best.marks), accepted=agreed_by_rank_0(accepted))

    @torch.no_grad()
    def _go_to(self, k: int, backup: Mapping[str, torch.Tensor]) -> bool:
        """Set masters and weights to candidate k; 0 is the weights before the search, bit for bit. Return, the same on every rank, whether all are finite."""
        with self.student.optimizer_on_device():
            shards = self._shards()
            if k == 0:
                put_back(self.student, shards, backup)
            else:
                for shard in shards:
                    weight, anchor = backup[shard.row.name].to(shard.master), self.anchor[shard.row.name].to(shard.master)
                    shard.master.copy_(_extrapolated(weight, anchor, k * self.settings.spacing))
                publish(self.student)
            return are_finite(self.student, shards)

    def anchor_slices(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the anchor for a checkpoint, in whole slices: this rank's where it is the first of its replicas, none elsewhere. Every rank calls it."""
        shards, slices = self._shards(), {}
        parameters = {name: parameter for name, parameter in named_global_parameters(self.student.model, self.student.architecture) if name in self.moved}
        for name, whole in whole_slices(self.student, self.moved, shards, self.anchor):
            if self.student.groups.writer == 0 or not getattr(parameters[name], "allreduce", True):
                slices[parameters[name]] = whole
        return slices

    def empty_slices(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return where a checkpoint's anchor is loaded to."""
        named = named_global_parameters(self.student.model, self.student.architecture)
        return {parameter: torch.empty(parameter.shape, dtype=torch.float32) for name, parameter in named if name in self.moved}

    def resume(self, history: Sequence[Search], slices: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        """Go on where a checkpoint stopped."""
        self.history = list(history)
        for shard in self._shards():
            self.anchor[shard.row.name] = slices[shard.parameter].flatten()[shard.start : shard.stop].clone()

    def _norm(self, shards: list[MasterShard]) -> float:
        """Return the Frobenius norm of what moved since the anchor, the same on every rank."""
        total = sum(update.squared_norm for update in module_updates(self.student, shards, self.anchor, self.moved))
        return agreed_by_rank_0(math.sqrt(total) if total >= 0 else math.nan)

    def _shards(self) -> list[MasterShard]:
        return master_shards(self.student, self.moved)


def _paired_error(marks: Sequence[float], others: Sequence[float]) -> float | None:
    """Return the standard error of the mean difference of marks for the same prompts."""
    if len(marks) < 2 or len(marks) != len(others):
        return None
    gains = [one - other for one, other in zip(marks, others, strict=True)]
    mean = sum(gains) / len(gains)
    return math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains))


def describe_moved(student: Student, moved: frozenset[str]) -> str:
    """Return which tensors an extrapolation moves and which it does not, by their kind: for the log, at the first search."""
    parts = []
    for what, chosen in (("moves", True), ("leaves", False)):
        kinds: dict[str, tuple[int, int]] = {}
        for row in weight_map(student.architecture):
            if (row.name in moved) == chosen:
                tensors, numbers = kinds.get(module_kind(row), (0, 0))
                kinds[module_kind(row)] = tensors + 1, numbers + math.prod(row.shape)
        told = ", ".join(f"{kind} ({tensors} tensors, {4 * numbers:,} bytes in fp32)" for kind, (tensors, numbers) in kinds.items())
        parts.append(f"{what} {told or 'nothing'}")
    return f"an extrapolation {'; '.join(parts)}"
