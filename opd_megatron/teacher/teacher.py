"""The teacher as the student's ranks see it: its LM head, and hidden states of what the student wrote, wherever the model is.

Shapes: R scored positions of one sample, G teacher hidden, W slice of the student's padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from opd_megatron.align.rows import PairedShard
from opd_megatron.models.weights import WeightSource, load_head_rows, load_head_slice
from opd_megatron.parallel.groups import ModelGroups
from opd_megatron.parallel.world import shared_errors
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.teacher.routing import Courier, Route, Router
from opd_megatron.teacher.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class Score:
    """Ask the teacher's own ranks for the hidden states of these samples."""

    rollouts: Rollouts


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """Tell them that the student's weights, which are the teacher's, come now, and from which ranks: `transfer.WeightTransfer`."""

    sources: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Ask them how well the teacher itself answers the held-out prompts."""


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Tell them that this teacher is not needed any more, and how the run ended if it did; `refused` is the user's mistake."""

    status: Literal["finished", "interrupted", "refused"] | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherRows:
    """Hidden states [R, G] by sample, at the scored positions that this rank's context window of the student holds; `nothing` has none, [0, G]."""

    rows: Mapping[int, torch.Tensor]
    nothing: torch.Tensor

    def of(self, samples: Sequence[int]) -> torch.Tensor:
        """Return the rows [T, G] of these samples, one after another."""
        return torch.cat([self.nothing, *(self.rows[index] for index in samples if index in self.rows)])


class Teacher:
    """Its LM head, cut as the student's vocabulary is, and the way to its hidden states: `scorer` on these ranks, or ranks of its own."""

    def __init__(
        self,
        source: WeightSource,
        router: Router,
        scorer: Scorer | None,
        student_groups: ModelGroups,
        *,
        student_padded_vocab: int,
        device: torch.device,
        shard: PairedShard | None = None,
    ) -> None:
        """Load this rank's rows of the head; `shard` says which, where the teacher's tokenizer is another one."""
        self.scorer = scorer
        self.shard = shard
        self.logit_softcap = source.architecture.logit_softcap
        self.dtype = router.dtype
        self.device = device
        # Of the last batch: what reached the student's tensor groups, and what their ranks then sent each other.
        self.payload_bytes = 0
        self.gathered_bytes = 0
        self._router = router
        self._student_groups = student_groups
        self._asked: tuple[Rollouts, tuple[Route, ...]] | None = None
        # Brings the weights up to date where they are the student's and move.
        self.refresh: Callable[[], None] | None = None
        self.head_WG: torch.Tensor | None = None
        with shared_errors():
            if student_groups.is_last_stage:
                if shard is None:
                    head_WG = load_head_slice(source, student_groups, padded_vocab=student_padded_vocab, dtype=self.dtype)
                else:
                    head_WG = load_head_rows(source, shard.teacher_ids_C.cpu(), dtype=self.dtype)
                self.head_WG = head_WG.to(device)

    def ask(self, rollouts: Rollouts) -> None:
        """Have these samples scored. A teacher on ranks of its own begins now; one batch at a time."""
        assert self._asked is None, "the last batch was not fetched"
        # What cannot be routed is refused here, on ranks that can say why.
        self._asked = rollouts, self._router.routes(rollouts)
        if self.refresh is not None:
            self.refresh()
        if self.scorer is None:
            self._router.bridge.tell_teacher(Score(rollouts=rollouts))

    def fetch(self) -> TeacherRows | None:
        """Return the hidden states of the batch asked for, at the scored positions of this rank's student replica; None before the last stage."""
        assert self._asked is not None, "nothing was asked for"
        (rollouts, routes), self._asked = self._asked, None
        self.payload_bytes = sum(route.plan.sent_rows() for route in routes) * self._router.row_bytes
        self.gathered_bytes = sum(route.plan.gathered_rows() for route in routes) * self._router.row_bytes
        courier = Courier(self._router, routes, self.device, tp_group=self._student_groups.collection.tp)
        if self.scorer is not None:
            self.scorer.score(rollouts, courier.send, num_rounds=self._router.num_rounds)
        received = courier.finish()
        if not self._student_groups.is_last_stage:
            return None
        return TeacherRows(rows=received, nothing=torch.empty(0, self._router.width, dtype=self.dtype, device=self.device))

    def score(self, rollouts: Rollouts) -> TeacherRows | None:
        """Ask and fetch."""
        self.ask(rollouts)
        return self.fetch()

    def evaluate(self) -> dict[str, Any] | None:
        """Return what ranks of its own measured on the held-out prompts, on every rank of the student."""
        assert self.scorer is None
        self._router.bridge.tell_teacher(Evaluate())
        record: dict[str, Any] | None = self._router.bridge.told_by_teacher()
        return record

    def drain(self) -> None:
        """Take what ranks of its own still hold for the student, so that they listen again."""
        if self.scorer is None and self._asked is not None:
            self.fetch()

    def leave(self) -> None:
        """Let ranks of its own go on to the next teacher."""
        if self.scorer is None:
            self._router.bridge.tell_teacher(Leave())
