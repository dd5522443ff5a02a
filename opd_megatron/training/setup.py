"""From a configuration to loaded models, prompts and proofs, in the order in which mistakes are cheapest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.align.responses import ResponseAligner
from opd_megatron.align.vocabulary import SharedVocabulary
from opd_megatron.config import DataConfig, RunConfig, TeacherConfig
from opd_megatron.data.batch_plan import TrainingBatches
from opd_megatron.data.prompts import Part, Prompt, PromptSet, load_prompts, with_targets
from opd_megatron.data.tokenizer import check_same_tokenizer, load_tokenizer
from opd_megatron.evaluation.graders import check_gradable, make_grader
from opd_megatron.models.allocation import chosen_names
from opd_megatron.models.architecture import Architecture
from opd_megatron.models.gpt import DTYPES, ModelChunks
from opd_megatron.models.hf_folder import stop_token_ids
from opd_megatron.models.layer_options import layers_here
from opd_megatron.models.limits import longest_evaluated_teacher_prompt, longest_teacher_prompt
from opd_megatron.models.weights import WeightSource, open_weights
from opd_megatron.parallel.groups import ModelGroups, student_groups, teacher_groups
from opd_megatron.parallel.layout import RankGrid
from opd_megatron.parallel.world import Bridge, shared_errors
from opd_megatron.rollout.engine import RolloutEngine, Sampler
from opd_megatron.rollout.rollouts import Rollouts
from opd_megatron.teacher.routing import Router
from opd_megatron.teacher.scorer import Scorer
from opd_megatron.teacher.teacher import Teacher
from opd_megatron.training.alignment import RolloutAligner, make_aligner, token_by_token, with_itself
from opd_megatron.training.effopd import EffOPD
from opd_megatron.training.importance import Importance
from opd_megatron.training.objective import AlignedDistillation, Distillation, Objective, SupervisedFineTuning
from opd_megatron.training.rollout_engine import student_engine
from opd_megatron.training.search_scores import AnswerScore, DivergenceScore, SearchScore, drawn_prompts
from opd_megatron.training.self_teacher import refresh_from
from opd_megatron.training.self_test import check_self_divergence
from opd_megatron.training.student import Student
from opd_megatron.training.throughput import Throughput, peak_tflops
from opd_megatron.training.writers import Writer, make_writer


@dataclass(frozen=True, kw_only=True)
class Text:
    """How a model reads and writes: its tokenizer, the ids that it may write, and those that end what it writes."""

    tokenizer: Any
    vocab_size: int
    eos_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a run reads, opened and checked, but not loaded. `aligner` is there where the teacher has another tokenizer than the student."""

    student: WeightSource
    teacher: WeightSource | None
    student_text: Text
    teacher_text: Text
    aligner: ResponseAligner | None
    prompts: PromptSet
    evaluation_prompts: PromptSet | None
    grader: Callable[[Prompt, str], float]
    # What EffOPD scores candidates on, and what grades the answers.
    search_prompts: PromptSet | None
    search_grader: Callable[[Prompt, str], float] | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a trainer moves, loaded and in place."""

    student: Student
    teacher: Teacher | None
    sampler: RolloutEngine
    write: Writer
    align: Callable[[Rollouts], Rollouts]
    objective: Objective
    importance: Importance
    throughput: Throughput
    search: EffOPD | None = None


def open_sources(config: RunConfig) -> Sources:
    """Open models, tokenizers and data; ValueError, the same on every rank, for whatever does not fit together."""
    with shared_errors():
        student = open_weights(hf=config.student.hf, checkpoint=config.student.checkpoint)
        settings = config.teacher_source
        teacher = open_weights(hf=settings.hf, checkpoint=settings.checkpoint) if settings is not None else None
        student_text, teacher_text, aligner = _open_texts(config, student, teacher)
        tokenizer = student_text.tokenizer
        evaluation_data = _evaluation_data(config)
        prompts, evaluation_prompts = _load_data(config, evaluation_data, student_text, teacher_text, teacher.architecture if teacher is not None else None)
        if config.training.objective == "sft":
            limits = (student.architecture.max_positions, config.training.micro_batch_tokens)
            prompts = with_targets(prompts, tokenizer, max_tokens=min(limit for limit in limits if limit is not None))
        grader = make_grader(evaluation_data)
        if evaluation_prompts is not None:
            check_gradable(evaluation_prompts.prompts, evaluation_data, "set data.answer_key, or evaluation.prompts=0 for no evaluation")
        search_prompts, prompts, search_grader = _search_data(config, prompts, student_text, teacher_text, teacher)
    return Sources(
        student=student,
        teacher=teacher,
        student_text=student_text,
        teacher_text=teacher_text,
        aligner=aligner,
        prompts=prompts,
        evaluation_prompts=evaluation_prompts,
        grader=grader,
        search_prompts=search_prompts,
        search_grader=search_grader,
    )


def _open_texts(config: RunConfig, student: WeightSource, teacher: WeightSource | None) -> tuple[Text, Text, ResponseAligner | None]:
    """Return how both models read and write, and what aligns the teacher's tokens with the student's where these differ."""
    tokenizer = load_tokenizer(student.assets)
    student_text = _text_of(tokenizer, student, student.architecture.vocab_size)
    if teacher is None:
        return student_text, student_text, None
    other = load_tokenizer(teacher.assets)
    if config.alignment.is_identity:
        check_same_tokenizer(tokenizer, other)
        # Equal tokenizers, differently padded heads (Qwen2.5 has 151,936 and 152,064): what both have is compared.
        student_text = _text_of(tokenizer, student, min(student.architecture.vocab_size, teacher.architecture.vocab_size))
        return student_text, student_text, None
    aligner = make_aligner(config.alignment, tokenizer, other, student_text.eos_ids, _text_of(other, teacher, teacher.architecture.vocab_size).eos_ids)
    # Rows of a padded head that are no token are neither written nor compared.
    student_text = _text_of(tokenizer, student, aligner.vocabulary.student_size)
    return student_text, _text_of(other, teacher, aligner.vocabulary.teacher_size), aligner


def _text_of(tokenizer: Any, source: WeightSource, vocab_size: int) -> Text:
    if vocab_size < len(tokenizer) or source.architecture.vocab_size < vocab_size:
        raise ValueError(f"the tokenizer of {source.assets} has {len(tokenizer)} tokens, more than the model's vocabulary of {source.architecture.vocab_size}")
    # What the tokenizer itself calls the end comes first.
    return Text(tokenizer=tokenizer, vocab_size=vocab_size, eos_ids=tuple(dict.fromkeys((tokenizer.eos_token_id, *stop_token_ids(source.assets)))))


def build_parts(config: RunConfig, sources: Sources, run_dir: Path, bridge: Bridge, device: torch.device, note: Callable[[str], None]) -> Parts:
    """Create the student's groups, load what its ranks hold of both models, and prove the teacher's path before anything is trained."""
    groups = student_groups(config.student.layout, config.seed)
    note(groups.picture("student"))
    student = Student(config, sources.student, groups, device)
    teacher = _build_teacher(config, config.teacher, sources, student, bridge, note) if sources.teacher is not None and config.teacher is not None else None
    text = sources.student_text
    sampler = student_engine(config, sources.student, student, vocab_size=text.vocab_size, eos_ids=text.eos_ids, note=note)
    importance = Importance(config=config, vocab_size=text.vocab_size)
    throughput = Throughput(
        student=sources.student.architecture,
        teacher=sources.teacher.architecture if sources.teacher is not None else None,
        num_ranks=len({*bridge.student_ranks, *bridge.teacher_ranks}),
        student_ranks=len(bridge.student_ranks),
        weighs=importance.rule is not None,
        writes=config.training.objective == "opd" and not config.rollout.replay,
        peak_tflops=peak_tflops(device, config.training.peak_tflops),
    )
    return Parts(
        student=student,
        teacher=teacher,
        sampler=sampler,
        write=make_writer(config, run_dir, sampler, text.tokenizer),
        align=_make_alignment(sources),
        objective=_make_objective(config, student, teacher, sources),
        importance=importance,
        throughput=throughput,
    )


def _build_teacher(config: RunConfig, settings: TeacherConfig, sources: Sources, student: Student, bridge: Bridge, note: Callable[[str], None]) -> Teacher:
    """Return the teacher; with `self_test`, first load the student's weights in its place and let them be scored."""
    assert sources.teacher is not None
    groups = teacher_groups(settings.layout) if settings.placement != "dedicated" else None
    note(make_router(sources.teacher, config, bridge).teacher.picture("teacher"))

    def load(source: WeightSource, vocabulary: SharedVocabulary | None) -> Teacher:
        """Return a frozen teacher with these weights, on the teacher's groups, its head cut as the student's vocabulary is, or as the shared one says."""
        scorer = make_scorer(source, config, groups, student.device) if groups is not None else None
        router = make_router(source, config, bridge)
        shard = student.paired_shard(vocabulary) if vocabulary is not None else None
        teacher = Teacher(source, router, scorer, student.groups, student_padded_vocab=student.padded_vocab, device=student.device, shard=shard)
        if settings.moves:
            teacher.refresh = refresh_from(student, teacher, config, source, bridge)
        return teacher

    if settings.self_test:
        aligner = sources.aligner
        own_weights = load(sources.student, with_itself(aligner) if aligner is not None else None)
        objective = _make_objective(config, student, own_weights, sources)
        divergence = check_self_divergence(student, own_weights, objective, sources.prompts.prompts, token_by_token if aligner is not None else None)
        note(f"self-test: the student's own weights as teacher diverge by {divergence:.1e} nats a token")
        if settings.is_student:
            return own_weights
        own_weights.leave()
        del own_weights, objective
    return load(sources.teacher, sources.aligner.vocabulary if sources.aligner is not None else None)


def make_scorer(source: WeightSource, config: RunConfig, groups: ModelGroups, device: torch.device) -> Scorer:
    """Return this rank's part of a frozen model as the configuration wants its teacher."""
    assert config.teacher is not None
    offloaded = config.teacher.placement == "offloaded"
    return Scorer(
        source,
        groups,
        precision=config.training.precision,
        micro_batch=config.teacher.micro_batch,
        offloaded=offloaded,
        device=device,
        options=layers_here(config.training).frozen,
    )


def make_router(source: WeightSource, config: RunConfig, bridge: Bridge) -> Router:
    """Return the way from the teacher's ranks to the student's; the same on all of them."""
    assert config.teacher is not None
    ours, theirs = bridge.student_ranks, bridge.teacher_ranks
    student = RankGrid(layout=config.student.layout, num_ranks=len(ours), first_rank=ours[0])
    return Router(
        teacher=RankGrid(layout=config.teacher.layout, num_ranks=len(theirs), first_rank=theirs[0]),
        student=student,
        teacher_micro_batch=config.teacher.micro_batch,
        student_batches=TrainingBatches.of(config, student.data_size),
        num_rounds=config.teacher.transfer_rounds,
        width=source.architecture.hidden_size,
        dtype=DTYPES[config.training.precision],
        bridge=bridge,
    )


def make_sampler(model: ModelChunks, groups: ModelGroups, config: RunConfig, text: Text) -> Sampler:
    """Return one model as a writer where a run measures it once, or measures it alone."""
    return Sampler(model, groups, vocab_size=text.vocab_size, eos_ids=text.eos_ids, batch_sequences=config.rollout.batch_sequences)


def _make_alignment(sources: Sources) -> Callable[[Rollouts], Rollouts]:
    """Return what follows the writing of samples: nothing, where the teacher reads the student's tokens."""
    if sources.aligner is None:
        return lambda rollouts: rollouts
    assert sources.teacher is not None
    return RolloutAligner(aligner=sources.aligner, max_teacher_positions=sources.teacher.architecture.max_positions)


def _make_objective(config: RunConfig, student: Student, teacher: Teacher | None, sources: Sources) -> Objective:
    """Return what the configuration minimizes."""
    vocab_size = sources.student_text.vocab_size
    shared: dict[str, Any] = {"loss": config.loss, "tp_group": student.groups.collection.tp, "student_softcap": student.architecture.logit_softcap}
    if teacher is None:
        return SupervisedFineTuning(vocab_size=vocab_size, **shared)
    shared["teacher_softcap"] = teacher.logit_softcap
    if teacher.shard is not None:
        return AlignedDistillation(alignment=config.alignment, shard=teacher.shard, teacher_head_CG=teacher.head_WG, **shared)
    # Only at the temperature of the rollouts is the recomputed log-probability that of the sampler.
    knows_drift = config.loss.temperature == config.rollout.temperature and not config.rollout.replay
    return Distillation(vocab_size=vocab_size, teacher_head_WG=teacher.head_WG, recompute_logp=knows_drift, **shared)


def _evaluation_data(config: RunConfig) -> DataConfig:
    """Return where held-out prompts come from: it decides how they are graded as well."""
    wanted = config.evaluation.prompts
    return replace(config.data, prompts=wanted) if isinstance(wanted, str) else config.data


def _load_data(
    config: RunConfig, evaluation_data: DataConfig, student_text: Text, teacher_text: Text, teacher: Architecture | None
) -> tuple[PromptSet, PromptSet | None]:
    """Return training and held-out prompts. An evaluation source of its own leaves the training source whole."""
    wanted, tokenizer = config.evaluation.prompts, student_text.tokenizer
    other = None if teacher_text is student_text else teacher_text.tokenizer
    train: Part = "train" if isinstance(wanted, int) and wanted else "all"
    privileged = config.privileged if teacher is not None else None
    room = longest_teacher_prompt(config, teacher) if teacher is not None else None
    prompts = load_prompts(config.data, tokenizer, part=train, privileged=privileged, max_teacher_tokens=room, teacher_tokenizer=other)
    if wanted == 0:
        return prompts, None
    held_out: Part = "all" if isinstance(wanted, str) else "evaluation"
    limit = wanted if isinstance(wanted, int) else None
    if teacher is None or not config.evaluation.teacher:
        return prompts, load_prompts(evaluation_data, tokenizer, part=held_out, limit=limit)
    # The student is measured on all of them, whatever the teacher is told.
    room = longest_evaluated_teacher_prompt(config, teacher)
    held_out_prompts = load_prompts(
        evaluation_data,
        tokenizer,
        part=held_out,
        limit=limit,
        privileged=privileged,
        max_teacher_tokens=room,
        drop_without_room=False,
        teacher_tokenizer=other,
    )
    return prompts, held_out_prompts


def _search_data(
    config: RunConfig, prompts: PromptSet, student_text: Text, teacher_text: Text, teacher: WeightSource | None
) -> tuple[PromptSet | None, PromptSet, Callable[[Prompt, str], float] | None]:
    """Return what EffOPD scores candidates on, the training prompts that are left, and the grader where its score needs one."""
    effopd = config.effopd
    if not effopd.enabled:
        return None, prompts, None
    data = replace(config.data, prompts=effopd.prompts) if isinstance(effopd.prompts, str) else config.data
    if isinstance(effopd.prompts, str):
        scores_by_teacher = effopd.score == "divergence" and teacher is not None
        # Of the training source the held-out prompts stay unseen.
        holds_out = effopd.prompts == config.data.prompts and isinstance(config.evaluation.prompts, int) and config.evaluation.prompts > 0
        try:
            chosen = load_prompts(
                data,
                student_text.tokenizer,
                part="train" if holds_out else "all",
                privileged=config.privileged if scores_by_teacher else None,
                max_teacher_tokens=longest_teacher_prompt(config, teacher.architecture) if scores_by_teacher and teacher is not None else None,
                teacher_tokenizer=None if teacher_text is student_text or not scores_by_teacher else teacher_text.tokenizer,
            )
        except ValueError as error:
            raise ValueError(f"effopd.prompts: {error}") from None
    else:
        chosen, prompts = drawn_prompts(prompts, effopd, data, config.seed)
    if effopd.score == "divergence":
        return chosen, prompts, None
    check_gradable(chosen.prompts, data, "set data.answer_key, or effopd.score=divergence, which needs no grader", key="effopd.prompts")
    return chosen, prompts, make_grader(data)


def make_search(config: RunConfig, sources: Sources, parts: Parts, note: Callable[[str], None]) -> EffOPD | None:
    """Return the search for extrapolated weights, which begins with the weights as they are; None where there is none."""
    if sources.search_prompts is None:
        return None
    student, chosen = parts.student, config.effopd.modules
    moved = chosen_names("effopd.modules", chosen, sources.student.architecture) & student.allocation.trained
    if not moved:
        raise ValueError(f"effopd.modules={chosen!r} moves only what modules.train={config.modules.train!r} leaves where it is; change one of them")
    score: SearchScore
    if config.effopd.score == "divergence":
        assert parts.teacher is not None, "the configuration was checked"
        score = DivergenceScore(
            config=config,
            sampler=parts.sampler,
            student=student,
            teacher=parts.teacher,
            align=parts.align,
            objective=parts.objective,
            prompts=sources.search_prompts,
        )
    else:
        assert sources.search_grader is not None
        tokenizer = sources.student_text.tokenizer
        score = AnswerScore(config=config, sampler=parts.sampler, prompts=sources.search_prompts, tokenizer=tokenizer, grader=sources.search_grader)
    return EffOPD(settings=config.effopd, student=student, score=score, moved=moved, note=note)


def describe_data(sources: Sources) -> str:
    """Return one line on what was read and dropped, for the log of rank 0."""
    held_out = len(sources.evaluation_prompts) if sources.evaluation_prompts is not None else 0
    prompts = sources.prompts
    dropped = f", {prompts.num_dropped_long} dropped as too long" if prompts.num_dropped_long else ""
    if prompts.num_dropped_privileged:
        dropped += f", {prompts.num_dropped_privileged} dropped because the teacher's prompt leaves no room for a response"
    unread = sources.evaluation_prompts.num_dropped_privileged if sources.evaluation_prompts is not None else 0
    beside = f" (the teacher is measured without {unread}, which leave it no room)" if unread else ""
    return f"data: {len(prompts):,} training prompts{dropped}, {held_out:,} held out{beside}; world size {dist.get_world_size()}"
