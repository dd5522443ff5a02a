"""SimCT as one reads it: a Python loop over units, full log-softmax, autograd. fp64 where given fp64.

`units` are (student_start, student_stop, teacher_start, teacher_stop) into rows of logits; ids are the tokens that stand there.
"""

from __future__ import annotations

import math

import torch


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
