"""Before training: does the teacher's path give the student's own divergence as zero?

The student's weights are loaded as a teacher, in the teacher's layout, and score some text. Whatever differs between the two paths
(an offset of one token, a wrong shard, a lost position) shows here as a divergence, before a GPU hour is spent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from opd_megatron.data.batches import Sample
from opd_megatron.data.prompts import Prompt
from opd_megatron.models.gpt import without_fp8
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.teacher.teacher import Teacher
from opd_megatron.training.objective import Objective
from opd_megatron.training.student import Student

# Nats a token. Layouts differ in the order of sums: about 1e-7 in fp32; in bf16 every hidden value keeps 8 bits.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def check_self_divergence(
    student: Student, own_weights: Teacher, objective: Objective, prompts: list[Prompt], align: Callable[[Rollouts], Rollouts] | None = None
) -> float:
    """Return the divergence per token of the student from its own weights as a teacher; ValueError if it is not zero within rounding.

    One micro-batch per replica: each prompt's second half is scored as if it were the response. `align` gives it units, where the objective compares those.
    """
    count = student.groups.data_size * student.batches.micro_batch
    # A prompt of one token has no half to score.
    usable = [prompt for prompt in prompts if len(prompt.ids) > 1] or prompts
    chosen = [usable[index % len(usable)] for index in range(count)]
    rollouts = Rollouts(tuple(_halved(prompt) for prompt in chosen), policy_version=0)
    if align is not None:
        rollouts = align(rollouts)
    # The path is tested, not what 8-bit products round.
    with without_fp8(student.model):
        sums = student.measure(student.micro_batches(rollouts, own_weights.score(rollouts)), objective)
    divergence = sums.per_row(sums.divergence)
    tolerance = _TOLERANCE[own_weights.dtype]
    if not math.isfinite(divergence) or abs(divergence) > tolerance:
        raise ValueError(
            f"self-test failed: the student's own weights as teacher diverge by {divergence:.3g} nats a token, more than {tolerance:g}; "
            "the two layouts do not compute the same model. Try equal layouts, and report this; teacher.self_test=false skips the test"
        )
    return divergence


def _halved(prompt: Prompt) -> Sample:
    ids = torch.tensor(prompt.ids)
    middle = max(1, len(ids) // 2)
    return Sample(prompt.index, 0, ids[:middle], ids[middle:], None, True)
