"""What one rank sends in one optimizer step, by process group: how many messages and of how many bytes.

Bytes are those of the tensor that a collective works on, not of the traffic that an algorithm makes of it. Left out: a handful of scalars a step
(sums of the loss, the gradient norm), the exchange of sampled tokens, evaluation, and the probes of EffOPD. Where modules are frozen, the backward's messages
are those of a student that trains whole: autograd leaves out some, below the first layer that trains. Tokens are taken to visit all experts equally often.
Shapes: B sequences, S padded length, T scored positions of a micro-batch, N tokens of one chunk, H / G hidden sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from opd_megatron.models.weight_map import weight_map
from opd_megatron.planning.activations import FP32_BYTES
from opd_megatron.planning.ranks import PlannedModel, PlannedRank
from opd_megatron.planning.step_shape import StepShape

# Counts of tokens are int64.
_INDEX_BYTES = 8
# Values per token that a chunk of the loss exchanges at most: maxima in fp32, then sums in fp64 (masses, moments, the picked logit and its owner).
_LOSS_VALUES = {"maxima": (2, FP32_BYTES), "sums": (6, 8)}
# The same for units of text, where every token is a unit.
_UNIT_VALUES = {"maxima": (6, FP32_BYTES), "sums": (13, 8)}


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
    found: list[Message] = []
    if rank.writing is not None:
        found += _rollout(rank, rank.writing, shape)
    if rank.teacher is not None:
        found += _teacher(rank, rank.teacher, shape)
    if rank.student is not None:
        training = list(_training(rank, rank.student, shape))
        found += [*_weighing(rank, rank.student, shape, training), *training, *_optimizer(rank, rank.student)]
    return [message for message in found if message.count]


def _rollout(rank: PlannedRank, writer: PlannedModel, shape: StepShape) -> Iterator[Message]:
    """Every token is one pass through the pipeline of all sequences that are decoded together; a copy that writes is filled before."""
    config = rank.config
    if config.training.objective != "opd" or config.rollout.replay:
        return
    role = "student" if rank.copy is None else "rollout"
    if rank.copy is not None:
        yield _moved_weights(rank, writer, "rollout", "student's ranks")
    batch, groups = shape.decoded_sequences(writer, config.num_sequences), writer.groups
    passes = _passes(shape, writer, batch)
    yield from _forward(writer, "rollout", role, passes, batch, "a token of [B, H]; the prompt's pass is larger")
    if groups.layout.tensor > 1 and groups.is_last_stage:
        vocab = rank.padded_vocab if rank.copy is None else writer.known.architecture.padded_vocab_size(groups.layout.tensor, 1)
        why = "logits [B, V], fp32"
        yield Message(phase="rollout", group=f"{role} TP", operation="all-gather", count=passes, num_bytes=FP32_BYTES * batch * vocab, why=why)
    if groups.layout.tensor * groups.layout.pipeline > 1:
        yield Message(phase="rollout", group=f"{role} TP x PP", operation="broadcast", count=passes, num_bytes=16 * batch, why="token and log-probability")
    if shape.is_paged(writer) and groups.layout.pipeline > 1:
        yield Message(phase="rollout", group=f"{role} PP", operation="all-reduce", count=1, num_bytes=4, why="how many blocks all stages have")


def _passes(shape: StepShape, writer: PlannedModel, batch: int) -> int:
    """Return the passes in which a writer's sequences reach their limit, `batch` of them at a time."""
    written = shape.written_by(writer)
    if not written or not shape.is_paged(writer):
        return -(-written // batch) * shape.response_tokens
    return shape.pages(writer, written * writer.groups.num_writers, shape.response_tokens).num_steps


def _teacher(rank: PlannedRank, teacher: PlannedModel, shape: StepShape) -> Iterator[Message]:
    """One forward for each batch of the share, then the hidden states to the student's last stage."""
    tokens, batches = shape.teacher_batch_tokens, shape.num_teacher_batches
    yield from _moving_weights(rank, teacher)
    yield from _forward(teacher, "teacher", "teacher", batches, tokens, "[S, B, G]", num_rounds=len(rank.payload.routes))
    if teacher.groups.layout.context > 1:
        num_bytes, why = tokens * teacher.groups.layout.context * _key_value_bytes(teacher), "keys and values of a layer, of all positions"
        yield Message(phase="teacher", group="teacher CP", operation="all-gather", count=batches * teacher.counts.num_layers, num_bytes=num_bytes, why=why)
    sent = rank.payload.sent_rows(rank.rank)
    largest = max(sent, default=0) * _row_bytes(teacher)
    yield Message(
        phase="teacher", group="payload", operation="send", count=len(sent), num_bytes=largest, why="hidden states [R, G] of its samples; the largest"
    )
    if gathered := rank.payload.gathered_rows(rank.rank):
        why = "hidden states [N, G] of shares that came from outside the tensor group; the largest"
        yield Message(phase="teacher", group="student TP", operation="all-gather", count=len(gathered), num_bytes=max(gathered) * _row_bytes(teacher), why=why)


def _moving_weights(rank: PlannedRank, teacher: PlannedModel) -> Iterator[Message]:
    """The student's weights, or their average, to every rank before the teacher scores: `teacher.transfer`."""
    settings = rank.config.scoring_teacher
    if settings is not None and settings.moves:
        yield _moved_weights(rank, teacher, "teacher", "all ranks")


def _moved_weights(rank: PlannedRank, model: PlannedModel, phase: str, group: str) -> Message:
    """The slices of the student's tensors, one after another, to all ranks of a group."""
    rows, layout = weight_map(model.known.architecture), rank.config.student.layout
    num_bytes = sum(math.prod(row.shape) for row in rows) * model.dtype.itemsize
    count = sum(1 if row.split_dim is None else layout.tensor if row.expert is None else layout.expert_tensor for row in rows)
    why = "a slice of one tensor, on average: the whole model in all"
    return Message(phase=phase, group=group, operation="broadcast", count=count, num_bytes=num_bytes // count, why=why)


def _forward(model: PlannedModel, phase: str, role: str, passes: int, tokens: int, why: str, *, num_rounds: int = 1) -> Iterator[Message]:
    """Passes without gradients, in which no sequence is split: sums in every layer, one after the embedding, and one send to the next stage."""
    groups, num_bytes = model.groups, tokens * _row_bytes(model)
    if groups.layout.tensor > 1:
        per_layer = _split_blocks(model)
        count = passes * (per_layer * model.counts.num_layers + groups.is_first_stage)
        yield Message(phase=phase, group=f"{role} TP", operation="all-reduce", count=count, num_bytes=num_bytes, why=f"{per_layer} a layer, 1 embedding: {why}")
    if groups.layout.replicas_share_experts:
        step_why = "whether any replica has text, before each pass and once a round in vain"
        yield Message(phase=phase, group=f"{role} TP x CP x DP", operation="all-reduce", count=passes + num_rounds, num_bytes=FP32_BYTES, why=step_why)
    yield from _experts(model, phase, role, passes, tokens)
    sends = passes * (groups.layout.virtual - groups.is_last_stage)
    yield Message(phase=phase, group=f"{role} PP", operation="send", count=sends, num_bytes=num_bytes, why=why)


def _split_blocks(model: PlannedModel) -> int:
    """Return how many blocks of a layer the tensor group splits: attention, and a feed-forward that is no mixture of experts."""
    return 1 if model.known.architecture.experts else 2


def _experts(model: PlannedModel, phase: str, role: str, passes: int, tokens: int, directions: Sequence[str] = ("forward",)) -> Iterator[Message]:
    """Copies of `tokens` to the ranks of their experts and back, in every layer."""
    experts, layout = model.known.architecture.experts, model.groups.layout
    num_ranks = layout.expert * layout.expert_tensor
    if experts is None or num_ranks == 1:
        return
    count, copies = passes * model.counts.num_layers, tokens * experts.experts_per_token
    for direction in directions:
        if direction != "backward":
            num_bytes, why = _INDEX_BYTES * experts.num_experts * num_ranks, f"{direction}: copies for every expert, 1 a layer"
            yield Message(phase=phase, group=f"{role} EP x ETP", operation="all-gather", count=count, num_bytes=num_bytes, why=why)
        if layout.expert > 1:
            why = f"{direction}: copies out and back, 2 a layer: [{experts.experts_per_token} x tokens, H]"
            yield Message(phase=phase, group=f"{role} EP", operation="all-to-all", count=2 * count, num_bytes=copies * _row_bytes(model), why=why)
            why = f"{direction}: weights of copies, 1 a layer, fp32"
            yield Message(phase=phase, group=f"{role} EP", operation="all-to-all", count=count, num_bytes=copies * FP32_BYTES, why=why)
        yield from _split_experts(model, phase, f"{role} ETP", count, copies * layout.expert_tensor, direction)


def _split_experts(model: PlannedModel, phase: str, group: str, count: int, copies: int, direction: str) -> Iterator[Message]:
    """The `copies` of all ranks that have a part of the same experts, gathered there, and the sum of what the parts make of them; the reverse backward."""
    if model.groups.layout.expert_tensor == 1:
        return
    there, back = ("reduce-scatter", "all-gather") if direction == "backward" else ("all-gather", "reduce-scatter")
    why = f"{direction}: copies to all parts of an expert, 1 a layer"
    yield Message(phase=phase, group=group, operation=there, count=count, num_bytes=copies * _row_bytes(model), why=why)
    why = f"{direction}: weights of these copies, 1 a layer, fp32"
    yield Message(phase=phase, group=group, operation=there, count=count, num_bytes=copies * FP32_BYTES, why=why)
    # Megatron-Core sums in the dtype of the router.
    num_bytes, why = copies * FP32_BYTES * model.known.architecture.hidden_size, f"{direction}: outputs of all parts, 1 a layer, fp32"
    yield Message(phase=phase, group=group, operation=back, count=count, num_bytes=num_bytes, why=why)


def _training(rank: PlannedRank, student: PlannedModel, shape: StepShape) -> Iterator[Message]:
    """Forward and backward of every micro-batch."""
    batches, groups, layout = shape.num_micro_batches, student.groups, student.groups.layout
    activation, training = shape.micro_batch_tokens * _row_bytes(student), rank.config.training
    whole, modules, is_dense = training.recompute == "full", training.recomputed_modules, student.known.architecture.experts is None

    def tensor(operation: str, per_batch: int, why: str, num_bytes: int = activation) -> Message:
        return Message(phase="train", group="student TP", operation=operation, count=batches * per_batch, num_bytes=num_bytes, why=why)

    if layout.tensor > 1:
        per_layer, first, last = _split_blocks(student), groups.is_first_stage, groups.is_last_stage
        blocks = per_layer * student.counts.num_layers
        # Of parts of layers, only the dense feed-forward is split over the tensor group from its first product to its last.
        per_layer_again = per_layer if whole else int("mlp" in modules and is_dense)
        again = per_layer_again * student.counts.num_layers
        if layout.sequence:
            yield tensor("all-gather", blocks + last, f"forward: {per_layer} a layer, 1 before the head: [S, B, H]")
            yield tensor("reduce-scatter", blocks + first, f"forward: {per_layer} a layer, 1 embedding: [S, B, H]")
            # The input of a split projection is gathered again for the gradient of its weight.
            yield tensor("all-gather", 2 * blocks + first, f"backward: {2 * per_layer} a layer, 1 embedding: [S, B, H]")
            yield tensor("reduce-scatter", blocks + last, f"backward: {per_layer} a layer, 1 before the head: [S, B, H]")
            if again:
                yield tensor("all-gather", again, f"recomputation: {per_layer_again} a layer: [S, B, H]")
                yield tensor("reduce-scatter", again, f"recomputation: {per_layer_again} a layer: [S, B, H]")
        else:
            yield tensor("all-reduce", blocks + first, f"forward: {per_layer} a layer, 1 embedding: [S, B, H]")
            yield tensor("all-reduce", blocks, f"backward: {per_layer} a layer: [S, B, H]")
            yield tensor("all-reduce", again, f"recomputation: {per_layer_again} a layer: [S, B, H]")
            yield tensor("all-reduce", last, "backward: hidden states before the head: [T, H]", shape.scored_tokens * _row_bytes(student))
        if last:
            yield from _loss(rank, shape)
    if layout.context > 1:
        count, num_bytes = batches * student.counts.num_layers, shape.micro_batch_tokens * layout.context * _key_value_bytes(student)
        why = "keys and values of a layer, of all positions"
        attends_again = whole or "core_attn" in modules
        times = "forward and recomputation" if attends_again else "forward"
        yield Message(phase="train", group="student CP", operation="all-gather", count=count * (1 + attends_again), num_bytes=num_bytes, why=f"{times}: {why}")
        yield Message(phase="train", group="student CP", operation="reduce-scatter", count=count, num_bytes=num_bytes, why=f"backward: {why}")
    yield from _experts(
        student,
        "train",
        "student",
        batches,
        shape.micro_batch_tokens // (layout.tensor if layout.sequence else 1),
        ("forward", "recomputation", "backward")[:: 1 if whole or "moe" in modules else 2],
    )
    sends = batches * (2 * layout.virtual - groups.is_last_stage - groups.is_first_stage)
    num_bytes = activation // (layout.tensor if layout.sequence else 1)
    yield Message(phase="train", group="student PP", operation="send", count=sends, num_bytes=num_bytes, why="forward and backward [S, B, H]")


def _weighing(rank: PlannedRank, student: PlannedModel, shape: StepShape, training: Sequence[Message]) -> Iterator[Message]:
    """The forward passes before the gradient in which a selection rule measures every token: `training.importance`."""
    if rank.config.training.objective != "opd" or rank.config.importance.rule == "all":
        return
    for message in training:
        first, _, rest = message.why.partition(": ")
        if first in ("forward", "loss"):
            yield replace(message, phase="weigh")
        elif first == "forward and recomputation":
            yield replace(message, phase="weigh", count=message.count // 2, why=f"forward: {rest}")
    batches, groups, layout = shape.num_micro_batches, student.groups, student.groups.layout
    num_bytes = shape.micro_batch_tokens * _row_bytes(student) // (layout.tensor if layout.sequence else 1)
    sends = batches * (layout.virtual - groups.is_last_stage)
    yield Message(phase="weigh", group="student PP", operation="send", count=sends, num_bytes=num_bytes, why="forward [S, B, H]")
    num_tokens = rank.config.num_sequences * rank.config.rollout.max_response_tokens
    why = "entropy and both divergences of every response token of the step, fp32"
    yield Message(phase="weigh", group="student's ranks", operation="all-reduce", count=1, num_bytes=3 * FP32_BYTES * num_tokens, why=why)


def _loss(rank: PlannedRank, shape: StepShape) -> Iterator[Message]:
    """Two collectives per chunk in the forward, one for k1 and k3, none in the backward: `losses.fused_head`."""
    one_for_both = rank.config.training.objective == "opd" and rank.config.loss.kind in ("k1", "k3")
    chunks = shape.chunk_tokens
    values = ["sums"] if one_for_both else ["maxima", "sums"]
    for name in values:
        number, itemsize = (_LOSS_VALUES if rank.config.alignment.is_identity else _UNIT_VALUES)[name]
        count, num_bytes = shape.num_micro_batches * len(chunks), number * itemsize * max(chunks, default=0)
        why = f"loss: {name} of {len(chunks)} chunks a micro-batch, at most {number} values a token"
        yield Message(phase="train", group="student TP", operation="all-reduce or all-gather", count=count, num_bytes=num_bytes, why=why)


def _optimizer(rank: PlannedRank, student: PlannedModel) -> Iterator[Message]:
    """Once a step: gradients to the replica that updates them, updated weights back."""
    groups, layout = student.groups, student.groups.layout
    counts = student.counts
    shared = counts.num_trained_head if student.known.architecture.tied and layout.pipeline > 1 else 0
    data, experts = ("student DP x CP", groups.num_writers), ("student expert DP", student.num_expert_copies)
    # Megatron-Core has an optimizer of its own for experts, and each of the two gathers the weights of both.
    gathers = 2 if 0 < counts.num_trained_expert < counts.num_trained else 1
    # An embedding that two stages share has a bucket of its own, experts a buffer, and every chunk its own buffers.
    for count, what, (group, num_ranks), times in (
        (counts.num_trained - counts.num_trained_expert - shared, "parameters", data, max(1, counts.num_trained_chunks)),
        (shared, "parameters of the tied embedding", data, 1),
        (counts.num_trained_expert, "parameters of experts", experts, max(1, counts.num_trained_expert_chunks)),
    ):
        if num_ranks > 1 and count:
            gradients, weights, each = f"gradients of {count:,} {what}, fp32", f"{count:,} updated {what}", count // times
            yield Message(phase="optimizer", group=group, operation="reduce-scatter", count=times, num_bytes=each * FP32_BYTES, why=gradients)
            yield Message(phase="optimizer", group=group, operation="all-gather", count=gathers * times, num_bytes=each * student.dtype.itemsize, why=weights)
    if shared:
        why = "gradient of the tied embedding [W, H], fp32, between first and last stage"
        yield Message(phase="optimizer", group="student PP ends", operation="all-reduce", count=1, num_bytes=FP32_BYTES * shared, why=why)
    if partial := counts.num_trained_partial:
        why = "gradients of norms that saw a part of the sequence, or of the heads, fp32"
        yield Message(phase="optimizer", group="student TP", operation="all-reduce", count=1, num_bytes=FP32_BYTES * partial, why=why)


def _key_value_bytes(model: PlannedModel) -> int:
    """Return the bytes of one token's keys and values in one layer on one tensor rank."""
    architecture = model.known.architecture
    return 2 * architecture.num_kv_heads // model.groups.layout.tensor * architecture.head_dim * model.dtype.itemsize


def _row_bytes(model: PlannedModel) -> int:
    return model.known.architecture.hidden_size * model.dtype.itemsize
