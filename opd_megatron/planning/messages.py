"""What one rank sends in one optimizer step, by process group: how many messages and of how many bytes.

Bytes are those of the tensor that a collective works on, not of the traffic that an algorithm makes of it. Left out: a handful of scalars a step
(sums of the loss, the gradient norm), the exchange of sampled tokens, and evaluation.
Shapes: B sequences, S padded length, T scored positions of a micro-batch, N tokens of one chunk, H / G hidden sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opd_megatron.parallel.layout import replica_share
from opd_megatron.planning.activations import FP32_BYTES
from opd_megatron.planning.ranks import PlannedModel, PlannedRank
from opd_megatron.planning.step_shape import StepShape

# Values per token that a chunk of the loss exchanges at most: maxima in fp32, then sums in fp64 (masses, moments, the picked logit and its owner).
_LOSS_VALUES = {"maxima": (2, FP32_BYTES), "sums": (6, 8)}


@dataclass(frozen=True, kw_only=True)
class Message:
    """`count` messages of `num_bytes` bytes each, from one rank, in one step."""

    phase: str
    group: str
    operation: str
    count: int
    num_bytes: int
    why: str


def rank_messages(rank: PlannedRank) -> list[Message]:
    """Return what a rank sends; nothing is listed of a group of one."""
    shape = StepShape(rank)
    found = [*_rollout(rank, shape), *_teacher(rank, shape), *_training(rank, shape), *_optimizer(rank)]
    return [message for message in found if message.count]


def _rollout(rank: PlannedRank, shape: StepShape) -> Iterator[Message]:
    """Every token is one pass through the pipeline of all sequences that are decoded together."""
    config, student = rank.config, rank.student
    if config.training.objective != "opd" or config.rollout.replay:
        return
    batch = shape.decoded_sequences(student, config.num_sequences)
    own = len(replica_share(config.num_sequences, student.groups.writer, student.groups.num_writers))
    passes = -(-own // batch) * shape.response_tokens
    yield from _forward(student, "rollout", passes, batch * _row_bytes(student), "a token of [B, H]; the prompt's pass is larger")
    groups = student.groups
    if groups.layout.tensor > 1 and groups.is_last_stage:
        num_bytes = FP32_BYTES * batch * rank.padded_vocab
        yield Message(phase="rollout", group="student TP", operation="all-gather", count=passes, num_bytes=num_bytes, why="logits [B, V], fp32")
    if groups.layout.tensor * groups.layout.pipeline > 1:
        yield Message(phase="rollout", group="student TP x PP", operation="broadcast", count=passes, num_bytes=16 * batch, why="token and log-probability")


def _teacher(rank: PlannedRank, shape: StepShape) -> Iterator[Message]:
    """One forward for each batch of the share, then the hidden states to the student's last stage."""
    teacher = rank.teacher
    if teacher is None:
        return
    tokens, batches = shape.teacher_batch_tokens, shape.num_teacher_batches
    yield from _forward(teacher, "teacher", batches, tokens * _row_bytes(teacher), "[S, B, G]")
    if teacher.groups.layout.context > 1:
        num_bytes, why = tokens * teacher.groups.layout.context * _key_value_bytes(teacher), "keys and values of a layer, of all positions"
        yield Message(phase="teacher", group="teacher CP", operation="all-gather", count=batches * teacher.num_layers, num_bytes=num_bytes, why=why)
    sent = rank.payload.sent_rows(rank.rank)
    largest = max(sent, default=0) * _row_bytes(teacher)
    yield Message(
        phase="teacher", group="payload", operation="send", count=len(sent), num_bytes=largest, why="hidden states [R, G] of its samples; the largest"
    )
    if gathered := rank.payload.gathered_rows(rank.rank):
        why = "hidden states [N, G] of shares that came from outside the tensor group; the largest"
        yield Message(phase="teacher", group="student TP", operation="all-gather", count=len(gathered), num_bytes=max(gathered) * _row_bytes(teacher), why=why)


def _forward(model: PlannedModel, phase: str, passes: int, num_bytes: int, why: str) -> Iterator[Message]:
    """Passes without gradients, in which no sequence is split: two sums a layer, one after the embedding, and one send to the next stage."""
    groups, role = model.groups, "student" if phase == "rollout" else "teacher"
    if groups.layout.tensor > 1:
        count = passes * (2 * model.num_layers + groups.is_first_stage)
        yield Message(phase=phase, group=f"{role} TP", operation="all-reduce", count=count, num_bytes=num_bytes, why=f"2 a layer, 1 embedding: {why}")
    if not groups.is_last_stage:
        yield Message(phase=phase, group=f"{role} PP", operation="send", count=passes, num_bytes=num_bytes, why=why)


def _training(rank: PlannedRank, shape: StepShape) -> Iterator[Message]:
    """Forward and backward of every micro-batch."""
    student, batches = rank.student, shape.num_micro_batches
    groups, layout = student.groups, student.groups.layout
    activation = shape.micro_batch_tokens * _row_bytes(student)

    def tensor(operation: str, per_batch: int, why: str, num_bytes: int = activation) -> Message:
        return Message(phase="train", group="student TP", operation=operation, count=batches * per_batch, num_bytes=num_bytes, why=why)

    if layout.tensor > 1:
        layers, first, last = student.num_layers, groups.is_first_stage, groups.is_last_stage
        if layout.sequence:
            yield tensor("all-gather", 2 * layers + last, "forward: 2 a layer, 1 before the head: [S, B, H]")
            yield tensor("reduce-scatter", 2 * layers + first, "forward: 2 a layer, 1 embedding: [S, B, H]")
            # The input of a split projection is gathered again for the gradient of its weight.
            yield tensor("all-gather", 4 * layers + first, "backward: 4 a layer, 1 embedding: [S, B, H]")
            yield tensor("reduce-scatter", 2 * layers + last, "backward: 2 a layer, 1 before the head: [S, B, H]")
        else:
            yield tensor("all-reduce", 2 * layers + first, "forward: 2 a layer, 1 embedding: [S, B, H]")
            yield tensor("all-reduce", 2 * layers, "backward: 2 a layer: [S, B, H]")
            yield tensor("all-reduce", last, "backward: hidden states before the head: [T, H]", shape.scored_tokens * _row_bytes(student))
        if last:
            yield from _loss(rank, shape)
    if layout.context > 1:
        count, num_bytes = batches * student.num_layers, shape.micro_batch_tokens * layout.context * _key_value_bytes(student)
        why = "keys and values of a layer, of all positions"
        yield Message(phase="train", group="student CP", operation="all-gather", count=count, num_bytes=num_bytes, why=f"forward: {why}")
        yield Message(phase="train", group="student CP", operation="reduce-scatter", count=count, num_bytes=num_bytes, why=f"backward: {why}")
    sends = batches * ((not groups.is_last_stage) + (not groups.is_first_stage))
    num_bytes = activation // (layout.tensor if layout.sequence else 1)
    yield Message(phase="train", group="student PP", operation="send", count=sends, num_bytes=num_bytes, why="forward and backward [S, B, H]")


def _loss(rank: PlannedRank, shape: StepShape) -> Iterator[Message]:
    """Two collectives per chunk in the forward, one for k1 and k3, none in the backward: `losses.fused_head`."""
    one_for_both = rank.config.training.objective == "opd" and rank.config.loss.kind in ("k1", "k3")
    chunks = shape.chunk_tokens
    values = ["sums"] if one_for_both else ["maxima", "sums"]
    for name in values:
        number, itemsize = _LOSS_VALUES[name]
        count, num_bytes = shape.num_micro_batches * len(chunks), number * itemsize * max(chunks, default=0)
        why = f"loss: {name} of {len(chunks)} chunks a micro-batch, at most {number} values a token"
        yield Message(phase="train", group="student TP", operation="all-reduce or all-gather", count=count, num_bytes=num_bytes, why=why)


def _optimizer(rank: PlannedRank) -> Iterator[Message]:
    """Once a step: gradients to the replica that updates them, updated weights back."""
    student, groups, layout = rank.student, rank.student.groups, rank.student.groups.layout
    at_an_end = groups.is_first_stage or groups.is_last_stage
    tied = rank.padded_vocab // layout.tensor * student.known.architecture.hidden_size
    shared = tied if student.known.architecture.tied and layout.pipeline > 1 and at_an_end else 0
    # An embedding that two stages share has a bucket of its own.
    for count, what in ((student.num_parameters - shared, "parameters"), (shared, "parameters of the tied embedding")):
        if groups.num_writers > 1 and count:
            gradients, weights = f"gradients of {count:,} {what}, fp32", f"{count:,} updated {what}"
            yield Message(phase="optimizer", group="student DP x CP", operation="reduce-scatter", count=1, num_bytes=count * FP32_BYTES, why=gradients)
            yield Message(phase="optimizer", group="student DP x CP", operation="all-gather", count=1, num_bytes=count * student.dtype.itemsize, why=weights)
    if shared:
        why = "gradient of the tied embedding [W, H], fp32, between first and last stage"
        yield Message(phase="optimizer", group="student PP ends", operation="all-reduce", count=1, num_bytes=FP32_BYTES * shared, why=why)
    partial = _partial_gradients(student)
    if partial:
        why = "gradients of norms that saw a part of the sequence, or of the heads, fp32"
        yield Message(phase="optimizer", group="student TP", operation="all-reduce", count=1, num_bytes=FP32_BYTES * partial, why=why)


def _partial_gradients(model: PlannedModel) -> int:
    """Return how many parameters every tensor rank holds whole and has only a part of the gradient of."""
    if model.groups.layout.tensor == 1:
        return 0
    return sum(
        parameter.numel()
        for name, parameter in model.model.named_parameters()
        if getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name
    )


def _key_value_bytes(model: PlannedModel) -> int:
    """Return the bytes of one token's keys and values in one layer on one tensor rank."""
    architecture = model.known.architecture
    return 2 * architecture.num_kv_heads // model.groups.layout.tensor * architecture.head_dim * model.dtype.itemsize


def _row_bytes(model: PlannedModel) -> int:
    return model.known.architecture.hidden_size * model.dtype.itemsize
