"""The teacher's hidden states of one step between the ranks of both models, every prompt and response at its limit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opd_megatron.config import RunConfig
from opd_megatron.data.batch_plan import TrainingBatches, plan_scoring
from opd_megatron.data.batches import Sample
from opd_megatron.parallel.layout import RankGrid
from opd_megatron.parallel.payload import Step
from opd_megatron.teacher.routing import Route, plan_routes


@dataclass(frozen=True)
class Payload:
    """The pieces of all samples, and who sends which to whom, round by round."""

    routes: tuple[Route, ...]

    @property
    def num_messages(self) -> int:
        return sum(len(step.transfers) for step in self._steps)

    @property
    def _steps(self) -> list[Step]:
        return [step for route in self.routes for step in route.plan.steps]

    def all_sent_rows(self) -> int:
        """Return the rows that reach tensor groups from outside."""
        return sum(route.plan.sent_rows() for route in self.routes)

    def all_gathered_rows(self) -> int:
        """Return the rows that ranks receive from their own tensor group."""
        return sum(route.plan.gathered_rows() for route in self.routes)

    def held_rows(self, rank: int) -> int:
        """Return how many rows a rank of the teacher's last stage has."""
        return sum(_held(route, rank) for route in self.routes)

    def needed_rows(self, rank: int) -> int:
        """Return how many rows a rank of the student's last stage trains on."""
        return sum(piece.num_rows for route in self.routes for piece in route.pieces if rank in piece.needers)

    def sent_rows(self, rank: int) -> list[int]:
        """Return the rows of each message that a rank sends, one in every step at most to each target."""
        return [message.num_rows for step in self._steps for message in step.transfers if message.source == rank]

    def gathered_rows(self, rank: int) -> list[int]:
        """Return the rows that each all-gather in which a rank takes part gives it."""
        return [gather.whole_rows for step in self._steps for gather in step.gathers if rank in gather.ranks and len(gather.ranks) > 1]

    def scored_rows(self, rank: int) -> int:
        """Return the most rows that a rank has scored and not let go: of one round, and while it is under way, of the next."""
        held = [_held(route, rank) for route in self.routes]
        return max((sum(held[number : number + 2]) for number in range(len(held))), default=0)

    def buffered_rows(self, rank: int, *, receives: bool) -> int:
        """Return the rows that lie in a rank's messages at once: of one round, and on one that `receives` nothing, of all rounds."""
        buffered = [_buffered(route, rank) for route in self.routes]
        return max(buffered, default=0) if receives else sum(buffered)


def _held(route: Route, rank: int) -> int:
    return sum(piece.num_rows for piece in route.pieces if rank in piece.holders)


def _buffered(route: Route, rank: int) -> int:
    """Return the rows in a rank's messages of one round: all that arrived before a step, and what it sends, receives and puts together there."""
    arrived = most = 0
    for step in route.plan.steps:
        sent = sum(message.num_rows for message in step.transfers if message.source == rank)
        received = sum(message.num_rows for message in step.transfers if message.target == rank)
        gathers = [gather for gather in step.gathers if rank in gather.ranks]
        whole = sum(gather.whole_rows for gather in gathers)
        shares = sum(gather.share_rows for gather in gathers if len(gather.ranks) > 1)
        most = max(most, arrived + sent + received + shares + whole)
        # What was put together stays, and pieces that came whole.
        arrived += whole + received - sum(span.num_rows for gather in gathers for span in gather.shares[gather.ranks.index(rank)])
    return most


def model_grids(config: RunConfig) -> dict[str, RankGrid]:
    """Return where the models of a run are, in the ranks of the whole job; a teacher on ranks of its own has the last. "rollout" is a copy that writes."""
    own = config.num_teacher_ranks
    grids = {"student": RankGrid(layout=config.student.layout, num_ranks=config.world_size - own)}
    if config.copy_layout is not None:
        grids["rollout"] = RankGrid(layout=config.copy_layout, num_ranks=config.world_size - own)
    if config.scoring_teacher is not None:
        grids["teacher"] = RankGrid(layout=config.scoring_teacher.layout, num_ranks=own or config.world_size, first_rank=config.world_size - own if own else 0)
    return grids


def longest_samples(config: RunConfig) -> list[int]:
    """Return the lengths of a step's samples: every prompt and every response at its limit."""
    return [config.data.max_prompt_tokens + config.rollout.max_response_tokens] * config.num_sequences


def step_payload(config: RunConfig, teacher_prompt_tokens: int | None = None) -> Payload:
    """Return the payload of one step; none without a teacher. What it reads has `teacher_prompt_tokens`, by default as many as the student's prompts."""
    grids = model_grids(config)
    if config.scoring_teacher is None:
        return Payload(())
    prompt_tokens = config.data.max_prompt_tokens
    lengths = (prompt_tokens, teacher_prompt_tokens or prompt_tokens, config.rollout.max_response_tokens)
    written, read, response = (torch.zeros(length, dtype=torch.long) for length in lengths)
    samples = [Sample(index, 0, written, response, None, False, read) for index in range(config.num_sequences)]
    teacher, student = grids["teacher"], grids["student"]
    num_read = [sample.as_teacher_reads().num_tokens for sample in samples]
    scoring = plan_scoring(num_read, teacher.layout, teacher.data_size, config.scoring_teacher.micro_batch)
    training = TrainingBatches.of(config, student.data_size).plan(longest_samples(config))
    return Payload(plan_routes(samples, teacher, scoring, student, training, config.scoring_teacher.transfer_rounds))
