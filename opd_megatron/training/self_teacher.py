"""Where the student is its own teacher and its weights move: how the teacher's copy of them, in its own layout, stays current."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from opd_megatron.config import RunConfig
from opd_megatron.models.gpt import DTYPES
from opd_megatron.models.weights import WeightSource
from opd_megatron.parallel.world import Bridge
from opd_megatron.teacher.scorer import Scorer
from opd_megatron.teacher.teacher import Refresh, Teacher
from opd_megatron.teacher.transfer import WeightTransfer, choose_sources, head_sink, held_slices, joined, model_sinks
from opd_megatron.training.average import MovingAverage
from opd_megatron.training.student import Student


def refresh_from(student: Student, teacher: Teacher, config: RunConfig, source: WeightSource, bridge: Bridge) -> Callable[[], None]:
    """Return what brings the student's weights, or their average, to the teacher; every rank of the student calls it. The average begins here."""
    assert config.teacher is not None
    held = held_slices(student.model, student.groups, source.architecture)
    transfer = student_transfer(config, source, bridge, choose_sources(source.architecture, bridge, held), student.device)
    if config.teacher.weights == "ema":
        owned = {name: held[name].parameter for name in transfer.sent_from(bridge.rank)}
        student.average = MovingAverage(owned, config.teacher.ema_decay)
    average, scorer = student.average, teacher.scorer

    def own(name: str) -> torch.Tensor:
        return average.tensors[name] if average is not None else held[name].parameter.detach()

    head = head_sink(teacher.head_WG, student.groups, source.architecture, padded_vocab=student.padded_vocab) if teacher.head_WG is not None else {}

    def refresh() -> None:
        """Bring the teacher's weights up to date, on the student's ranks or on ranks of its own; every rank of the student calls it."""
        if scorer is None:
            bridge.tell_teacher(Refresh(sources=transfer.sources))
            transfer.run(own, head)
        else:
            with scorer.changing_weights():
                transfer.run(own, joined(head, model_sinks(scorer.model, scorer.groups, source.architecture, vocab_multiple=1)))

    return refresh


def take_refresh(message: Refresh, scorer: Scorer, config: RunConfig, source: WeightSource, bridge: Bridge, device: torch.device) -> None:
    """Take the weights that the student sends, on a rank of the teacher's own."""

    def nothing(name: str) -> torch.Tensor:
        raise AssertionError(f"a rank of the teacher's own holds nothing of the student, not {name}")

    with scorer.changing_weights():
        sinks = model_sinks(scorer.model, scorer.groups, source.architecture, vocab_multiple=1)
        student_transfer(config, source, bridge, message.sources, device).run(nothing, sinks)


def student_transfer(config: RunConfig, source: WeightSource, bridge: Bridge, sources: Mapping[str, tuple[int, ...]], device: torch.device) -> WeightTransfer:
    """Return the way of the student's weights to every rank of `bridge`."""
    padded = source.architecture.padded_vocab_size(config.student.layout.tensor, config.student.vocab_multiple)
    return WeightTransfer(
        architecture=source.architecture, bridge=bridge, sources=sources, padded_vocab=padded, dtype=DTYPES[config.training.precision], device=device
    )
