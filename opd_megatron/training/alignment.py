"""Between writing and scoring, where the teacher has another tokenizer: what it reads of every response, and the units on which both are compared."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.align.pieces import BytePieces, check_lossless
from opd_megatron.align.responses import AlignedResponses, ResponseAligner, UnitCounts
from opd_megatron.align.vocabulary import SharedVocabulary, shared_vocabulary
from opd_megatron.config import AlignmentConfig
from opd_megatron.data.batches import Sample, UnitSpans
from opd_megatron.parallel.layout import replica_share
from opd_megatron.rollout.rollouts import Rollouts

logger = logging.getLogger(__name__)


def make_aligner(
    config: AlignmentConfig, student_tokenizer: Any, teacher_tokenizer: Any, student_ends: Sequence[int], teacher_ends: Sequence[int]
) -> ResponseAligner:
    """Return what aligns responses as configured; ValueError for tokenizers that are not read byte by byte, and for two that share nothing."""
    student, teacher = _pieces_of("student", student_tokenizer), _pieces_of("teacher", teacher_tokenizer)
    vocabulary = shared_vocabulary(student, teacher, match=config.vocab_match, eos=config.eos, student_eos=student_ends, teacher_eos=teacher_ends)
    assert config.kind != "identity"
    options = {name: getattr(config, name) for name in ("kind", "units", "tail", "boundaries", "oov_unit")}
    return ResponseAligner(student=student, teacher=teacher, vocabulary=vocabulary, student_ends=frozenset(student_ends), **options)


@dataclass(frozen=True, kw_only=True)
class RolloutAligner:
    """Aligns a step's samples, each on one rank of the student; then all ranks exchange what they found."""

    aligner: ResponseAligner
    max_teacher_positions: int

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        """Return the samples with the teacher's tokens and their units; `notes` tell how much they cover. Every rank of the student calls it alike."""
        rank, size = dist.get_rank(), dist.get_world_size()
        mine = [rollouts.samples[index] for index in replica_share(len(rollouts.samples), rank, size)]
        rooms = [self.max_teacher_positions - len(sample.as_teacher_reads().prompt_ids) for sample in mine]
        aligned = self.aligner.align([sample.response_ids.numpy() for sample in mine], [sample.finished for sample in mine], rooms)
        gathered: list[AlignedResponses] = [aligned] * size
        dist.all_gather_object(gathered, aligned)
        aligned_samples = itertools.chain.from_iterable(map(_split, gathered))
        samples = tuple(replace(sample, teacher_response_ids=ids, units=units) for sample, (ids, units) in zip(rollouts.samples, aligned_samples, strict=True))
        return replace(rollouts, samples=samples, notes=_metrics(sum((share.counts for share in gathered), UnitCounts())))


def _split(aligned: AlignedResponses) -> Iterator[tuple[torch.Tensor, UnitSpans]]:
    """Yield each response's tokens as the teacher reads it, and its units."""
    ids = torch.from_numpy(aligned.teacher_ids).split(aligned.num_teacher_tokens_B.tolist())
    columns = (*torch.from_numpy(aligned.spans_N4).unbind(1), torch.from_numpy(aligned.has_column_N), torch.from_numpy(aligned.is_end_N))
    for ids_R, *parts in zip(ids, *(column.split(aligned.num_units_B.tolist()) for column in columns), strict=True):
        yield ids_R, UnitSpans(*parts)


def _pieces_of(role: str, tokenizer: Any) -> BytePieces:
    """Return the bytes of a tokenizer's tokens; ValueError for one that does not tell them, or does not keep text."""
    try:
        pieces = BytePieces.of(tokenizer)
    except ValueError as error:
        raise ValueError(f"the {role}'s tokenizer cannot be aligned: {error}") from None
    for note in check_lossless(role, pieces):
        logger.warning(note)
    return pieces


def describe_alignment(aligner: ResponseAligner) -> str:
    """Return one line on what the two vocabularies share, for the log of rank 0."""
    told = aligner.vocabulary.statistics()
    shares = f"{told['student_share']:.1%} of the student's {told['student_size']:,} and {told['teacher_share']:.1%} of the teacher's {told['teacher_size']:,}"
    return f"alignment: {aligner.kind}, {told['num_pairs']:,} shared tokens ({shares}), ends of sequence: {told['eos']}"


def with_itself(aligner: ResponseAligner) -> SharedVocabulary:
    """Return what the student's vocabulary shares with itself, ends treated as between student and teacher."""
    ends = aligner.vocabulary.student_eos
    return shared_vocabulary(aligner.student, aligner.student, eos=aligner.vocabulary.eos, student_eos=ends, teacher_eos=ends)


def token_by_token(rollouts: Rollouts) -> Rollouts:
    """Return samples that the teacher reads as they are, every token a unit: for a teacher that is the student itself."""

    def aligned(sample: Sample) -> Sample:
        start_N = torch.arange(len(sample.response_ids))
        has_column_N = torch.ones(len(start_N), dtype=torch.bool)
        units = UnitSpans(start_N, start_N + 1, start_N, start_N + 1, has_column_N, ~has_column_N)
        return replace(sample, teacher_response_ids=sample.response_ids, units=units)

    return replace(rollouts, samples=tuple(map(aligned, rollouts.samples)))


def _metrics(counts: UnitCounts) -> Mapping[str, float]:
    """Return what metrics.jsonl shows of a step's alignment: shares of the student's tokens unless they say otherwise."""
    tokens, units = max(1, counts.student_tokens), max(1, counts.units)
    return {
        "aligned_share": counts.covered_tokens / tokens,
        "one_to_one_share": counts.one_to_one_tokens / tokens,
        "units_per_token": counts.units / tokens,
        "multi_token_unit_share": counts.multi_token_units / units,
        "align_ratio": counts.longer_tokens / max(1, counts.longer_responses),
        "teacher_tokens_per_token": counts.teacher_tokens / tokens,
        "lost_bytes_share": counts.lost_bytes / max(1, counts.text_bytes),
        "special_token_share": counts.special_tokens / tokens,
        "cut_teacher_tokens": counts.cut_tokens,
        "unaligned_samples": counts.unaligned_responses,
        "ends_compared_share": counts.ends_compared / counts.ended if counts.ended else 0.0,
    }
