"""Skewed, top-k and sampled-token divergences in one process, against naive fp64 autograd.

Not covered here: several ranks (tests/distributed/test_losses_kinds_tp.py) and CUDA.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from opd_megatron.losses import fused_head_divergence, token_statistics, vocab_parallel_divergence
from tests.reference_losses import (
    SAMPLED_KINDS,
    SKEW_KINDS,
    TOLERANCE,
    TOP_K_KINDS,
    head_problem,
    logits_pair,
    naive_clipped,
    naive_divergence,
    relative_error_or_zero,
    same_counts,
    with_ids,
)

CASES = [
    *({"kind": kind, **options} for kind in SKEW_KINDS for options in ({}, {"alpha": 0.7, "temperature": 1.7}, {"alpha": 0.3, "pointwise_clip": 0.02})),
    *(
        {"kind": kind, "top_k": 7, **options}
        for kind in TOP_K_KINDS
        for options in ({}, {"support": "student", "temperature": 0.6}, {"pointwise_clip": 0.05}, {"top_k": 1}, {"top_k": 40})
    ),
    *({"kind": kind, **options} for kind in SAMPLED_KINDS for options in ({}, {"temperature": 1.7})),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_divergence_and_its_gradient_match_the_definition(case, dtype):
    """bf16 logits of 61 columns have many ties, also at the border of the top k."""
    student, teacher = logits_pair(dtype=dtype)
    upstream_T, options = torch.rand(len(student)), with_ids(case, len(student), 55)
    value_T = vocab_parallel_divergence(student, teacher, vocab_size=55, **options)
    (gradient,) = torch.autograd.grad(value_T, student, upstream_T)
    expected_T = naive_divergence(student[:, :55], teacher[:, :55], **options)
    (expected,) = torch.autograd.grad(expected_T, student, upstream_T.double())
    assert value_T.dtype == torch.float32
    assert relative_error_or_zero(value_T, expected_T) < TOLERANCE[torch.float32]
    assert relative_error_or_zero(gradient, expected) < TOLERANCE[dtype]
    assert gradient[:, 55:].abs().max() == 0


@pytest.mark.parametrize("case", [case for case in CASES if case.get("top_k") != 40], ids=str)
def test_gradient_matches_finite_differences(case):
    student, teacher = logits_pair(4, 9, torch.float64)
    options = with_ids({**case, "top_k": 3} if "top_k" in case else case, 4, 8)
    assert torch.autograd.gradcheck(lambda logits: vocab_parallel_divergence(logits, teacher, vocab_size=8, **options), student)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_head_matches_full_fp64_logits(case, dtype):
    """Loss, both gradients, entropy, sampled log-probabilities, clipped entries: zero weights, 9 padded columns, chunks that do not divide the tokens."""
    models, weight_T = head_problem(dtype=dtype)
    options, ids_T = with_ids(case, 29, 55), torch.arange(29) * 5 % 55
    leaves = [tensor.detach().double().requires_grad_() for tensor in models[:2]]
    logits_TV, teacher_TV = leaves[0] @ leaves[1][:55].T, models[2].double() @ models[3][:55].double().T
    expected_T = naive_divergence(logits_TV, teacher_TV, **options)
    expected_gradients = torch.autograd.grad((expected_T * weight_T).sum(), leaves, retain_graph=True)
    logp_TV = F.log_softmax(logits_TV.detach() / case.get("temperature", 1), -1)
    result = fused_head_divergence(*models, token_weight_T=weight_T, vocab_size=55, chunk_tokens=8, **({"sampled_ids_T": ids_T} | options))
    for value, reference in (
        (result.divergence_T, expected_T),
        (result.loss_sum, (expected_T * weight_T).sum()),
        (result.student_entropy_T, -(logp_TV.exp() * logp_TV).sum(-1)),
        (result.sampled_logp_T, logp_TV.gather(1, ids_T[:, None])[:, 0]),
    ):
        assert relative_error_or_zero(value, reference) < TOLERANCE[torch.float32]
    assert same_counts(result.clipped_T, naive_clipped(logits_TV, teacher_TV, **case))
    for gradient, reference in zip(torch.autograd.grad(result.loss_sum, models[:2]), expected_gradients):
        assert gradient.dtype == dtype
        assert relative_error_or_zero(gradient, reference) < TOLERANCE[dtype]
        if reference.any():  # one id among itself has no gradient
            assert (gradient.double() * reference).sum() / reference.square().sum() == pytest.approx(1, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_does_not_diverge_from_itself(case, scale):
    """A value of exactly 0. The gradient of k1 is that of log p; a clip below an entry's gradient leaves one; all others vanish exactly."""
    student, _ = logits_pair()
    student = (scale * student.detach()).requires_grad_()
    value_T = vocab_parallel_divergence(student, student.detach(), **with_ids(case, 23, 61))
    (gradient,) = torch.autograd.grad(value_T.sum(), student)
    assert value_T.abs().max() == 0
    if case["kind"] != "k1":
        assert gradient.abs().max() <= (2e-7 if "pointwise_clip" in case else 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_of_scale_100_keep_their_precision(case):
    """Probabilities down to e^-900: the rest's share underflows unless it has its own maximum. 1e-4: a logit of 500 is known to 3e-5."""
    student, teacher = (100 * logits.detach() for logits in logits_pair())
    student.requires_grad_()
    options = with_ids(case, 23, 61)
    value_T = vocab_parallel_divergence(student, teacher, **options)
    expected_T = naive_divergence(student, teacher, **options)
    if case["kind"] == "k3":
        # q/p overflows fp32 before fp64: such a row is infinite, never a wrong number.
        finite_T = value_T.isfinite()
        assert (expected_T[~finite_T] > 1e30).all()
        assert relative_error_or_zero(value_T[finite_T], expected_T[finite_T]) < 1e-4
    else:
        assert torch.equal(value_T.isfinite(), expected_T.isfinite())
        (gradient,) = torch.autograd.grad(value_T.sum(), student)
        (expected,) = torch.autograd.grad(expected_T.sum(), student)
        assert relative_error_or_zero(value_T, expected_T) < 1e-4
        # Saturated probabilities leave gradients far below the terms that cancel in them, which are of the size of the value.
        assert (gradient - expected).norm() <= 1e-4 * (expected.norm() + expected_T.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_chunks_are_one_after_the_other(case):
    """300 tokens with a given shard_start are three chunks; the same rows in one chunk each."""
    student, teacher = (logits.detach().repeat(14, 1)[:300] for logits in logits_pair())
    options = with_ids(case, 300, 61)
    results = []
    for start in (None, 0):
        leaf = student.clone().requires_grad_()
        value_T = vocab_parallel_divergence(leaf, teacher, shard_start=start, **options)
        results.append((value_T.detach(), torch.autograd.grad((value_T * torch.arange(300)).sum(), leaf)[0]))
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("case", [case for case in CASES if case["kind"] not in SAMPLED_KINDS], ids=str)
def test_masked_logits_are_as_if_absent(case):
    """-inf in both models removes an entry; a row masked entirely in either model has loss 0 and gradient 0."""
    student, teacher = logits_pair()
    masked_student, masked_teacher = student.detach().clone(), teacher.clone()
    masked_student[:, 5:9] = masked_teacher[:, 5:9] = -math.inf
    masked_student[3], masked_teacher[4] = -math.inf, -math.inf
    value_T = vocab_parallel_divergence(masked_student.requires_grad_(), masked_teacher, **case)
    (gradient,) = torch.autograd.grad(value_T.sum(), masked_student)
    kept = [column for column in range(student.size(1)) if not 5 <= column < 9]
    expected_T = naive_divergence(student[:, kept], teacher[:, kept], **case)
    expected_T = expected_T * torch.ones_like(expected_T).index_fill_(0, torch.tensor([3, 4]), 0)
    (expected,) = torch.autograd.grad(expected_T.sum(), student)
    assert relative_error_or_zero(value_T, expected_T) < TOLERANCE[torch.float32]
    assert relative_error_or_zero(gradient, expected) < TOLERANCE[torch.float32]
    assert gradient[3:5].abs().max() == 0


@pytest.mark.parametrize("kind", [*SKEW_KINDS, *TOP_K_KINDS, *SAMPLED_KINDS])
def test_nan_stays_in_its_row(kind):
    models, _ = head_problem()
    with torch.no_grad():
        models[0][7] = math.nan
    result = fused_head_divergence(*models, chunk_tokens=10, **with_ids({"kind": kind}, 29, 64))
    (gradient,) = torch.autograd.grad(result.loss_sum, models[0])
    assert torch.equal(result.divergence_T.isnan(), torch.arange(29) == 7)
    assert torch.equal(gradient.isnan().any(-1), torch.arange(29) == 7)


def divergence_of(pair, **options):
    return vocab_parallel_divergence(*pair, **options)


def test_identities_between_kinds():
    """jsd is a sum of two skewed KLs; the skew 0 and a top k of the whole vocabulary are the plain KLs."""
    pair = logits_pair()
    mixed_T = 0.3 * divergence_of(pair, kind="skew_forward", alpha=0.3) + 0.7 * divergence_of(pair, kind="skew_reverse", alpha=0.7)
    assert relative_error_or_zero(divergence_of(pair, kind="jsd", beta=0.3), mixed_T) < TOLERANCE[torch.float32]
    for direction in ("forward", "reverse"):
        full_T = divergence_of(pair, kind=f"{direction}_kl")
        assert torch.equal(divergence_of(pair, kind=f"skew_{direction}", alpha=0.0), full_T)
        for form in ("tail", "renorm"):
            for top_k in (61, 1000):
                assert relative_error_or_zero(divergence_of(pair, kind=f"topk_{form}_{direction}", top_k=top_k), full_T) < TOLERANCE[torch.float32]
        assert (divergence_of(pair, kind=f"topk_tail_{direction}", top_k=5) <= full_T).all()


def test_k1_and_k3_estimate_the_reverse_kl_but_their_gradients_are_zero_and_forward_kl():
    """Expectations over all ids, weighted by the student's own probability. 1e-6: sums of 61 terms."""
    student, teacher = logits_pair(1, 61)
    wide = [logits.detach().repeat(61, 1) for logits in (student, teacher)]
    wide[0].requires_grad_()
    prob_V = student.detach().softmax(-1)[0]
    expected = {}
    for kind in ("reverse_kl", "forward_kl"):
        (expected[kind],) = torch.autograd.grad(divergence_of((student, teacher), kind=kind).sum(), student)
    for kind, gradient in (("k1", torch.zeros_like(student)), ("k3", expected["forward_kl"])):
        value_T = divergence_of(wide, kind=kind, sampled_ids_T=torch.arange(61))
        (mean,) = torch.autograd.grad((value_T * prob_V).sum(), wide[0])
        assert (value_T * prob_V).sum().item() == pytest.approx(divergence_of((student, teacher), kind="reverse_kl").item(), rel=1e-5)
        assert (mean.sum(0) - gradient[0]).abs().max() < 1e-6


def test_equal_logits_are_picked_by_the_lower_id():
    teacher = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    student = torch.randn(1, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(divergence_of((student, teacher), kind="topk_renorm_forward", top_k=3).sum(), student)
    assert gradient.nonzero()[:, 1].tolist() == [1, 2, 3]


def test_an_id_outside_the_vocabulary_is_nan_in_its_row_and_left_out_at_weight_0():
    models, _ = head_problem()
    ids_T, weight_T = torch.arange(29), torch.ones(29)
    ids_T[4], weight_T[4] = -100, 0
    result = fused_head_divergence(*models, kind="k3", sampled_ids_T=ids_T, token_weight_T=weight_T, vocab_size=50)
    gradients = torch.autograd.grad(result.loss_sum, models[:2])
    assert torch.equal(result.divergence_T.isnan(), torch.arange(29) == 4)
    assert relative_error_or_zero(result.student_entropy_T, token_statistics(*models, vocab_size=50).student_entropy_T) < TOLERANCE[torch.float32]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "reverse_kl", "alpha": 0.1}, r"alpha=0.1 belongs to skew_forward and skew_reverse, not to kind='reverse_kl'"),
        ({"kind": "k1", "alpha": 0.1}, r"alpha=0.1 belongs to skew_forward and skew_reverse, not to kind='k1'"),
        ({"kind": "skew_forward", "alpha": 1.0}, r"alpha=1.0 must be in \[0, 1\)"),
        ({"kind": "skew_forward", "alpha": -0.1}, r"alpha=-0.1 must be in \[0, 1\)"),
        ({"kind": "jsd", "top_k": 5}, r"top_k=5 belongs to topk_tail_forward, .*, not to kind='jsd'"),
        ({"kind": "jsd", "support": "teacher"}, r"support='teacher' belongs to topk_tail_forward, .*, not to kind='jsd'"),
        ({"kind": "topk_tail_forward", "top_k": 0}, r"top_k=0 must be a whole number of at least 1"),
        ({"kind": "topk_tail_forward", "support": "both"}, r"support='both' is not known; use teacher or student"),
        ({"kind": "k1"}, r"kind='k1' compares the tokens that were sampled; pass their ids as sampled_ids_T, got None"),
        ({"kind": "k3", "pointwise_clip": 0.1, "sampled_ids_T": torch.arange(4)}, r"pointwise_clip=0.1 does not belong to kind='k3'"),
        ({"kind": "k3", "top_k": 3, "sampled_ids_T": torch.arange(4)}, r"top_k=3 does not belong to kind='k3'"),
    ],
)
def test_options_of_other_kinds_are_refused(options, message):
    models, _ = head_problem(num_tokens=4, num_columns=8)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_divergence(*logits_pair(4, 8), **options)
    with pytest.raises(ValueError, match=message):
        fused_head_divergence(*models, **options)


def test_sampled_ids_are_refused_where_they_mean_nothing_or_do_not_fit():
    with pytest.raises(ValueError, match=r"sampled_ids_T belongs to k1 and k3, not to kind='jsd'"):
        vocab_parallel_divergence(*logits_pair(4, 8), kind="jsd", sampled_ids_T=torch.arange(4))
    with pytest.raises(ValueError, match=r"shapes must agree: sampled_ids_T has \(3,\), the tokens of student_logits_TW has \(4,\)"):
        vocab_parallel_divergence(*logits_pair(4, 8), kind="k1", sampled_ids_T=torch.arange(3))


def test_masking_the_value_in_place_does_not_corrupt_the_backward_and_no_tokens_are_fine():
    student, teacher = logits_pair()
    mask_T = torch.arange(23) % 2
    for case in ({"kind": "topk_tail_reverse"}, {"kind": "k3", "sampled_ids_T": torch.arange(23)}):
        gradients = []
        for masked in (lambda value_T: value_T * mask_T, lambda value_T: value_T.mul_(mask_T)):
            gradients += torch.autograd.grad(masked(vocab_parallel_divergence(student, teacher, **case)).sum(), student)
        assert torch.equal(*gradients)
    assert vocab_parallel_divergence(student[:0], teacher[:0], kind="topk_tail_reverse").shape == (0,)
