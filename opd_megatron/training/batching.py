"""A step's samples -> the micro-batches of one student replica."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from opd_megatron.data.batches import pad_samples
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.training.objective import MicroBatch
from opd_megatron.training.student import Student


def make_micro_batches(student: Student, rollouts: Rollouts, teacher_hidden: Mapping[int, torch.Tensor]) -> list[MicroBatch]:
    """Return this replica's share. Each is padded to the longest sample of the whole step: pipeline stages exchange one shape.

    `teacher_hidden` holds [R, G] for every sample of the share on the last stage, and is empty elsewhere and without a teacher.
    """
    layout, size = student.groups.layout, student.micro_batch
    share = rollouts.share(student.groups.data_rank, student.groups.data_size)
    length = max(sample.num_tokens for sample in rollouts.samples)
    multiple = layout.tensor if layout.sequence else 1
    batches = []
    for start in range(share.start, share.stop, size):
        chosen = range(start, start + size)
        batch = pad_samples([rollouts.samples[index] for index in chosen], multiple=multiple, length=length, device=student.device)
        hidden_TG = torch.cat([teacher_hidden[index] for index in chosen]) if teacher_hidden else None
        batches.append(MicroBatch(batch=batch, teacher_hidden_TG=hidden_TG))
    return batches
