"""A step's samples -> the micro-batches of one student replica."""

from __future__ import annotations

from opd_megatron.data.batches import pack_samples, pad_samples
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.teacher.teacher import TeacherRows
from opd_megatron.training.objective import MicroBatch
from opd_megatron.training.student import Student


def make_micro_batches(student: Student, rollouts: Rollouts, teacher: TeacherRows | None) -> list[MicroBatch]:
    """Return this replica's micro-batches, as this context rank sees them.

    `teacher` has the scored rows of every sample of the replica on the last stage; it is None on the others and without a teacher.
    """
    groups = student.groups
    plan = student.batches.plan(rollouts.num_tokens)
    batches = []
    for chosen in plan.micro_batches[groups.data_rank]:
        samples = [rollouts.samples[index] for index in chosen]
        if plan.packed:
            batch = pack_samples(samples, [plan.lengths[index] for index in chosen], row_length=plan.row_length, device=student.device)
        else:
            batch = pad_samples(samples, length=plan.row_length, num_rows=plan.num_rows, device=student.device)
        batch = batch.context_window(size=groups.layout.context, rank=groups.cell.context)
        batches.append(MicroBatch(batch=batch, teacher_hidden_TG=teacher.of(chosen) if teacher is not None else None))
    return batches
