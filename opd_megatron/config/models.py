"""The two models of a run: where their weights come from, and how each is spread over ranks. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from opd_megatron.config.checks import require


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How one model is spread over ranks; what is left of the world is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    # Chunks of layers that one pipeline rank holds, each `pipeline` chunks further on: shorter bubbles, more messages.
    virtual: int = 1
    context: int = 1
    expert: int = 1
    # Splits one expert's matrices, whatever `tensor` splits.
    expert_tensor: int = 1
    sequence: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual", "context", "expert", "expert_tensor"):
            size = getattr(self, name)
            require(size >= 1, f"layout.{name}={size} must be at least 1")
        require(self.virtual == 1 or self.pipeline > 1, f"layout.virtual={self.virtual} cuts pipeline stages into chunks; it needs layout.pipeline > 1")
        require(not self.sequence or self.tensor > 1, f"layout.sequence=true needs layout.tensor > 1, got tensor={self.tensor}")

    @property
    def model_size(self) -> int:
        return self.tensor * self.pipeline * self.context

    @property
    def replicas_share_experts(self) -> bool:
        """Whether a token's experts may be on ranks of another replica or context part."""
        return self.expert > 1 or self.tensor % self.expert_tensor > 0

    @property
    def sequence_multiple(self) -> int:
        """What the length of every sequence must be a multiple of: two chunks for each context rank."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def row_multiple(self) -> int:
        """What the length of a row of sequences must be a multiple of: under sequence parallelism its chunks are split over the tensor group."""
        return self.sequence_multiple * (self.tensor if self.sequence else 1)

    def data_size(self, world_size: int) -> int:
        """Return how many replicas fit, or say which product does not divide the world."""
        size = self.model_size
        if world_size % size:
            usable = size * (world_size // size)
            way_out = f"use {usable} ranks or change the layout" if usable else f"use at least {size} ranks or change the layout"
            raise ValueError(f"world_size={world_size} is not a multiple of tensor*pipeline*context={size}; {way_out}")
        experts, stage = self.expert * self.expert_tensor, world_size // self.pipeline
        if stage % experts:
            fits = [expert for expert in range(1, stage + 1) if stage % (expert * self.expert_tensor) == 0]
            raise ValueError(f"expert*expert_tensor={experts} does not divide the {stage} ranks of a pipeline stage; use an expert size of {fits}")
        return world_size // size

    def check_ranks(self, role: str, num_ranks: int) -> None:
        """Raise ValueError, naming the model, unless replicas of it fill `num_ranks` ranks."""
        try:
            self.data_size(num_ranks)
        except ValueError as error:
            raise ValueError(f"{role}.layout: {error}") from None

    def describe(self) -> str:
        """Return a short label, e.g. `TP2xPP2+SP`."""
        context = f"xCP{self.context}" if self.context > 1 else ""
        expert = (f"xEP{self.expert}" if self.expert > 1 else "") + (f"xETP{self.expert_tensor}" if self.expert_tensor > 1 else "")
        virtual = f"xVPP{self.virtual}" if self.virtual > 1 else ""
        return f"TP{self.tensor}xPP{self.pipeline}{virtual}{context}{expert}" + ("+SP" if self.sequence else "")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that writes and learns: a Hugging Face folder, or a Megatron checkpoint of this project."""

    hf: str | None = None
    checkpoint: str | None = None
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    # Megatron pads the vocabulary to a multiple of this times `layout.tensor`: tensor cores like 128, tiny models do not.
    vocab_multiple: int = 128

    def __post_init__(self) -> None:
        named = f"student.hf={self.hf!r}, student.checkpoint={self.checkpoint!r}"
        require(bool(self.hf) != bool(self.checkpoint), f"name the student once: {named}; set the other to null")
        require(self.vocab_multiple >= 1, f"student.vocab_multiple={self.vocab_multiple} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model that scores: frozen, or the student itself, which may read more than the student does (`privileged`). Its layout is its own."""

    hf: str | None = None
    checkpoint: str | None = None
    # external: those of `hf` or `checkpoint`. Else the student's: initial, as before step 1; ema, their average over the steps; live, as they are now.
    weights: Literal["external", "initial", "ema", "live"] = "external"
    # weights=ema: the share of the average that an update leaves as it was.
    ema_decay: float = 0.999
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    # colocated: on the student's ranks. offloaded: there too, its weights in pinned host memory while the student writes and trains.
    # dedicated: on the last `num_ranks` ranks of the job, which hold nothing of the student.
    placement: Literal["colocated", "offloaded", "dedicated"] = "colocated"
    num_ranks: int | None = None
    # Dedicated: how many updates the policy that wrote a batch may be behind. With 1 the teacher scores the next batch while the student trains.
    staleness: int = 0
    # At start, the student's own weights are scored through the teacher's path: the divergence must be 0.
    self_test: bool = True
    # Sequences of similar length scored at once by one replica.
    micro_batch: int = 8
    # In how many rounds hidden states travel to the student, each while the next is scored; never more than a replica has micro-batches.
    # 1 sends everything once all is scored: fewest messages, and over gloo, the only place where it was measured, as fast as four rounds (teacher/README.md).
    transfer_rounds: int = 1

    def __post_init__(self) -> None:
        require(self.micro_batch >= 1, f"teacher.micro_batch={self.micro_batch} must be at least 1")
        require(self.transfer_rounds >= 1, f"teacher.transfer_rounds={self.transfer_rounds} must be at least 1, which sends everything at once")
        named = f"teacher.hf={self.hf!r}, teacher.checkpoint={self.checkpoint!r}"
        if self.is_student:
            require(not self.hf and not self.checkpoint, f"teacher.weights={self.weights} are the student's own: {named} would not be read; set it to null")
        else:
            require(bool(self.hf) != bool(self.checkpoint), f"name the teacher once: {named}; set the other to null")
        require(0 <= self.ema_decay < 1, f"teacher.ema_decay={self.ema_decay} must be in [0, 1)")
        require(
            not self.moves or self.staleness == 0,
            f"teacher.staleness={self.staleness} does not go with teacher.weights={self.weights}: the weights of the last batch are gone; set it to 0",
        )
        dedicated = self.placement == "dedicated"
        require(not dedicated or self.num_ranks is not None, "teacher.placement=dedicated needs teacher.num_ranks: how many of the job's last ranks it takes")
        require(dedicated or self.num_ranks is None, f"teacher.num_ranks={self.num_ranks} goes with teacher.placement=dedicated, not {self.placement}")
        require(self.num_ranks is None or self.num_ranks >= 1, f"teacher.num_ranks={self.num_ranks} must be at least 1")
        require(self.staleness in (0, 1), f"teacher.staleness={self.staleness} must be 0 or 1")
        require(dedicated or self.staleness == 0, f"teacher.staleness={self.staleness} needs teacher.placement=dedicated: else nothing runs side by side")
        require(self.layout.virtual == 1, f"teacher.layout.virtual={self.layout.virtual} is of no use: it shortens the bubbles of a backward; set it to 1")
        require(not self.layout.sequence, "teacher.layout.sequence=true is not supported: the teacher keeps no activations, so nothing is saved")

    @property
    def is_student(self) -> bool:
        """Whether the weights are the student's own."""
        return self.weights != "external"

    @property
    def moves(self) -> bool:
        """Whether the weights change with the student's."""
        return self.weights in ("ema", "live")
