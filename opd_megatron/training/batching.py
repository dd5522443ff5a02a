"""A step's samples -> the micro-batches of one student replica."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from opd_megatron.data.batches import pad_samples
from opd_megatron.parallel.context import padded_length
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.training.objective import MicroBatch
from opd_megatron.training.student import Student


def make_micro_batches(student: Student, rollouts: Rollouts, teacher_hidden: Mapping[int, torch.Tensor]) -> list[MicroBatch]:
    """Return this replica's share. Each is padded to the longest sample of the whole step: pipeline stages exchange one shape.

    `teacher_hidden` holds the scored rows [R, G] of this context rank for every sample of the share on the last stage; it is empty elsewhere and
    without a teacher.
    """
    groups, size = student.groups, student.micro_batch
    share = rollouts.share(groups.data_rank, groups.data_size)
    length = padded_length(rollouts.longest, groups.layout)
    batches = []
    for start in range(share.start, share.stop, size):
        chosen = range(start, start + size)
        batch = pad_samples([rollouts.samples[index] for index in chosen], length=length, device=student.device)
        batch = batch.context_window(size=groups.layout.context, rank=groups.cell.context)
        hidden_TG = torch.cat([teacher_hidden[index] for index in chosen]) if teacher_hidden else None
        batches.append(MicroBatch(batch=batch, teacher_hidden_TG=hidden_TG))
    return batches
