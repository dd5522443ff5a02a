"""The student as a writer: with its weights as they lie, or by a copy of them in a layout of its own (`rollout.layout`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from opd_megatron.config import RunConfig
from opd_megatron.models.gpt import ModelChunks, build_gpt
from opd_megatron.models.weights import WeightSource
from opd_megatron.parallel.groups import ModelGroups, teacher_groups
from opd_megatron.parallel.world import own_world, shared_errors
from opd_megatron.rollout.choice import agreed_choice, choose_engine, make_engine
from opd_megatron.rollout.engine import Response, RolloutEngine
from opd_megatron.rollout.sampling import SamplingSettings
from opd_megatron.teacher.transfer import choose_sources, held_slices, model_sinks
from opd_megatron.training.self_teacher import student_transfer
from opd_megatron.training.student import Student


def student_engine(
    config: RunConfig, source: WeightSource, student: Student, *, vocab_size: int, eos_ids: Sequence[int], note: Callable[[str], None]
) -> RolloutEngine:
    """Return what writes rollouts, answers to held-out prompts, and those of EffOPD's candidates; every rank of the student calls it."""
    layout = config.copy_layout
    groups = student.groups if layout is None else teacher_groups(layout)
    with shared_errors():
        choice = choose_engine(config.rollout.engine, source.architecture, groups, config.training.precision)
    choice = agreed_choice(choice)
    note(str(choice))

    def engine_of(model: ModelChunks) -> RolloutEngine:
        return make_engine(choice, model, groups, config.rollout, vocab_size=vocab_size, eos_ids=eos_ids)

    if layout is None:
        return engine_of(student.model)
    note(groups.picture("rollout"))
    return WritingCopy(student, groups, config, source, engine_of)


class WritingCopy:
    """A second model on the student's ranks, filled from the student's weights whenever it writes; between its uses it holds no memory."""

    def __init__(
        self, student: Student, groups: ModelGroups, config: RunConfig, source: WeightSource, engine_of: Callable[[ModelChunks], RolloutEngine]
    ) -> None:
        architecture = source.architecture
        self.groups = groups
        self.model = build_gpt(architecture, groups, precision=config.training.precision, vocab_multiple=1).to(student.device)
        self.model.requires_grad_(False)
        self.model.eval()
        self._engine = engine_of(self.model)
        self._held = held_slices(student.model, student.groups, architecture)
        world = own_world()
        self._transfer = student_transfer(config, source, world, choose_sources(architecture, world, self._held), student.device)
        self._sinks = model_sinks(self.model, groups, architecture, vocab_multiple=1)
        self._storages = [parameter.untyped_storage() for parameter in self.model.parameters()]
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._vacate()

    @property
    def vocab_size(self) -> int:
        return self._engine.vocab_size

    def generate(self, prompts: Sequence[Sequence[int]], keys: Sequence[tuple[int | str, ...]], settings: SamplingSettings) -> list[Response]:
        """Write with the student's weights of this moment; every rank of the student calls it, with prompts or without."""
        with self._with_weights():
            return self._engine.generate(prompts, keys, settings)

    @contextmanager
    def _with_weights(self) -> Iterator[None]:
        """Have the copy's weights on the device, equal to the student's."""
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
        try:
            self._transfer.run(self._own, self._sinks)
            yield
        finally:
            self._vacate()

    def _own(self, name: str) -> torch.Tensor:
        # A parameter's memory moves: with `Student.train_only` from one gradient buffer to another.
        return self._held[name].parameter.detach()

    def _vacate(self) -> None:
        """Give the memory back; nothing is kept, since the weights have changed by the next use."""
        for storage in self._storages:
            storage.resize_(0)
