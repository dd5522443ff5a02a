"""Who sends which sample to whom, for any layouts.

Not covered: the messages themselves (tests/distributed/test_payload.py).
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_megatron.parallel.payload import PayloadPlan, plan_payload

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
