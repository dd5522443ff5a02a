"""GPU memory of one rank: what is always there, and what each phase of a step adds.

Shapes: B sequences, T scored positions of a micro-batch, N tokens of one chunk, V vocabulary, W = this rank's slice of V, H / G hidden sizes.
Left out: the CUDA context and communication buffers (a few GiB), the allocator's fragmentation, temporary gradients inside one layer's backward,
padding of the gradient buffer, and loading and exporting. Tokens are taken to visit all experts equally often: a rank whose experts are favoured needs more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from opd_megatron.models.architecture import present_modules
from opd_megatron.models.gpt import DTYPES
from opd_megatron.models.paging import BLOCK_TOKENS
from opd_megatron.models.weight_map import weight_map
from opd_megatron.planning.activations import FP32_BYTES, MicroBatchShape, chunk_activation_bytes, forward_bytes_per_token, layer_bytes
from opd_megatron.planning.ranks import PlannedModel, PlannedRank
from opd_megatron.planning.step_shape import StepShape

Phase = Literal["always", "rollout", "teacher", "train", "evaluation", "teacher evaluation"]
# Of fp32 [N, W], as counted in losses.vocab_parallel beside CHUNK_BYTES.
_CHUNK_TENSORS = 5
# Further of units of text: copies of both models' shared columns at the units' first positions, their exponentials, and a gradient.
_UNIT_TENSORS = 5
# Bytes per entry of [B, V] while a token is picked: fp32 logits as gathered and joined, scaled, normalised and exponentiated; two in fp64.
_SAMPLING_BYTES = 5 * 4 + 2 * 8


@dataclass(frozen=True, kw_only=True)
class Term:
    """Bytes of one kind of tensor, in one phase; `why` is how they are counted."""

    name: str
    phase: Phase
    num_bytes: int
    why: str


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The terms of one rank. Phases follow one another, so the largest of them counts."""

    rank: int
    student_stage: int | None
    teacher_stage: int | None
    terms: tuple[Term, ...]

    def phase_bytes(self, phase: Phase) -> int:
        return sum(term.num_bytes for term in self.terms if term.phase == phase)

    @property
    def peak_phase(self) -> Phase:
        return max((term.phase for term in self.terms if term.phase != "always"), key=self.phase_bytes)

    @property
    def peak_terms(self) -> list[Term]:
        """What is there at the peak, largest first."""
        return sorted((term for term in self.terms if term.phase in ("always", self.peak_phase)), key=lambda term: -term.num_bytes)

    @property
    def total_bytes(self) -> int:
        return self.phase_bytes("always") + self.phase_bytes(self.peak_phase)


def rank_memory(rank: PlannedRank) -> RankMemory:
    """Return every term of a rank that is not zero."""
    shape, terms = StepShape(rank), []
    if rank.student is not None:
        terms += [*_states(rank, rank.student), *_training(rank, rank.student, shape), *_generation(rank, shape)]
    if rank.teacher is not None:
        terms += _teacher(rank, rank.teacher, shape)
    if rank.teacher_known is not None:
        terms += _payload(rank, rank.teacher_known.architecture.hidden_size * DTYPES[rank.config.training.precision].itemsize)
    return RankMemory(
        rank=rank.rank,
        student_stage=rank.student.groups.stage if rank.student else None,
        teacher_stage=rank.teacher.groups.stage if rank.teacher else None,
        terms=tuple(term for term in terms if term.num_bytes),
    )


def _states(rank: PlannedRank, student: PlannedModel) -> list[Term]:
    """Weights, gradients and optimizer of the student; offloaded, the last two are there in training only."""
    counts, itemsize = student.counts, student.dtype.itemsize
    master = 0 if student.dtype == torch.float32 else FP32_BYTES
    updating: Phase = "train" if rank.config.training.offload_optimizer else "always"
    averaged = rank.config.scoring_teacher is not None and rank.config.scoring_teacher.weights == "ema"
    frozen = f" of the {counts.num_trained:,} parameters that train" if counts.num_trained < counts.num_parameters else ""
    over = f"the {student.groups.num_writers} ranks of DP x CP"
    if counts.num_expert_parameters:
        over += f", of experts over {student.num_expert_copies} that hold the same"
    average = max(_shared_bytes(student, counts.num_parameters, counts.num_expert_parameters, FP32_BYTES), FP32_BYTES * _largest_slice(student))
    return [
        Term(name="average", phase="always", num_bytes=averaged * average, why=f"fp32 weights of the teacher, whole slices spread over {over}"),
        Term(name="weights", phase="always", num_bytes=counts.num_parameters * itemsize, why=f"{counts.num_parameters:,} parameters of {itemsize} bytes"),
        Term(name="gradients", phase=updating, num_bytes=counts.num_trained * FP32_BYTES, why=f"fp32 buffer of DistributedDataParallel{frozen}"),
        Term(
            name="optimizer",
            phase=updating,
            num_bytes=_shared_bytes(student, counts.num_trained, counts.num_trained_expert, master + 2 * FP32_BYTES),
            why=f"fp32 {'master weights and ' if master else ''}two moments{frozen}, split over {over}; padding ignored",
        ),
    ]


def _shared_bytes(student: PlannedModel, count: int, num_expert: int, itemsize: int) -> int:
    """Return this rank's share of `count` numbers, `num_expert` of them of experts, that ranks with the same parameters split among them."""
    shares = ((count - num_expert, student.groups.num_writers), (num_expert, student.num_expert_copies))
    return sum(-(-number * itemsize // num_ranks) for number, num_ranks in shares)


def _largest_slice(student: PlannedModel) -> int:
    """Return the most numbers of one tensor that a tensor rank holds."""
    return max(math.prod(row.shape) // (1 if row.split_dim is None else student.groups.layout.tensor) for row in weight_map(student.known.architecture))


def _training(rank: PlannedRank, student: PlannedModel, shape: StepShape) -> list[Term]:
    """Activations and, on the last stage, the loss."""
    architecture, groups = student.known.architecture, student.groups
    itemsize, flight, layout = student.dtype.itemsize, shape.num_in_flight, groups.layout
    training, plan = rank.config.training, shape.training_plan
    recompute, again = training.recompute, training.recomputed_modules
    batch = MicroBatchShape(num_tokens=shape.micro_batch_tokens, num_rows=plan.num_rows, packed=plan.packed, longest=max(plan.lengths))
    # Of chunks, the last one is the largest: where it ends in a norm.
    num_layers = student.counts.num_layers // layout.virtual
    one = chunk_activation_bytes(
        architecture,
        layout,
        batch,
        itemsize=itemsize,
        num_layers=num_layers,
        is_last=groups.is_last_stage,
        recompute=recompute == "full",
        again=again,
    )
    layers = f"{num_layers} layers" + (f" of a chunk, {layout.virtual} chunks" if layout.virtual > 1 else "")
    parts = ", ".join(present_modules(again, has_experts=architecture.experts is not None))
    kept = {"full": "inputs of layers only", "selective": f"of {parts} inputs only", "none": "all that a backward needs"}[recompute]
    why = f"{flight} micro-batch{'es' if flight > 1 else ''} in flight x {shape.micro_batch_tokens:,} tokens x {layers}; recompute={recompute}: {kept}"
    terms = [Term(name="activations", phase="train", num_bytes=flight * one, why=why)]
    if recompute != "none":
        kept_bytes = layer_bytes(architecture, layout, batch, itemsize, again) if recompute == "selective" else 0
        why = f"{'1 layer' if recompute == 'full' else 'modules of 1 layer'} x {shape.micro_batch_tokens:,} tokens, computed again for the backward"
        terms.append(Term(name="recomputed layer", phase="train", num_bytes=layer_bytes(architecture, layout, batch, itemsize) - kept_bytes, why=why))
    if not groups.is_last_stage:
        return terms
    num_columns, chunk = rank.student_columns, max(shape.chunk_tokens, default=0)
    # A soft-cap's damping of the gradient is one more.
    widest, num_tensors = max(num_columns, rank.teacher_columns), _CHUNK_TENSORS + (architecture.logit_softcap is not None)
    if not rank.config.alignment.is_identity:
        num_tensors += _UNIT_TENSORS
        if layout.context > 1:
            num_positions = shape.micro_batch_tokens * layout.context
            num_bytes = 2 * itemsize * num_positions * architecture.hidden_size
            why = f"hidden states [{num_positions:,}, H] of all {layout.context} windows, between which units may lie, and their gradient"
            terms.append(Term(name="gathered windows", phase="train", num_bytes=num_bytes, why=why))
    # A product of bf16 matrices is a new fp32 tensor before it is added; an fp32 one is added in place; a head that does not train has no gradient.
    heads = 0 if not student.counts.num_trained_head else 1 if student.dtype == torch.float32 else 2
    return [
        *terms,
        Term(
            name="loss chunk",
            phase="train",
            num_bytes=num_tensors * FP32_BYTES * chunk * widest + 2 * itemsize * shape.scored_tokens * architecture.hidden_size,
            why=f"{num_tensors} fp32 [N {chunk:,}, W {widest:,}]; hidden states [T {shape.scored_tokens:,}, H] and their gradient",
        ),
        Term(
            name="head gradient",
            phase="train",
            num_bytes=heads * FP32_BYTES * num_columns * architecture.hidden_size,
            why=f"fp32 [W, H] of one micro-batch{', and one chunk of it' if heads > 1 else ''}",
        ),
    ]


def _generation(rank: PlannedRank, shape: StepShape) -> list[Term]:
    """The student as a writer of rollouts and of answers to held-out prompts."""
    config, writing = rank.config, rank.writing
    assert writing is not None
    terms = []
    if config.training.objective == "opd" and not config.rollout.replay:
        terms += [*_copied(rank, "rollout"), *_writing(rank, writing, shape, "rollout", config.num_sequences, config.rollout.max_response_tokens)]
    if config.evaluation.prompts:
        terms += [*_copied(rank, "evaluation"), *_evaluation(rank, writing, shape, "evaluation")]
    return terms


def _copied(rank: PlannedRank, phase: Phase) -> list[Term]:
    """The copy of the student that writes, and the largest tensor on its way into it."""
    if rank.copy is None:
        return []
    count, itemsize = rank.copy.counts.num_parameters, rank.copy.dtype.itemsize
    moving = max(math.prod(row.shape) for row in weight_map(rank.copy.known.architecture))
    return [
        Term(name=f"rollout weights, {phase}", phase=phase, num_bytes=count * itemsize, why=f"{count:,} parameters in rollout.layout, only while it writes"),
        Term(name=f"weights on their way, {phase}", phase=phase, num_bytes=2 * moving * itemsize, why="the largest tensor, in slices and joined"),
    ]


def _evaluation(rank: PlannedRank, model: PlannedModel, shape: StepShape, phase: Phase) -> list[Term]:
    """Answers to held-out prompts; a source of unknown size is taken to fill every batch."""
    evaluation = rank.config.evaluation
    full = rank.config.rollout.batch_sequences * model.groups.num_writers
    sequences = evaluation.prompts * evaluation.samples_per_prompt if isinstance(evaluation.prompts, int) else full
    return _writing(rank, model, shape, phase, sequences, evaluation.max_response_tokens or rank.config.rollout.max_response_tokens)


def _writing(rank: PlannedRank, model: PlannedModel, shape: StepShape, phase: Phase, num_sequences: int, response_tokens: int) -> list[Term]:
    architecture, layout, itemsize = model.known.architecture, model.groups.layout, model.dtype.itemsize
    batch = shape.decoded_sequences(model, num_sequences)
    if phase != "teacher evaluation" and shape.is_paged(model):
        return [*_pages(model, shape, phase, num_sequences, response_tokens), *_sampling(model, phase, batch)]
    prompt_tokens = shape.teacher_prompt_tokens if phase == "teacher evaluation" else rank.config.data.max_prompt_tokens
    length = prompt_tokens + response_tokens
    per_token = 2 * itemsize * model.counts.num_layers * architecture.num_kv_heads // layout.tensor * architecture.head_dim
    terms = [
        Term(
            name=f"KV cache, {phase}",
            phase=phase,
            num_bytes=batch * length * per_token,
            why=f"{batch} sequences x {length:,} tokens x {model.counts.num_layers} layers x {architecture.num_kv_heads // layout.tensor} key-value heads",
        ),
        Term(
            name=f"prompts, {phase}",
            phase=phase,
            num_bytes=batch * prompt_tokens * forward_bytes_per_token(architecture, layout, itemsize=itemsize, num_layers=model.counts.num_layers),
            why=f"forward of {batch} prompts of {prompt_tokens:,} tokens, at its widest",
        ),
    ]
    return [*terms, *_sampling(model, phase, batch)]


def _sampling(model: PlannedModel, phase: Phase, batch: int) -> list[Term]:
    if not model.groups.is_last_stage:
        return []
    vocab_size = model.known.architecture.vocab_size
    why = f"{_SAMPLING_BYTES} bytes for each of [B {batch}, V {vocab_size:,}]"
    return [Term(name=f"sampling, {phase}", phase=phase, num_bytes=_SAMPLING_BYTES * batch * vocab_size, why=why)]


def _pages(model: PlannedModel, shape: StepShape, phase: Phase, num_sequences: int, response_tokens: int) -> list[Term]:
    """What the dynamic engine holds in place of a static cache: its blocks, all allocated at once, and a step in which prompts enter."""
    pages = shape.pages(model, num_sequences, response_tokens)
    architecture, itemsize = model.known.architecture, model.dtype.itemsize
    per_token = forward_bytes_per_token(architecture, model.groups.layout, itemsize=itemsize, num_layers=model.counts.num_layers)
    return [
        Term(
            name=f"KV cache, {phase}",
            phase=phase,
            num_bytes=pages.num_blocks * pages.block_bytes,
            why=f"{pages.num_blocks:,} blocks of {BLOCK_TOKENS} tokens x {model.counts.num_layers} layers, a spare one among them",
        ),
        Term(
            name=f"prompts, {phase}",
            phase=phase,
            num_bytes=pages.most_tokens * per_token,
            why=f"forward of {pages.most_tokens:,} tokens of prompts that enter in one step, at its widest",
        ),
    ]


def _teacher(rank: PlannedRank, teacher: PlannedModel, shape: StepShape) -> list[Term]:
    """The teacher's weights, its forward, and its answers to held-out prompts."""
    architecture, itemsize, tokens, counts = teacher.known.architecture, teacher.dtype.itemsize, shape.teacher_batch_tokens, teacher.counts
    evaluates = bool(rank.config.evaluation.teacher and rank.config.evaluation.prompts)
    why, num_bytes = f"{counts.num_parameters:,} parameters, no gradient", counts.num_parameters * itemsize
    settings = rank.config.scoring_teacher
    moving = max(math.prod(row.shape) for row in weight_map(architecture)) if settings is not None and settings.moves else 0
    terms = [
        Term(name="weights on their way", phase="teacher", num_bytes=2 * moving * itemsize, why="the largest tensor, in slices and joined"),
        *(Term(name="teacher weights", phase=phase, num_bytes=num_bytes, why=why) for phase in _teacher_phases(rank, evaluates)),
        Term(
            name="teacher forward",
            phase="teacher",
            num_bytes=tokens * forward_bytes_per_token(architecture, teacher.groups.layout, itemsize=itemsize, num_layers=counts.num_layers),
            why=f"{shape.teacher_batch} sequences, {tokens:,} tokens on this rank, at its widest",
        ),
    ]
    if evaluates:
        terms += _evaluation(rank, teacher, shape, "teacher evaluation")
    return terms


def _teacher_phases(rank: PlannedRank, evaluates: bool) -> list[Phase]:
    """Return when the teacher's weights are on the device."""
    if rank.config.teacher is None or rank.config.teacher.placement != "offloaded":
        return ["always"]
    return ["teacher", "teacher evaluation"] if evaluates else ["teacher"]


def _payload(rank: PlannedRank, row_bytes: int) -> list[Term]:
    """The teacher's hidden states of a step on their way to the student's last stage and there, and the head that makes logits of them."""
    payload, student, settings = rank.payload, rank.student, rank.config.teacher
    receives, needed = student is not None, payload.needed_rows(rank.rank)
    held, buffered = payload.scored_rows(rank.rank), payload.buffered_rows(rank.rank, receives=receives)
    why = f"{held:,} rows held, {buffered:,} in messages, {needed:,} joined by sample, of {row_bytes:,} bytes"
    terms = [
        Term(name="payload, scored and sent", phase="teacher", num_bytes=(held + buffered + needed) * row_bytes, why=why),
    ]
    if needed:
        joined = StepShape(rank).scored_tokens
        why = f"{needed:,} rows of {row_bytes:,} bytes by sample, and {joined:,} joined for a micro-batch"
        terms.append(Term(name="payload, in training", phase="train", num_bytes=(needed + joined) * row_bytes, why=why))
    if settings is not None and settings.staleness:
        why = f"{needed:,} rows of {row_bytes:,} bytes, while the student writes the batch after theirs"
        terms.append(Term(name="payload, waiting", phase="rollout", num_bytes=needed * row_bytes, why=why))
    if student is not None and student.groups.is_last_stage:
        num_columns = rank.teacher_columns
        cut = (
            "cut as the student's vocabulary is"
            if rank.config.alignment.is_identity
            else "rows of shared tokens beside the student's, and a share of the others"
        )
        why = f"[W {num_columns:,}, G {row_bytes // student.dtype.itemsize:,}], {cut}"
        terms.append(Term(name="teacher head slice", phase="always", num_bytes=num_columns * row_bytes, why=why))
    return terms
