"""SimCT as one reads it: a Python loop over units, full log-softmax, autograd. fp64 where given fp64.

`units` are (student_start, student_stop, teacher_start, teacher_stop) into rows of logits; ids are the tokens that stand there.
"""

from __future__ import annotations

import math

import torch

from tests.reference_losses import soft_capped


def naive_simct(
    student_TV,
    teacher_UV,
    units,
    student_ids,
    teacher_ids,
    pairs,
    *,
    has_column,
    kind="reverse_kl",
    score="mean_logprob",
    span_norm="own_k",
    mask_first_token=False,
    gh_threshold=0.0,
    top_k=0,
    eos=None,
):
    """Return the loss of each unit; `pairs` are (student id, teacher id), `eos` the ids of both models that end a text, where these are one column."""
    losses = []
    for (first_s, stop_s, first_t, stop_t), own_column in zip(units, has_column):
        rows = []
        longest = max(stop_s - first_s, stop_t - first_t)
        columns = list(range(len(pairs)))
        if top_k:
            likeliest = sorted(columns, key=lambda k: (-student_TV[first_s, pairs[k][0]].item(), k))
            columns = sorted(likeliest[:top_k])
        if mask_first_token and own_column:
            columns = [k for k in columns if pairs[k][0] != student_ids[first_s] and pairs[k][1] != teacher_ids[first_t]]
        for logits, ids, first, stop, side in ((student_TV, student_ids, first_s, stop_s, 0), (teacher_UV, teacher_ids, first_t, stop_t, 1)):
            logp = torch.log_softmax(logits, -1)
            values = logp if score == "mean_logprob" else logits
            row = [values[first, pairs[k][side]] for k in columns]
            if own_column:
                total = sum(values[first + j, ids[first + j]] for j in range(stop - first))
                row.append(total * {"own_k": 1 / (stop - first), "sum": 1.0, "max_k": 1 / longest}[span_norm])
            if eos is not None:
                row.append(torch.logsumexp(values[first, list(eos[side])], 0))
            rows.append(torch.stack(row))
            if side == 1:
                covered = sum(logp[first, k_teacher].exp() for _, k_teacher in pairs)
                if own_column:
                    norm = {"own_k": 1 / (stop - first), "sum": 1.0, "max_k": 1 / longest}[span_norm]
                    covered = covered + (sum(logp[first + j, ids[first + j]] for j in range(stop - first)) * norm).exp()
                if eos is not None:
                    covered = covered + torch.logsumexp(logp[first, list(eos[1])], 0).exp()
        student, teacher = (torch.log_softmax(row, -1) for row in rows)
        teacher = teacher.detach()
        loss = (student.exp() * (student - teacher)).sum() if kind == "reverse_kl" else (teacher.exp() * (teacher - student)).sum()
        if gh_threshold and min(float(covered), 1.0) * gh_threshold < 1:
            loss = loss * 0
        losses.append(loss)
    return torch.stack(losses) if losses else student_TV.new_zeros(0)


def random_case(seed, *, num_units=7, student_vocab=23, teacher_vocab=31, num_pairs=11, hidden=(8, 12), dtype=torch.float64, longest=3, scale=1.0):
    """Return hidden states, heads, units, ids and pairs of two models of different hidden and vocabulary sizes; the vocabularies meet in any order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (2, num_units), generator=generator)
    student_stops, teacher_stops = lengths.cumsum(1)
    size_t, size_u = (int(stops[-1]) if num_units else 0 for stops in (student_stops, teacher_stops))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = sorted(
        zip(torch.randperm(student_vocab, generator=generator)[:num_pairs].tolist(), torch.randperm(teacher_vocab, generator=generator)[:num_pairs].tolist())
    )
    student_ids = torch.randint(student_vocab, (size_t,), generator=generator)
    teacher_ids = torch.randint(teacher_vocab, (size_u,), generator=generator)
    starts = [(stops - length).tolist() for stops, length in zip((student_stops, teacher_stops), lengths)]
    units = list(zip(starts[0], student_stops.tolist(), starts[1], teacher_stops.tolist()))
    # Half of the units of one token each are a shared pair.
    for place, (s, s_stop, t, t_stop) in enumerate(units):
        if s_stop - s == t_stop - t == 1 and place % 2 and pairs:
            student_ids[s], teacher_ids[t] = pairs[place % len(pairs)]
    in_pairs = set(pairs)
    has_column = [not (b - a == d - c == 1 and (int(student_ids[a]), int(teacher_ids[c])) in in_pairs) for a, b, c, d in units]
    tensors = [draw(size_t, hidden[0]), draw(student_vocab, hidden[0]), draw(size_u, hidden[1]), draw(teacher_vocab, hidden[1])]
    tensors = [tensor.mul(scale * tensor.size(-1) ** -0.25).to(dtype) for tensor in tensors]
    return tensors, units, student_ids.tolist(), teacher_ids.tolist(), pairs, has_column


def relative_error(ours, exact):
    """Return the largest difference over the largest exact value."""
    return float((ours.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30)) if exact.numel() else 0.0


HAND_UNEQUAL = math.log(0.04), math.log(0.04) / 2


def naive_uld(student_TV, teacher_TV, *, top_k=0):
    """Return sum over ranks of the differences of sorted probabilities; with `top_k`, of the highest, and of what is left of each model."""
    size = max(student_TV.size(1), teacher_TV.size(1))
    student, teacher = (torch.nn.functional.pad(logits.softmax(-1), (0, size - logits.size(1))) for logits in (student_TV, teacher_TV.detach()))
    student, teacher = (probs.sort(-1, descending=True).values for probs in (student, teacher))
    if top_k and top_k < size:
        student, teacher = (torch.cat([probs[:, :top_k], probs[:, top_k:].sum(-1, keepdim=True)], -1) for probs in (student, teacher))
    return (student - teacher).abs().sum(-1)


def one_token_each(case):
    """Return the case with its units cut to their first tokens."""
    tensors, units, student_ids, teacher_ids, pairs, _ = case
    first = [(a, c) for a, _, c, _ in units]
    tensors = [tensors[0][[a for a, _ in first]], tensors[1], tensors[2][[c for _, c in first]], tensors[3]]
    units = [(place, place + 1, place, place + 1) for place in range(len(first))]
    return tensors, units, [student_ids[a] for a, _ in first], [teacher_ids[c] for _, c in first], pairs, [False] * len(first)


def rows_of(case):
    """Return the library's form of a case's units."""
    from opd_megatron.align.rows import UnitRows

    _, units, student_ids, teacher_ids, _, has_column = case
    table = torch.tensor(units, dtype=torch.long).reshape(-1, 4)
    return UnitRows(
        student_stops=table[:, 1],
        teacher_stops=table[:, 3],
        student_ids_T=torch.tensor(student_ids, dtype=torch.long),
        teacher_ids_U=torch.tensor(teacher_ids, dtype=torch.long),
        has_column_N=torch.tensor(has_column, dtype=torch.bool),
        is_end_N=torch.arange(len(units)) == len(units) - 1,
    )


def vocabulary_of(case, eos=None):
    """Return the library's form of a case's shared vocabulary; `eos` are the ends that are one column."""
    from opd_megatron.align.vocabulary import SharedVocabulary

    (_, student_head, _, teacher_head), _, _, _, pairs, _ = case
    student_ids, teacher_ids = (torch.tensor([pair[side] for pair in pairs], dtype=torch.long) for side in (0, 1))
    ends = {"eos": "bridge", "student_eos": eos[0], "teacher_eos": eos[1]} if eos else {}
    return SharedVocabulary(student_ids, teacher_ids, len(student_head), len(teacher_head), **ends)


def exact(case, *, weight_N=None, loss=naive_simct, temperature=1.0, softcaps=(None, None), **options):
    """Return losses, and the weighted sum's gradients of the student's hidden states and head, in fp64; `softcaps` are those of both models."""
    (hidden, head, teacher_hidden, teacher_head), units, student_ids, teacher_ids, pairs, has_column = case
    hidden, head = hidden.double().clone().requires_grad_(), head.double().clone().requires_grad_()
    products = hidden @ head.T, teacher_hidden.double() @ teacher_head.double().T
    logits = [soft_capped(product, softcap) / temperature for product, softcap in zip(products, softcaps, strict=True)]
    if loss is naive_simct:
        loss_N = naive_simct(*logits, units, student_ids, teacher_ids, pairs, has_column=has_column, **options)
    else:
        loss_N = loss(*logits, **options)
    (loss_N if weight_N is None else loss_N * weight_N.double()).sum().backward()
    return loss_N.detach(), hidden.grad, head.grad


# What the library and the reference call alike; `eos` are the ends of both models that are one column.
OPTIONS = (
    {},
    {"kind": "forward_kl"},
    {"score": "raw_logit"},
    {"score": "raw_logit", "kind": "forward_kl", "span_norm": "max_k"},
    {"span_norm": "sum"},
    {"mask_first_token": True},
    {"gh_threshold": 2.0},
    {"gh_threshold": 1.4, "score": "raw_logit"},
    {"top_k": 3},
    {"top_k": 4, "mask_first_token": True, "kind": "forward_kl"},
    {"eos": ((1, 2), (3, 4, 5))},
    {"eos": ((1, 2), (3,)), "kind": "forward_kl", "gh_threshold": 1.7},
)


def case_for(options, seed, **sizes):
    """Return a random case; ends that are one column are in no pair."""
    case = list(random_case(seed, **sizes))
    if "eos" in options:
        student_ends, teacher_ends = options["eos"]
        case[4] = [pair for pair in case[4] if pair[0] not in student_ends and pair[1] not in teacher_ends]
    return tuple(case)
