"""Losses of models that soft-cap their logits, in one process, against naive fp64 autograd: each model's cap alone, and both.

Not covered here: memory (test_losses_memory.py), Triton (test_losses_triton.py), several ranks and whole models (tests/distributed/test_softcap.py).
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from opd_megatron.align.simct import simct_divergence
from opd_megatron.align.uld import uld_divergence
from opd_megatron.losses import fused_head_cross_entropy, fused_head_divergence, token_statistics
from tests.reference_losses import SAMPLED_KINDS, SKEW_KINDS, TOLERANCE, TOP_K_KINDS, head_problem, naive_divergence, relative_error, soft_capped, with_ids
from tests.reference_simct import OPTIONS, case_for, exact, naive_uld, one_token_each, random_case
from tests.reference_simct import relative_error as largest_error
from tests.unit.test_simct import ours

# The products have a standard deviation of 1.4 and 1.8: visibly capped, and with both caps most of them at the cap, where 1 - tanh^2 would round away.
CAPS = [(2.0, None), (None, 1.5), (0.5, 0.4)]
CASES = [
    *({"kind": kind} for kind in ("reverse_kl", "forward_kl", "jsd", *SKEW_KINDS, *SAMPLED_KINDS)),
    *({"kind": kind, "top_k": 7, "support": "student"} for kind in TOP_K_KINDS),
    {"kind": "reverse_kl", "pointwise_clip": 0.02},
    {"kind": "topk_tail_forward", "top_k": 7, "pointwise_clip": 0.05},
]
VOCAB = 55


def as_options(caps):
    return dict(zip(("student_softcap", "teacher_softcap"), caps, strict=True))


def capped_logits(models, caps):
    """Return both models' logits on the true vocabulary, and the student's leaves, in fp64."""
    exact_models = [tensor.detach().double() for tensor in models]
    leaves = [tensor.requires_grad_() for tensor in exact_models[:2]]
    products = (exact_models[0] @ exact_models[1][:VOCAB].T, exact_models[2] @ exact_models[3][:VOCAB].T)
    return [soft_capped(product, softcap) for product, softcap in zip(products, caps, strict=True)], leaves


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("caps", CAPS, ids=str)
def test_every_kind_has_the_loss_and_gradients_of_capped_logits(caps, dtype):
    """At another temperature than 1, in several chunks; rows of weight 0, padded columns."""
    models, weight_T = head_problem(dtype=dtype)
    for case in CASES:
        (student, teacher), leaves = capped_logits(models, caps)
        options = with_ids(case, len(weight_T), VOCAB) | {"temperature": 1.7}
        expected_T = naive_divergence(student, teacher, **options)
        expected = torch.autograd.grad((expected_T * weight_T).sum(), leaves)
        result = fused_head_divergence(*models, token_weight_T=weight_T, vocab_size=VOCAB, chunk_tokens=8, **options, **as_options(caps))
        gradients = torch.autograd.grad(result.loss_sum, models[:2])
        assert relative_error(result.divergence_T, expected_T.detach()) < TOLERANCE[torch.float32], case
        assert max(relative_error(*pair) for pair in zip(gradients, expected)) < TOLERANCE[dtype], case
        assert not gradients[1][VOCAB:].any(), case


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cross_entropy_and_log_probabilities_are_those_of_capped_logits(dtype):
    models, weight_T = head_problem(dtype=dtype)
    ids_T = torch.arange(len(weight_T)) * 5 % VOCAB
    (student, _), leaves = capped_logits(models, (2.0, None))
    expected_T = F.cross_entropy(student, ids_T, reduction="none")
    expected = torch.autograd.grad((expected_T * weight_T).sum(), leaves)
    result = fused_head_cross_entropy(*models[:2], ids_T, token_weight_T=weight_T, vocab_size=VOCAB, chunk_tokens=8, student_softcap=2.0)
    assert relative_error(result.divergence_T, expected_T.detach()) < TOLERANCE[torch.float32]
    assert max(relative_error(*pair) for pair in zip(torch.autograd.grad(result.loss_sum, models[:2]), expected)) < TOLERANCE[dtype]
    sampled = fused_head_divergence(*models, kind="jsd", sampled_ids_T=ids_T, vocab_size=VOCAB, student_softcap=2.0)
    assert relative_error(sampled.sampled_logp_T, -expected_T.detach()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("caps", CAPS, ids=str)
def test_statistics_are_those_of_capped_logits(caps):
    models, _ = head_problem()
    (student, teacher), _ = capped_logits(models, caps)
    statistics = token_statistics(*models, vocab_size=VOCAB, temperature=1.7, chunk_tokens=8, **as_options(caps))
    logp = F.log_softmax(student.detach() / 1.7, -1)
    assert relative_error(statistics.student_entropy_T, -(logp.exp() * logp).sum(-1)) < TOLERANCE[torch.float32]
    for kind, value_T in (("reverse_kl", statistics.reverse_kl_T), ("forward_kl", statistics.forward_kl_T)):
        assert relative_error(value_T, naive_divergence(student.detach(), teacher, kind=kind, temperature=1.7)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_capped_model_does_not_diverge_from_itself(scale):
    """Exactly, also where every logit is at the cap; without the cap of one of the two it does."""
    (hidden, head, *_), _ = head_problem()
    pair = (hidden.detach() * scale).requires_grad_(), head.detach().requires_grad_()
    copies = [tensor.detach() for tensor in pair]
    for kind in ("reverse_kl", "forward_kl", "jsd", "topk_tail_reverse"):
        result = fused_head_divergence(*pair, *copies, kind=kind, student_softcap=2.0, teacher_softcap=2.0)
        # A class of a few tokens and the rest are put together from logarithms: fp32 rounding.
        assert result.divergence_T.abs().max() <= (1e-6 if kind == "topk_tail_reverse" else 0)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(result.loss_sum, pair))
    assert fused_head_divergence(*pair, *copies, kind="reverse_kl", student_softcap=2.0).divergence_T.min() > 1e-3


@pytest.mark.parametrize("caps", CAPS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_units_of_another_tokenizer_are_compared_by_capped_logits(caps, dtype, tolerance):
    """SimCT with each of its options, and ULD."""
    shared = {"weight_N": torch.tensor([0.3, 0.0, 1.0, 0.7, 0.2, 0.9, 0.5]), "temperature": 1.3, "softcaps": caps}
    for options in OPTIONS:
        case = case_for(options, 1, num_units=7, dtype=dtype)
        expected = exact(case, **options, **shared)
        _, *found = ours(case, divergence=simct_divergence, chunk_tokens=5, **options, **shared)
        assert max(largest_error(value.detach(), reference) for value, reference in zip(found, expected)) < tolerance, options
    case = one_token_each(random_case(1, num_units=7, dtype=dtype))
    expected = exact(case, loss=naive_uld, top_k=5, **shared)
    _, *found = ours(case, divergence=uld_divergence, chunk_tokens=5, top_k=5, **shared)
    assert max(largest_error(value.detach(), reference) for value, reference in zip(found, expected)) < tolerance


@pytest.mark.parametrize("softcap", [0.0, -30.0, float("inf"), float("nan")])
def test_a_cap_that_is_not_positive_and_finite_is_refused(softcap):
    models, weight_T = head_problem()
    cross_entropy = functools.partial(fused_head_cross_entropy, *models[:2], torch.zeros(len(weight_T), dtype=torch.long))
    for name in ("student_softcap", "teacher_softcap"):
        calls = [functools.partial(fused_head_divergence, *models, kind="jsd"), functools.partial(token_statistics, *models)]
        for call in [*calls, *([cross_entropy] if name == "student_softcap" else [])]:
            with pytest.raises(ValueError, match=f"{name}={softcap} must be positive and finite"):
                call(**{name: softcap})
