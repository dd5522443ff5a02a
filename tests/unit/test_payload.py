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
# Tensor groups of the student: they share no rank, and any piece may be needed by any of them, or by none.
GROUPS = [[[], [0], [3]], [[], [0, 1], [4, 5]], [[], [2, 3, 4], [5]], [[], [0, 2, 3, 5], [1]]]
# Small counts, zero and one among them, and some above every limit below.
ROWS = st.one_of(st.integers(0, 6), st.integers(30, 40))
Layout = list[tuple[list[int], list[int], int]]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    groups = draw(st.sampled_from(GROUPS))
    pieces = st.tuples(st.lists(RANKS, unique=True, min_size=1, max_size=4), st.sampled_from(groups), ROWS)
    return draw(st.lists(pieces, max_size=12))


def plan_of(layout: Layout, max_rows: int) -> PayloadPlan:
    return plan_payload([having for having, _, _ in layout], [needing for _, needing, _ in layout], [rows for _, _, rows in layout], max_rows=max_rows)


def delivered(layout: Layout, plan: PayloadPlan) -> tuple[dict[int, Counter[tuple[int, int]]], int, int]:
    """Follow every row (piece, number) on its way. Return how often each rank received each, and the rows that came from outside and inside its group."""
    received: dict[int, Counter[tuple[int, int]]] = {rank: Counter() for rank in range(6)}
    outside = inside = 0
    for step in plan.steps:
        shares: dict[int, list[tuple[int, int]]] = {rank: [] for rank in range(6)}
        for transfer in step.transfers:
            rows = [(span.piece, row) for span in transfer.spans for row in range(span.start, span.stop)]
            assert all(transfer.source in layout[piece][0] for piece, _ in rows), "only what is held is sent"
            from_inside = all(transfer.source in layout[piece][1] for piece, _ in rows)
            outside, inside = outside + len(rows) * (not from_inside), inside + len(rows) * from_inside
            if from_inside:
                received[transfer.target].update(rows)
            else:
                shares[transfer.target] += rows
        for gather in step.gathers:
            named = [[(span.piece, row) for span in share for row in range(span.start, span.stop)] for share in gather.shares]
            assert [sorted(share) for share in named] == [sorted(shares.pop(rank)) for rank in gather.ranks], "each puts in what it was sent"
            # Cut at the sizes of the pieces, the shares in order are the pieces in order.
            assert [row for share in named for row in share] == [(piece, row) for piece in gather.pieces for row in range(layout[piece][2])]
            inside += len(named) * (len(named) - 1) * max(map(len, named))
            for rank in gather.ranks:
                received[rank].update(row for share in named for row in share)
        assert not any(shares.values()), "what was sent in a step is gathered in it"
    return received, outside, inside


@settings(deadline=None, derandomize=True, max_examples=200)
@given(layouts(), st.integers(1, 20))
def test_whoever_needs_a_piece_and_has_it_not_gets_every_row_of_it_once(layout: Layout, max_rows: int) -> None:
    received, _, _ = delivered(layout, plan_of(layout, max_rows))
    for rank, rows in received.items():
        wanted = [(piece, row) for piece, (having, needing, size) in enumerate(layout) if rank in needing and rank not in having for row in range(size)]
        assert rows == Counter(wanted)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(layouts(), st.integers(1, 20))
def test_one_copy_crosses_and_none_where_a_rank_of_the_group_has_it(layout: Layout, max_rows: int) -> None:
    plan = plan_of(layout, max_rows)
    _, outside, inside = delivered(layout, plan)
    naive = sum(rows for having, needing, rows in layout if needing and not set(having) & set(needing))
    assert plan.sent_rows() == outside == naive
    assert plan.gathered_rows() == inside


@settings(deadline=None, derandomize=True, max_examples=200)
@given(layouts())
def test_gathering_costs_a_copy_for_every_other_rank_and_less_than_a_row_of_padding_for_each(layout: Layout) -> None:
    plan = plan_of(layout, 1 << 16)
    lacking = sum(rows * sum(rank not in having for rank in needing) for having, needing, rows in layout)
    shared = {tuple(needing) for having, needing, rows in layout if rows and not set(having) & set(needing)}
    padding = sum((len(ranks) - 1) ** 2 for ranks in shared)
    # Of what crosses, one copy in all comes from outside the group.
    assert lacking - plan.sent_rows() <= plan.gathered_rows() <= lacking - plan.sent_rows() + padding


@settings(deadline=None, derandomize=True, max_examples=200)
@given(layouts(), st.integers(1, 20))
def test_a_message_and_a_gather_are_within_the_limit_unless_they_are_a_single_piece(layout: Layout, max_rows: int) -> None:
    for step in plan_of(layout, max_rows).steps:
        for pieces in [*({span.piece for span in transfer.spans} for transfer in step.transfers), *(gather.pieces for gather in step.gathers)]:
            assert pieces
            assert len(pieces) == 1 or sum(layout[piece][2] for piece in pieces) <= max_rows


@settings(deadline=None, derandomize=True, max_examples=100)
@given(layouts(), st.integers(1, 20))
def test_two_ranks_exchange_at_most_one_message_a_step_each_way(layout: Layout, max_rows: int) -> None:
    # Messages of one pair carry no tag: a second in the same step could be taken for the first.
    for step in plan_of(layout, max_rows).steps:
        pairs = [(transfer.source, transfer.target) for transfer in step.transfers]
        assert pairs
        assert len(set(pairs)) == len(pairs)
        assert all(source != target for source, target in pairs)
        # A rank gathers once a step.
        gathering = [rank for gather in step.gathers for rank in gather.ranks]
        assert len(set(gathering)) == len(gathering)


def test_equal_layouts_send_nothing() -> None:
    plan = plan_of([([0, 1], [0, 1], 5), ([2, 3], [2, 3], 7)], max_rows=4)
    assert plan.steps == ()
    assert plan.sent_rows() == plan.gathered_rows() == 0


def messages_of(plan: PayloadPlan) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    return [
        (transfer.source, transfer.target, [(span.piece, span.start, span.stop) for span in transfer.spans])
        for step in plan.steps
        for transfer in step.transfers
    ]


def test_each_rank_of_a_group_is_sent_a_share_by_another_holder() -> None:
    plan = plan_of([([0, 1], [2, 3], 5), ([0, 1], [2, 3], 6)], max_rows=100)
    assert messages_of(plan) == [(0, 2, [(0, 0, 5), (1, 0, 1)]), (1, 3, [(1, 1, 6)])]
    (gather,) = plan.steps[0].gathers
    # 11 rows in shares of 6, the last filled up by one; each rank receives the other's share.
    assert (gather.ranks, gather.pieces, gather.share_rows, gather.whole_rows) == ((2, 3), (0, 1), 6, 12)
    assert (plan.sent_rows(), plan.gathered_rows()) == (11, 12)


def test_a_piece_of_one_row_crosses_to_one_rank_of_a_group() -> None:
    plan = plan_of([([0], [1, 2, 3, 4], 1)], max_rows=100)
    assert messages_of(plan) == [(0, 1, [(0, 0, 1)])]
    assert [gather.share_rows for step in plan.steps for gather in step.gathers] == [1]


def test_a_piece_that_one_rank_of_the_group_holds_does_not_leave_it() -> None:
    # Rank 0 is outside and holds it too; rank 2 has two to serve, rank 1 none.
    plan = plan_of([([0, 2], [2, 3, 4], 5), ([0, 2, 3], [2, 3, 4], 7)], max_rows=100)
    assert messages_of(plan) == [(2, 3, [(0, 0, 5)]), (2, 4, [(0, 0, 5), (1, 0, 7)])]
    assert all(step.gathers == () for step in plan.steps)
    assert (plan.sent_rows(), plan.gathered_rows()) == (0, 17)


def test_messages_are_filled_in_order_up_to_the_limit() -> None:
    plan = plan_of([([0], [1], rows) for rows in (2, 2, 2, 9, 1, 0, 3)], max_rows=4)
    assert [[piece for piece, _, _ in spans] for _, _, spans in messages_of(plan)] == [[0, 1], [2], [3], [4, 6]]


@pytest.mark.parametrize("layout", [[], [([0], [], 5)], [([0], [1], 0)]], ids=["no samples", "nobody needs it", "no rows"])
def test_a_plan_may_be_empty(layout: Layout) -> None:
    assert plan_of(layout, max_rows=4).steps == ()


def test_a_plan_is_the_same_on_every_rank() -> None:
    # Made from what all ranks know: nothing in it may depend on the process, such as the order of a set.
    layout = [([i % 3, 3], [[4, 5], [1, 2]][i % 2], i % 5) for i in range(20)]
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
