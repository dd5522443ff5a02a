"""Who sends which sample to whom, for any layouts; and where in a padded batch the scored positions are.

Not covered: the messages themselves (tests/distributed/test_payload.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_megatron.config import ParallelLayout
from opd_megatron.data.batches import PaddedBatch, pad_samples
from opd_megatron.parallel.context import local_positions, padded_length
from opd_megatron.parallel.payload import PayloadPlan, plan_payload

# --- plan_payload ------------------------------------------------------------------------------------------------------------------------

RANKS = st.integers(0, 5)
SAMPLES = st.lists(
    st.tuples(
        st.lists(RANKS, unique=True, min_size=1, max_size=4),
        st.lists(RANKS, unique=True, max_size=6),
        # Small counts, zero among them, and some above every limit below.
        st.one_of(st.integers(0, 6), st.integers(30, 40)),
    ),
    max_size=12,
)
Layout = list[tuple[list[int], list[int], int]]


def plan_of(layout: Layout, max_rows: int) -> PayloadPlan:
    return plan_payload([having for having, _, _ in layout], [needing for _, needing, _ in layout], [rows for _, _, rows in layout], max_rows=max_rows)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(SAMPLES, st.integers(1, 20))
def test_whoever_needs_a_sample_and_has_it_not_gets_it_once_from_one_who_has(layout: Layout, max_rows: int) -> None:
    received: Counter[tuple[int, int]] = Counter()
    for step in plan_of(layout, max_rows).rounds:
        for transfer in step:
            for sample in transfer.pieces:
                assert transfer.source in layout[sample][0]
                received[sample, transfer.target] += 1
    # Nothing goes to a holder, to someone who does not need it, or twice; samples without rows need no message.
    wanted = {(sample, rank) for sample, (having, needing, rows) in enumerate(layout) for rank in needing if rank not in having and rows}
    assert received == Counter(wanted)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(SAMPLES, st.integers(1, 20))
def test_a_message_is_within_the_limit_unless_it_is_a_single_sample(layout: Layout, max_rows: int) -> None:
    for step in plan_of(layout, max_rows).rounds:
        for transfer in step:
            assert transfer.pieces
            assert len(transfer.pieces) == 1 or sum(layout[sample][2] for sample in transfer.pieces) <= max_rows


@settings(deadline=None, derandomize=True, max_examples=100)
@given(SAMPLES, st.integers(1, 20))
def test_two_ranks_exchange_at_most_one_message_a_round_each_way(layout: Layout, max_rows: int) -> None:
    # Messages of one pair carry no tag: a second in the same round could be taken for the first.
    for step in plan_of(layout, max_rows).rounds:
        pairs = [(transfer.source, transfer.target) for transfer in step]
        assert step
        assert len(set(pairs)) == len(pairs)
        assert all(source != target for source, target in pairs)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(SAMPLES, st.integers(1, 20))
def test_sent_rows_are_those_that_cross_whatever_the_limit(layout: Layout, max_rows: int) -> None:
    naive = sum(rows * sum(rank not in having for rank in needing) for having, needing, rows in layout)
    assert plan_of(layout, max_rows).sent_rows() == naive
    assert plan_of(layout, 1 << 16).sent_rows() == naive


def test_equal_layouts_send_nothing() -> None:
    plan = plan_of([([0, 1], [0, 1], 5), ([2, 3], [2, 3], 7)], max_rows=4)
    assert plan.rounds == ()
    assert plan.sent_rows() == 0


def test_the_needers_of_a_sample_are_spread_over_its_holders() -> None:
    plan = plan_of([([0, 1], [2, 3], 5), ([0, 1], [2, 3], 5)], max_rows=100)
    assert [(transfer.source, transfer.target, transfer.pieces) for step in plan.rounds for transfer in step] == [(0, 2, (0, 1)), (1, 3, (0, 1))]


def test_messages_are_filled_in_order_up_to_the_limit() -> None:
    plan = plan_of([([0], [1], rows) for rows in (2, 2, 2, 9, 1, 0, 3)], max_rows=4)
    assert [transfer.pieces for step in plan.rounds for transfer in step] == [(0, 1), (2,), (3,), (4, 6)]


@pytest.mark.parametrize("layout", [[], [([0], [], 5)], [([0], [1], 0)]], ids=["no samples", "nobody needs it", "no rows"])
def test_a_plan_may_be_empty(layout: Layout) -> None:
    assert plan_of(layout, max_rows=4).rounds == ()


def test_a_plan_is_the_same_on_every_rank() -> None:
    # Made from what all ranks know: nothing in it may depend on the process, such as the order of a set.
    layout = [([i % 3, 3], [4, 5, (i + 1) % 3], i % 5) for i in range(20)]
    assert plan_of(layout, max_rows=6) == plan_of(layout, max_rows=6)


# --- pad_samples -------------------------------------------------------------------------------------------------------------------------


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


def padded(texts: list[Text], *, length: int | None = None) -> PaddedBatch:
    longest = max(len(text.prompt_ids) + len(text.response_ids) for text in texts)
    return pad_samples(texts, length=length or longest, device=torch.device("cpu"))


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
    columns = torch.cat([local_positions(whole.tokens_BS.size(1), size, rank) for rank in range(size)])
    assert sorted(columns.tolist()) == list(range(whole.tokens_BS.size(1)))
    assert torch.equal(torch.cat([window.tokens_BS for window in windows], dim=1), whole.tokens_BS[:, columns])
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
