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
