"""Which samples are computed together, in rows or in packs, and where in them the scored positions are.

Not covered: that a model keeps the sequences of a pack apart (tests/distributed/test_packing.py).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_megatron.config import ParallelLayout
from opd_megatron.data.batch_plan import TrainingBatches, TrainingPlan, balanced_packs, plan_scoring
from opd_megatron.data.batches import TokenBatch, pack_samples, pad_samples
from opd_megatron.parallel.context import padded_length


@dataclass(frozen=True)
class Text:
    """A prompt and a response, sampled or given."""

    prompt_ids: torch.Tensor
    response_ids: torch.Tensor
    sampled_logp: torch.Tensor | None = None


def texts_of(lengths: list[tuple[int, int]], *, sampled: bool = True) -> list[Text]:
    """Texts in which every token id, counted from 1, occurs once, so that no mix-up goes unseen."""
    texts, first = [], 1
    for prompt, response in lengths:
        ids = torch.arange(first, first + prompt + response)
        first += prompt + response
        texts.append(Text(ids[:prompt], ids[prompt:], -ids[prompt:].float() if sampled else None))
    return texts


def padded(texts: list[Text], *, length: int | None = None) -> TokenBatch:
    longest = max(len(text.prompt_ids) + len(text.response_ids) for text in texts)
    return pad_samples(texts, length=length or longest)


LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=6)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(LENGTHS, st.integers(0, 5))
def test_scored_positions_predict_the_response_tokens(lengths: list[tuple[int, int]], surplus: int) -> None:
    texts = texts_of(lengths)
    longest = max(prompt + response for prompt, response in lengths)
    batch = padded(texts, length=longest + surplus)
    size = batch.tokens_BS.size(1)
    naive = [
        (row * size + position - 1, int(ids[position]), -float(ids[position]))
        for row, text in enumerate(texts)
        for ids in [torch.cat([text.prompt_ids, text.response_ids])]
        for position in range(len(text.prompt_ids), len(ids))
    ]
    assert list(zip(batch.scored_T.tolist(), batch.target_T.tolist(), batch.sampled_logp_T.tolist(), strict=True)) == naive
    # A target is the token after its scored position, in the same row.
    assert torch.equal(batch.tokens_BS.roll(-1, dims=1).flatten()[batch.scored_T], batch.target_T)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(LENGTHS, st.integers(0, 3))
def test_rows_hold_their_texts_and_zeros_up_to_the_length(lengths: list[tuple[int, int]], surplus: int) -> None:
    texts = texts_of(lengths)
    length = max(prompt + response for prompt, response in lengths) + surplus
    tokens_BS = padded(texts, length=length).tokens_BS
    assert tokens_BS.shape == (len(texts), length)
    for row, text in zip(tokens_BS.tolist(), texts, strict=True):
        ids = [*text.prompt_ids.tolist(), *text.response_ids.tolist()]
        assert row == ids + [0] * (length - len(ids))


@pytest.mark.parametrize(
    ("layout", "multiple"),
    [
        (ParallelLayout(tensor=4), 1),
        (ParallelLayout(tensor=4, sequence=True), 4),
        (ParallelLayout(context=2), 4),
        (ParallelLayout(tensor=2, sequence=True, context=3), 12),
    ],
    ids=lambda x: x.describe() if isinstance(x, ParallelLayout) else str(x),
)
def test_lengths_are_rounded_up_to_what_the_layout_can_split(layout: ParallelLayout, multiple: int) -> None:
    for longest in range(1, 40):
        assert padded_length(longest, layout) == next(size for size in range(longest, longest + multiple) if size % multiple == 0)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(LENGTHS, st.integers(1, 4))
def test_context_windows_hold_every_position_once_and_count_it_anew(lengths: list[tuple[int, int]], size: int) -> None:
    texts = texts_of(lengths)
    layout = ParallelLayout(context=size)
    whole = padded(texts, length=padded_length(max(prompt + response for prompt, response in lengths), layout))
    windows = [whole.context_window(size=size, rank=rank) for rank in range(size)]
    chunks = whole.tokens_BS.chunk(2 * size, dim=1)
    for rank, window in enumerate(windows):
        assert torch.equal(window.tokens_BS, torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1) if size > 1 else whole.tokens_BS)
    assert sorted(torch.cat([window.target_T for window in windows]).tolist()) == sorted(whole.target_T.tolist())
    for window in windows:
        # Ids are unique, so the token at a scored place tells which position it is: the one before its target.
        tokens_T = window.tokens_BS.flatten()[window.scored_T]
        assert torch.equal(tokens_T + 1, window.target_T)
        assert torch.equal(window.sampled_logp_T, -window.target_T.float())


def test_an_empty_response_has_no_scored_position() -> None:
    batch = padded(texts_of([(2, 3), (4, 0), (1, 2)]))
    assert batch.scored_T.tolist() == [1, 2, 3, 10, 11]
    assert batch.target_T.tolist() == [3, 4, 5, 11, 12]
    empty = padded(texts_of([(4, 0)]))
    assert (empty.scored_T.numel(), empty.target_T.numel(), empty.sampled_logp_T.numel()) == (0, 0, 0)
    # An index of another dtype would be refused where it is used.
    assert empty.scored_T.dtype == torch.long
    assert torch.zeros(4, 8)[empty.scored_T].shape == (0, 8)


def test_given_text_has_nan_for_log_probabilities() -> None:
    texts = [*texts_of([(2, 3)]), *texts_of([(2, 2)], sampled=False)]
    assert padded(texts).sampled_logp_T.isnan().tolist() == [False] * 3 + [True] * 2


LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2, sequence=True),
    ParallelLayout(context=2),
    ParallelLayout(tensor=2, sequence=True, context=3),
    ParallelLayout(pipeline=3, virtual=2),
]
NUM_TOKENS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(NUM_TOKENS, st.sampled_from(LAYOUTS), st.integers(1, 5), st.sampled_from([(1, None), (3, None), (1, 48), (1, 100)]))
def test_a_training_plan_computes_every_sample_once_in_equal_shapes(
    num_tokens: list[int], layout: ParallelLayout, num_replicas: int, micro: tuple[int, int | None]
) -> None:
    batches = TrainingBatches(layout=layout, num_replicas=num_replicas, micro_batch=micro[0], max_tokens=micro[1])
    plan = batches.plan(num_tokens)
    assert sorted(index for replica in range(num_replicas) for index in plan.samples_of(replica)) == list(range(len(num_tokens)))
    assert len(plan.micro_batches) == num_replicas
    counts = {len(replica) for replica in plan.micro_batches}
    assert len(counts) == 1
    # An interleaved pipeline takes micro-batches in groups.
    assert counts.pop() % (layout.pipeline if layout.virtual > 1 else 1) == 0
    assert plan.row_length == padded_length(plan.row_length, layout)
    for micro_batch in itertools.chain(*plan.micro_batches):
        if plan.packed:
            assert sum(plan.lengths[index] for index in micro_batch) <= min(plan.row_length, micro[1] or 0)
        else:
            assert len(micro_batch) <= plan.num_rows
    for length, tokens in zip(plan.lengths, num_tokens, strict=True):
        assert tokens <= length <= plan.row_length
        assert length % layout.sequence_multiple == 0
    places = plan.places()
    for replica in range(num_replicas):
        assert all(places[index].replica == replica for index in plan.samples_of(replica))


def _heaviest(plan: TrainingPlan) -> int:
    return max(sum(plan.lengths[index] for index in pack) for pack in itertools.chain(*plan.micro_batches))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(NUM_TOKENS, st.integers(1, 4))
def test_packs_are_few_and_evenly_filled(num_tokens: list[int], num_replicas: int) -> None:
    plan = TrainingBatches(layout=ParallelLayout(), num_replicas=num_replicas, micro_batch=1, max_tokens=100).plan(num_tokens)
    num_packs = num_replicas * len(plan.micro_batches[0])
    best = max(sum(num_tokens) / num_packs, max(num_tokens))
    # Graham's bound; the best partition itself is at least `best`, and no better than twice it.
    assert plan.row_length == _heaviest(plan) <= 4 / 3 * max(best, 2 * sorted(num_tokens)[-num_packs - 1] if len(num_tokens) > num_packs else 0) + best
    # Twice as many packs as full ones would be enough: two packs below one half would have been one.
    assert num_packs < 2 * (sum(num_tokens) / 100 + num_replicas)


def test_a_pack_without_samples_is_cut_like_the_others() -> None:
    batch = pack_samples([], [], row_length=20, longest=8)
    assert batch.sequences == (8, 8, 4)
    assert batch.scored_T.numel() == 0


def test_padding_counts_in_the_limit_of_a_pack() -> None:
    layout = ParallelLayout(tensor=4, sequence=True)
    plan = TrainingBatches(layout=layout, num_replicas=1, micro_batch=1, max_tokens=77).plan([30, 30, 16])
    assert plan.row_length == 76
    with pytest.raises(ValueError, match=r"a sample of 77 tokens does not fit"):
        TrainingBatches(layout=layout, num_replicas=1, micro_batch=1, max_tokens=79).plan([77])


def test_no_row_is_computed_that_no_replica_has_a_sample_for() -> None:
    plan = TrainingBatches(layout=ParallelLayout(), num_replicas=4, micro_batch=10_000_000_000, max_tokens=None).plan([8] * 13)
    assert (plan.num_rows, len(plan.micro_batches[0])) == (4, 1)


def test_equal_work_for_two_packs_of_many_lengths() -> None:
    packs = balanced_packs([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], 2)
    assert [sum(10 - index for index in pack) for pack in packs] == [28, 27]
    # Ties go to the first pack, whatever the order of a heap: all ranks must agree.
    assert balanced_packs([5, 5, 5, 5], 3) == [(0, 3), (1,), (2,)]


def test_a_sample_longer_than_a_pack_is_refused() -> None:
    batches = TrainingBatches(layout=ParallelLayout(), num_replicas=1, micro_batch=1, max_tokens=10)
    with pytest.raises(ValueError, match=r"a sample of 11 tokens does not fit into a pack of training.micro_batch_tokens=10"):
        batches.plan([3, 11])


def test_the_teacher_scores_similar_lengths_together() -> None:
    plan = plan_scoring([9, 3, 8, 2, 7], ParallelLayout(context=2), 2, 2)
    assert plan.micro_batches == (((1, 0),), ((3, 4), (2,)))
    assert plan.lengths == (12, 12, 8, 8, 8)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(LENGTHS, st.integers(1, 3), st.integers(0, 20))
def test_a_pack_holds_its_texts_and_every_context_rank_its_part(lengths: list[tuple[int, int]], size: int, surplus: int) -> None:
    texts = texts_of(lengths)
    layout = ParallelLayout(context=size)
    padded_lengths = [padded_length(prompt + response, layout) for prompt, response in lengths]
    row_length = padded_length(sum(padded_lengths) + surplus, layout)
    whole = pack_samples(texts, padded_lengths, row_length=row_length, longest=max(padded_lengths))
    assert whole.tokens_BS.shape == (1, row_length)
    assert sum(whole.sequences) == row_length
    assert whole.sequences[: len(texts)] == tuple(padded_lengths)
    assert all(length % layout.sequence_multiple == 0 for length in whole.sequences)
    assert max(whole.sequences) == max(padded_lengths)
    for text, part in zip(texts, whole.tokens_BS[0].split(whole.sequences)):
        ids = torch.cat([text.prompt_ids, text.response_ids])
        assert part.tolist() == ids.tolist() + [0] * (len(part) - len(ids))
    windows = [whole.context_window(size=size, rank=rank) for rank in range(size)]
    assert sorted(torch.cat([window.target_T for window in windows]).tolist()) == sorted(whole.target_T.tolist())
    for window in windows:
        assert window.tokens_BS.shape == (1, row_length // size)
        # Ids are unique, so the token at a scored place tells which position it is: the one before its target.
        assert torch.equal(window.tokens_BS.flatten()[window.scored_T] + 1, window.target_T)
