"""Between writing and scoring, where the teacher has another tokenizer: what it reads of every response, and the units on which both are compared."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        return replace(rollouts, samples=samples, notes=_metrics(sum((share.counts for share in gathered), UnitCounts()), by_place=self.aligner.kind == "uld"))


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


def _metrics(counts: UnitCounts, *, by_place: bool) -> Mapping[str, float]:
    """Return what metrics.jsonl shows of a step's alignment: shares of the student's tokens unless they say otherwise.

    Where tokens are compared place by place, whether they stand for the same text or end is chance, and not told.
    """
    tokens, units = max(1, counts.student_tokens), max(1, counts.units)
    by_text: dict[str, float] = {} if by_place else {"one_to_one_share": counts.one_to_one_tokens / tokens}
    if counts.ended and not by_place:
        by_text["ends_compared_share"] = counts.ends_compared / counts.ended
    return {
        "aligned_share": counts.covered_tokens / tokens,
        **by_text,
        "units_per_token": counts.units / tokens,
        "multi_token_unit_share": counts.multi_token_units / units,
        "align_ratio": counts.longer_tokens / max(1, counts.longer_responses),
        "teacher_tokens_per_token": counts.teacher_tokens / tokens,
        "lost_bytes_share": counts.lost_bytes / max(1, counts.text_bytes),
        "special_token_share": counts.special_tokens / tokens,
        "cut_teacher_tokens": counts.cut_tokens,
        "unaligned_samples": counts.unaligned_responses,
    }


# From a step's metrics to what is amiss: None as long as they do not say, an empty text where all is well.
AlignmentTrouble = Callable[[Mapping[str, float]], str | None]

# Mean probability, below which a teacher hardly ever ends where the student does: another token than the one it is asked about ends its responses.
LEAST_EOS_MASS = 1e-3
LEAST_ALIGNED_SHARE = 0.5


def unlikely_ends(metrics: Mapping[str, float]) -> str | None:
    """Tell of a teacher that would not end where the student's responses end."""
    mass = metrics.get("teacher_eos_mass")
    if mass is None or mass >= LEAST_EOS_MASS:
        return None if mass is None else ""
    return (
        f"the teacher gives its end of sequence {mass:.1e} of its probability where the student's responses end: the loss would teach the student not to "
        "stop. If the two families end in different tokens, name all of them in eos_token_id of generation_config.json and set alignment.eos=bridge, or skip"
    )


def uncompared_ends(metrics: Mapping[str, float]) -> str | None:
    """Tell of a student whose responses end, and none of their ends is compared."""
    share = metrics.get("ends_compared_share")
    if share is None or share > 0:
        return None if share is None else ""
    return (
        "no end of a response is compared, so nothing teaches the student when to stop: it ends with another id than the one that alignment.eos pairs; "
        "alignment.eos=bridge compares all that end a text"
    )


def little_aligned(metrics: Mapping[str, float]) -> str | None:
    """Tell of a run that compares little of what the student writes."""
    share = metrics["aligned_share"]
    if share >= LEAST_ALIGNED_SHARE:
        return ""
    lost, special, cut = (metrics[key] for key in ("lost_bytes_share", "special_token_share", "cut_teacher_tokens"))
    return (
        f"only {share:.0%} of the student's tokens stand in units that are compared: {lost:.0%} of the bytes lie behind a place where the texts part (bytes "
        f"that are no text, a normalizer), {special:.0%} of the tokens are special, {cut:.0f} tokens are beyond the teacher's positions"
    )


ALIGNMENT_TROUBLES: tuple[AlignmentTrouble, ...] = (unlikely_ends, uncompared_ends, little_aligned)
