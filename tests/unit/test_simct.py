"""SimCT's rows and ULD's distance in the fused head, in one process, against a Python loop over units and autograd in fp64.

Tensor-parallel ranks are in tests/distributed/test_simct_tp.py; which units a response has is in test_units.py and test_responses.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from opd_megatron.align.rows import paired_shard
from opd_megatron.align.simct import Scoring, simct_divergence
from opd_megatron.align.uld import uld_divergence
from opd_megatron.losses import fused_head_divergence
from tests.reference_simct import OPTIONS, case_for, exact, naive_simct, naive_uld, one_token_each, random_case, relative_error, rows_of, vocabulary_of

# fp32 sums of a few dozen terms; fp64 sums in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
PADDING = 5


def ours(case, *, divergence=simct_divergence, eos=None, weight_N=None, chunk_tokens=None, temperature=1.0, softcaps=(None, None), **options):
    """Return result, losses by unit, and gradients; the student's head has padded rows that would win every softmax."""
    (hidden, head, teacher_hidden, teacher_head), *_ = case
    padded = torch.cat([head, head.new_full((PADDING, head.size(1)), 50.0)])
    shard = paired_shard(vocabulary_of(case, eos), rank=0, num_ranks=1, student_columns=len(padded))
    rows = rows_of(case)
    hidden, padded = hidden.clone().requires_grad_(), padded.requires_grad_()
    if divergence is simct_divergence:
        options = {"scoring": Scoring(**options)}
    models = (hidden, padded, teacher_hidden, teacher_head[shard.teacher_ids_C])
    shared = {"temperature": temperature, "student_softcap": softcaps[0], "teacher_softcap": softcaps[1]}
    result = divergence(*models, rows, shard, unit_weight_N=weight_N, chunk_tokens=chunk_tokens, **shared, **options)
    result.loss_sum.backward()
    assert not padded.grad[len(head) :].any()
    return result, result.divergence_T[rows.student_first_N], hidden.grad, padded.grad[: len(head)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_and_gradients_are_the_naive_ones(options, dtype) -> None:
    """Every option, units of one to three tokens on either side, other vocabulary and hidden sizes, weights with a zero, several chunk sizes."""
    naive = {name: value for name, value in options.items() if name != "eos"}
    for seed in range(3):
        case = case_for(options, seed, num_units=9, dtype=dtype)
        weight_N = torch.rand(9, generator=torch.Generator().manual_seed(seed))
        weight_N[1] = 0
        expected = exact(case, weight_N=weight_N, eos=options.get("eos"), temperature=1.3, **naive)
        for chunk_tokens in (None, 1, 5):
            result, *found = ours(case, weight_N=weight_N, chunk_tokens=chunk_tokens, temperature=1.3, **options)
            errors = [relative_error(value.detach(), reference) for value, reference in zip(found, expected)]
            assert max(errors) < TOLERANCE[dtype], (seed, chunk_tokens, errors)
            assert float(result.loss_sum.detach()) == pytest.approx(float((expected[0] * weight_N).sum()), rel=1e-5)


def test_identical_tokenizers_give_the_reverse_kl_of_the_shared_vocabulary() -> None:
    """With every id shared, that of the same-tokenizer loss; with some, both models renormalised on them. Both scores agree on single tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden, head, teacher_hidden, teacher_head = (torch.randn(*shape, generator=generator).double() for shape in ((6, 8), (20, 8), (6, 12), (20, 12)))
    ids = torch.randint(20, (6,), generator=generator).tolist()
    units = [(place, place + 1, place, place + 1) for place in range(6)]
    everything = (([hidden, head, teacher_hidden, teacher_head]), units, ids, ids, [(v, v) for v in range(20)], [False] * 6)
    whole = fused_head_divergence(hidden, head, teacher_hidden, teacher_head, kind="reverse_kl")
    for score in ("mean_logprob", "raw_logit"):
        assert relative_error(ours(everything, score=score)[1], whole.divergence_T) < 1e-12
    shared = [3, 5, 6, 11, 19]
    some = (*everything[:4], [(v, v) for v in shared], [False] * 6)
    logp, logq = ((h @ w.T)[:, shared].log_softmax(-1) for h, w in ((hidden, head), (teacher_hidden, teacher_head)))
    assert relative_error(ours(some)[1], (logp.exp() * (logp - logq)).sum(-1)) < 1e-12


def _with_shift(case, position: int, constant: float):
    """Return the case with a constant added to all of the student's logits at one position: one more hidden column that every row of the head sees."""
    (hidden, head, *teacher), *rest = case
    column = torch.zeros(len(hidden), 1, dtype=hidden.dtype)
    column[position] = constant
    return ([torch.cat([hidden, column], 1), torch.cat([head, torch.ones_like(head[:, :1])], 1), *teacher], *rest)


def test_paper_mode_is_shift_invariant_and_raw_logits_are_not() -> None:
    """A constant on all logits of any position changes no probability: Eq. 7 does not see it, the released score does, at the second token of a unit."""
    case = random_case(3, num_units=4)
    place, (start, stop, *_) = next((place, unit) for place, unit in enumerate(case[1]) if unit[1] - unit[0] > 1)
    assert case[5][place]
    paper, raw = (ours(case, score=score)[1][place] for score in ("mean_logprob", "raw_logit"))
    for position in range(start, stop):
        shifted = _with_shift(case, position, 3.0)
        assert float(ours(shifted)[1][place]) == pytest.approx(float(paper), rel=1e-12)
        if position > start:
            assert abs(float(ours(shifted, score="raw_logit")[1][place]) / float(raw) - 1) > 0.01


def test_unequal_lengths_bias_the_papers_score_and_not_the_sum() -> None:
    """The same text probability 0.04 in one token of the teacher and two of the student: -3.22 against -1.61, so the KL is not 0; unscaled sums agree."""

    def logits(*rows: dict[int, float]) -> torch.Tensor:
        """Rows of log-probabilities over 6 ids; what is not named shares the rest."""
        table = torch.empty(len(rows), 6, dtype=torch.float64)
        for place, row in enumerate(rows):
            rest = (1 - sum(row.values())) / (6 - len(row))
            table[place] = torch.tensor([math.log(row.get(v, rest)) for v in range(6)])
        return table

    student, teacher = logits({0: 0.5, 1: 0.3, 4: 0.1}, {5: 0.4}), logits({0: 0.5, 1: 0.3, 3: 0.04})
    case = ([student, torch.eye(6).double(), teacher, torch.eye(6).double()], [(0, 2, 0, 1)], [4, 5], [3], [(0, 0), (1, 1)], [True])
    assert float(ours(case, span_norm="sum")[1]) == pytest.approx(0, abs=1e-12)
    assert float(ours(case)[1]) > 0.01
    assert float(naive_simct(student, teacher, *case[1:5], has_column=[True])) == pytest.approx(float(ours(case)[1]), rel=1e-12)


def test_a_row_of_one_shared_token_moves_nothing_but_shared_columns() -> None:
    case = one_token_each(random_case(5, num_units=6))
    (hidden, head, *_), _, _, _, pairs, _ = case
    # With the identity as hidden states, the head's gradient has a column for each row, and in it that row's gradient by id.
    eye = ([torch.eye(len(hidden)).double(), (hidden @ head.T).T.contiguous(), *case[0][2:]], *case[1:])
    shared = [student for student, _ in pairs]
    grad_VN = ours(eye)[3]
    assert grad_VN[shared].abs().min() > 0
    others = torch.ones(len(head), dtype=torch.bool)
    others[shared] = False
    assert not grad_VN[others].any()
    assert grad_VN.sum(0).abs().max() < 1e-15


def test_every_token_of_a_unit_gets_a_gradient() -> None:
    case = random_case(7, num_units=3)
    hidden_grad = ours(case)[2]
    assert hidden_grad.abs().amax(1).min() > 0


def test_rows_that_the_teacher_hardly_covers_are_left_out() -> None:
    """G(h) = 1 / teacher's mass on the columns; `covered` tells which rows stayed, `shared_mass` the mass on shared tokens."""
    case = random_case(11, num_units=12)
    everything, losses, *_ = ours(case)
    first = rows_of(case).student_first_N
    shared = everything.observed["shared_mass"][first]
    assert bool((everything.observed["covered"][first] == 1).all())
    some, kept_losses, hidden_grad, _ = ours(case, gh_threshold=2.7)
    covered = some.observed["covered"][first].bool()
    assert 0 < int(covered.sum()) < 12
    assert torch.equal(kept_losses[covered], losses[covered])
    assert not kept_losses[~covered].any()
    assert float(shared[~covered].max()) < 1 / 2.7
    dropped = [position for (start, stop, *_), kept in zip(case[1], covered.tolist()) if not kept for position in range(start, stop)]
    assert not hidden_grad[dropped].any()


def test_the_ends_tell_how_likely_the_teacher_thinks_them() -> None:
    """eos_mass is known at the ends of responses only: the probability of the token there, or of all ends together."""
    case = case_for({"eos": ((1, 2), (3, 4, 5))}, 2, num_units=5)
    (_, _, teacher_hidden, teacher_head), units, _, teacher_ids, *_ = case
    first, teacher_first = units[-1][0], units[-1][2]
    prob = (teacher_hidden[teacher_first] @ teacher_head.T).softmax(-1)
    for eos, expected in ((None, prob[teacher_ids[teacher_first]]), (((1, 2), (3, 4, 5)), prob[[3, 4, 5]].sum())):
        mass_T = ours(case, eos=eos)[0].observed["eos_mass"]
        assert float(mass_T[first]) == pytest.approx(float(expected), rel=1e-12)
        assert int(mass_T.isnan().sum()) == len(mass_T) - 1


def test_no_unit_is_no_loss() -> None:
    result, losses, *grads = ours(random_case(1, num_units=0))
    assert float(result.loss_sum.detach()) == 0
    assert len(losses) == 0
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "jsd"}, "kind='jsd'"),
        ({"gh_threshold": 1}, "gh_threshold=1"),
        ({"top_k": 1}, "top_k=1"),
        ({"top_k": 2, "mask_first_token": True}, "top_k=2"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_options_without_meaning_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Scoring(**options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("top_k", [0, 5, 26, 100])
def test_sorted_probabilities_are_compared(top_k, dtype) -> None:
    """All ranks, a few of them, more than the student has ids, more than both: fewer ids count as probabilities of 0."""
    for seed in range(3):
        case = one_token_each(random_case(seed, num_units=9, dtype=dtype))
        weight_N = torch.rand(9, generator=torch.Generator().manual_seed(seed))
        expected = exact(case, weight_N=weight_N, loss=naive_uld, top_k=top_k, temperature=1.3)
        for chunk_tokens in (None, 4):
            _, *found = ours(case, divergence=uld_divergence, weight_N=weight_N, top_k=top_k, chunk_tokens=chunk_tokens, temperature=1.3)
            errors = [relative_error(value.detach(), reference) for value, reference in zip(found, expected)]
            assert max(errors) < TOLERANCE[dtype], (seed, chunk_tokens, errors)


def test_sorted_probabilities_need_positions() -> None:
    with pytest.raises(ValueError, match="position by position"):
        ours(random_case(0), divergence=uld_divergence)
