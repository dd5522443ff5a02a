"""Every divergence by its definition, term by term in fp64 with torch's autograd: what the tests of losses compare with, and the problems they do it on.

Written to be read, not to be fast; nothing here is shared with the code under test. Shapes: T tokens, V vocabulary, K picked ids.
p is the student's distribution, q the teacher's, both at the temperature:

    reverse_kl   KL(p||q) = sum_v p (log p - log q)        forward_kl   KL(q||p) = sum_v q (log q - log p)
    jsd          beta KL(q||m) + (1 - beta) KL(p||m),  m = beta q + (1 - beta) p                               (GKD, arXiv 2306.13649)
    skew_*       KL(q||m), m = alpha q + (1 - alpha) p;  KL(p||m), m = (1 - alpha) q + alpha p                  (DistiLLM, arXiv 2402.03898)
    topk_*       the two KLs over K ids and the class of all others (tail), or over the K ids among themselves (renorm)
    k1, k3       log(p_y/q_y) and q_y/p_y - 1 - log(q_y/p_y) of a sampled id y                                  (joschu.net/blog/kl-approx.html)

With `pointwise_clip` = c, each summand l_v counts as min(l_v, c)                                               (OPSD, arXiv 2601.18734).
"""

import math

import torch
import torch.nn.functional as F

# fp32 arithmetic on some hundred entries leaves about 1e-6; a wrong term shows at 1e-2 or more. bf16 stores 8 bits: 2^-9 = 0.2 % per rounding,
# and over several ranks the hidden states' gradient is a sum of parts that were each rounded.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SKEW_KINDS = ["skew_forward", "skew_reverse"]
TOP_K_KINDS = ["topk_tail_forward", "topk_tail_reverse", "topk_renorm_forward", "topk_renorm_reverse"]
SAMPLED_KINDS = ["k1", "k3"]


def naive_divergence(student_logits_TV, teacher_logits_TV, *, kind, sampled_ids_T=None, temperature=1.0, pointwise_clip=math.inf, **options):
    """Return the divergence of every token in nats, [T], in fp64; differentiable."""
    if kind in SAMPLED_KINDS:
        log_p, log_q = (F.log_softmax(logits.double() / temperature, -1) for logits in (student_logits_TV, teacher_logits_TV))
        log_ratio = (log_q - log_p).gather(1, sampled_ids_T[:, None])[:, 0]
        return -log_ratio if kind == "k1" else log_ratio.exp() - 1 - log_ratio
    return naive_summands(student_logits_TV, teacher_logits_TV, kind=kind, temperature=temperature, **options).clamp(max=pointwise_clip).sum(-1)


def naive_clipped(student_logits_TV, teacher_logits_TV, *, pointwise_clip=None, **options):
    """Return how many summands of every token exceed the clip, [T]; None without one."""
    if pointwise_clip is None:
        return None
    summand = naive_summands(student_logits_TV.detach(), teacher_logits_TV, **options)
    # A count has no tolerance: a summand that fp32 might put on the other side of the clip would make a test a matter of luck.
    assert ((summand - pointwise_clip).abs() > 2e-5 * pointwise_clip).all(), "choose another clip, or another seed"
    return (summand > pointwise_clip).sum(-1)


def naive_summands(student_logits_TV, teacher_logits_TV, *, kind, beta=0.5, alpha=0.1, top_k=64, support="teacher", temperature=1.0):
    """Return the summands of a kind that has some, of every vocabulary entry or class, in fp64; differentiable."""
    log_p, log_q = (F.log_softmax(logits.double() / temperature, -1) for logits in (student_logits_TV, teacher_logits_TV))
    if kind in TOP_K_KINDS:
        ids_TK = (log_p if support == "student" else log_q).detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        log_p, log_q = (class_logp(logp, ids_TK, tail="tail" in kind) for logp in (log_p, log_q))
    p, q = log_p.exp(), log_q.exp()
    if kind == "jsd":
        log_m = (beta * q + (1 - beta) * p).log()
        return beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)
    if kind == "skew_forward":
        return q * (log_q - torch.logaddexp(log_q + math.log(alpha), log_p + math.log(1 - alpha)))
    if kind == "skew_reverse":
        return p * (log_p - torch.logaddexp(log_p + math.log(alpha), log_q + math.log(1 - alpha)))
    if kind in ("forward_kl", "topk_tail_forward", "topk_renorm_forward"):
        return q * (log_q - log_p)
    assert kind in ("reverse_kl", "topk_tail_reverse", "topk_renorm_reverse"), kind
    return p * (log_p - log_q)


def soft_capped(product_TV, softcap):
    """Return the logits of an LM head's product in a model that caps them, as Gemma 2 does; None caps nothing."""
    return product_TV if softcap is None else softcap * torch.tanh(product_TV / softcap)


def class_logp(logp_TV, ids_TK, *, tail):
    """Return the log-probabilities of the picked ids and of all others together, or of the picked ids among themselves."""
    picked = logp_TV.gather(1, ids_TK)
    if not tail or ids_TK.size(1) == logp_TV.size(1):  # of all ids, nothing is left
        return F.log_softmax(picked, -1)
    return torch.cat([picked, logp_TV.scatter(1, ids_TK, -math.inf).logsumexp(-1, keepdim=True)], -1)


def same_counts(clipped_T, expected_T):
    """Return whether the counts of clipped entries are the expected ones, or both are None: there was no clip."""
    return clipped_T is expected_T is None or torch.equal(clipped_T.long(), expected_T)


def relative_error(value, reference):
    """Return the relative error. Where both are exactly 0 it is NaN, which is below no bound: a comparison with nothing must not pass."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def relative_error_or_zero(value, reference):
    """Return the relative error. Where both are exactly 0, as in a shard of padding, it is 0; where the reference alone is 0, it is above any bound."""
    return ((value.double() - reference.double()).norm() / reference.double().norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def logits_pair(num_tokens=23, num_columns=61, dtype=torch.float32, seed=0):
    """Return the logits of student and teacher, [T, V], of which the student's ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(num_tokens, num_columns, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def head_problem(num_tokens=29, num_columns=64, dtype=torch.float32):
    """Return hidden states and head of student and teacher, of different hidden sizes, and token weights of which every third is 0."""
    generator = torch.Generator().manual_seed(0)
    student_hidden, student_head, teacher_hidden, teacher_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.6).to(dtype)
        for shape in [(num_tokens, 16), (num_columns, 16), (num_tokens, 24), (num_columns, 24)]
    )
    weight_T = torch.rand(num_tokens, generator=generator)
    weight_T[::3] = 0
    return (student_hidden.requires_grad_(), student_head.requires_grad_(), teacher_hidden, teacher_head), weight_T


def with_ids(case, num_tokens, vocab_size):
    """Return the arguments of a case, with sampled ids where its kind needs them."""
    return case | ({"sampled_ids_T": torch.arange(num_tokens) * 5 % vocab_size} if case["kind"] in SAMPLED_KINDS else {})
