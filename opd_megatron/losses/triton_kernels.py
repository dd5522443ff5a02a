"""Triton code behind `triton_divergence`. One program has one row and walks over its columns.

The per-row inputs come packed as [K, N]: row k of the pack is the k-th number of every row. Outside the row both logits count as -inf.
"""

import triton
import triton.language as tl


@triton.jit
def soft_cap_kernel(product, damping, num_columns, softcap, largest, BLOCK: tl.constexpr):
    """Overwrite the product with largest * tanh(product / softcap), and write 1 - tanh^2 to `damping`, unless that is None."""
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < num_columns
        x = tl.load(product + row * num_columns + columns, mask=inside, other=0.0) / softcap
        # With r = e^-2|x| - 1, tanh |x| is -r / (2 + r), and 1 - tanh^2 is 4 e^-2|x| / (2 + r)^2: no difference of numbers near 1.
        r = _expm1_of_negative(-2 * tl.abs(x))
        tl.store(product + row * num_columns + columns, tl.where(x < 0, r, -r) / (2 + r) * largest, mask=inside)
        if damping is not None:
            tl.store(damping + row * num_columns + columns, 4 * tl.exp(-2 * tl.abs(x)) / ((2 + r) * (2 + r)), mask=inside)


@triton.jit
def row_statistics_kernel(student, teacher, out, num_rows, num_columns, BLOCK: tl.constexpr):
    """Write the seven numbers of `RowStatistics`: sums relative to running maxima, rescaled whenever a maximum grows."""
    row = tl.program_id(0).to(tl.int64)
    student_max = -float("inf")
    teacher_max = -float("inf")
    student_mass = 0.0
    teacher_mass = 0.0
    entropy = 0.0
    reverse = 0.0
    forward = 0.0
    for first in range(0, num_columns, BLOCK):
        s, t = _load_pair(student, teacher, row, first, num_columns, BLOCK)
        new_student_max = tl.maximum(student_max, tl.max(s, 0))
        new_teacher_max = tl.maximum(teacher_max, tl.max(t, 0))
        # With nothing summed yet the old maximum is -inf, and any shift of zeros is right.
        student_shift = tl.where(student_max == -float("inf"), 0.0, student_max - new_student_max)
        teacher_shift = tl.where(teacher_max == -float("inf"), 0.0, teacher_max - new_teacher_max)
        student_scale = tl.exp(student_shift)
        teacher_scale = tl.exp(teacher_shift)
        gap = student_shift - teacher_shift
        entropy = (entropy + student_shift * student_mass) * student_scale
        reverse = (reverse + gap * student_mass) * student_scale
        forward = (forward - gap * teacher_mass) * teacher_scale
        student_max = new_student_max
        teacher_max = new_teacher_max
        us = s - tl.where(student_max == -float("inf"), 0.0, student_max)
        ut = t - tl.where(teacher_max == -float("inf"), 0.0, teacher_max)
        es = tl.exp(us)
        et = tl.exp(ut)
        student_mass = student_mass * student_scale + tl.sum(es, 0)
        teacher_mass = teacher_mass * teacher_scale + tl.sum(et, 0)
        entropy += tl.sum(_times_log(es, us), 0)
        reverse += tl.sum(_times_log(es, us - ut), 0)
        forward += tl.sum(_times_log(et, ut - us), 0)
    tl.store(out + row, student_max)
    tl.store(out + num_rows + row, teacher_max)
    tl.store(out + 2 * num_rows + row, student_mass)
    tl.store(out + 3 * num_rows + row, teacher_mass)
    tl.store(out + 4 * num_rows + row, entropy)
    tl.store(out + 5 * num_rows + row, reverse)
    tl.store(out + 6 * num_rows + row, forward)


@triton.jit
def term_sums_kernel(student, teacher, norms, out, num_rows, num_columns, share, clip, KIND: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of the summands and the sum of the slopes of every row, and where entries are clipped, their number."""
    row = tl.program_id(0).to(tl.int64)
    value = 0.0
    correction = 0.0
    clipped = 0.0
    for first in range(0, num_columns, BLOCK):
        s, t = _load_pair(student, teacher, row, first, num_columns, BLOCK)
        p, logp, q, logq = _normalised(s, t, norms, row, num_rows)
        summand, slope = _terms(p, logp, q, logq, share, clip, KIND, CLIPPED)
        if CLIPPED:
            clipped += tl.sum((summand > clip).to(tl.float32), 0)
            # Not tl.minimum, which on a GPU would return the clip for a NaN.
            summand = tl.where(summand > clip, clip, summand)
        value += tl.sum(summand, 0)
        correction += tl.sum(slope, 0)
    tl.store(out + row, value)
    tl.store(out + num_rows + row, correction)
    if CLIPPED:
        tl.store(out + 2 * num_rows + row, clipped)


@triton.jit
def gradient_kernel(student, teacher, norms, num_rows, num_columns, share, clip, KIND: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Overwrite the student's logits with scale * (slope - p * correction); `norms` has both as its rows 4 and 5."""
    row = tl.program_id(0).to(tl.int64)
    correction = tl.load(norms + 4 * num_rows + row)
    scale = tl.load(norms + 5 * num_rows + row)
    for first in range(0, num_columns, BLOCK):
        s, t = _load_pair(student, teacher, row, first, num_columns, BLOCK)
        p, logp, q, logq = _normalised(s, t, norms, row, num_rows)
        _, slope = _terms(p, logp, q, logq, share, clip, KIND, CLIPPED)
        columns = first + tl.arange(0, BLOCK)
        tl.store(student + row * num_columns + columns, (slope - p * correction) * scale, mask=columns < num_columns)


@triton.jit
def _load_pair(student, teacher, row, first, num_columns, BLOCK: tl.constexpr):
    columns = first + tl.arange(0, BLOCK)
    inside = columns < num_columns
    s = tl.load(student + row * num_columns + columns, mask=inside, other=-float("inf"))
    t = tl.load(teacher + row * num_columns + columns, mask=inside, other=-float("inf"))
    return s, t


@triton.jit
def _normalised(s, t, norms, row, num_rows):
    """Return p, log p, q, log q. The mass inf marks a row to ignore: all its probabilities are 0."""
    student_max = tl.load(norms + row)
    teacher_max = tl.load(norms + num_rows + row)
    student_mass = tl.load(norms + 2 * num_rows + row)
    teacher_mass = tl.load(norms + 3 * num_rows + row)
    # The maximum and the logarithm of the mass go one after the other: together they would round the logarithm away.
    us = s - tl.where(student_max == -float("inf"), 0.0, student_max)
    ut = t - tl.where(teacher_max == -float("inf"), 0.0, teacher_max)
    return tl.exp(us) / student_mass, us - tl.log(student_mass), tl.exp(ut) / teacher_mass, ut - tl.log(teacher_mass)


@triton.jit
def _terms(p, logp, q, logq, share, clip, KIND: tl.constexpr, CLIPPED: tl.constexpr):
    """Return the summand, not yet clipped, and the slope of every entry, as `Divergence._terms`: constants of dL/dp are left out unless entries are clipped."""
    gap = logq - logp
    if KIND == "reverse_kl":
        summand = _times_log(p, -gap)
        slope = summand
        constant = 1.0
    elif KIND == "forward_kl":
        summand = _times_log(q, gap)
        slope = -q
        constant = 0.0
    elif KIND == "jsd":
        mixture, _ = _mixture(gap, share)
        slope = _times_log(p, -(tl.maximum(gap, 0.0) + mixture)) * (1 - share)
        summand = _times_log(q, tl.minimum(gap, 0.0) - mixture) * share + slope
        constant = 0.0
    elif KIND == "skew_forward":
        mixture, gap_exp = _mixture(gap, share)
        summand = _times_log(q, tl.minimum(gap, 0.0) - mixture)
        slope = _times_log(p, _student_excess(gap, gap_exp, mixture)) * (1 - share) * (1 - share)
        constant = share - 1.0
    else:
        mixture, gap_exp = _mixture(gap, 1 - share)
        summand = _times_log(p, -(tl.maximum(gap, 0.0) + mixture))
        slope = summand - _times_log(p, _student_excess(gap, gap_exp, mixture)) * share * (1 - share)
        constant = 1.0 - share
    if CLIPPED:
        slope = tl.where(summand > clip, 0.0, slope + constant * p)
    return summand, slope


@triton.jit
def _mixture(gap, teacher_share):
    """Return r = log(1 + w expm1(-|d|)) and expm1(-|d|), with w the share of the smaller probability: log m = max(log p, log q) + r."""
    gap_exp = _expm1_of_negative(-tl.abs(gap))
    return _log1p_of_negative(tl.where(gap > 0, 1 - teacher_share, teacher_share) * gap_exp), gap_exp


@triton.jit
def _student_excess(gap, gap_exp, mixture):
    """Return (p - q)/m."""
    return tl.where(gap > 0, gap_exp, -gap_exp) / tl.exp(mixture)


@triton.jit
def _times_log(prob, log):
    """Return prob * log with 0 * inf = 0. A NaN probability stays NaN."""
    return tl.where(prob == 0, 0.0, prob * log)


@triton.jit
def _expm1_of_negative(x):
    """Return e^x - 1 for x <= 0, to fp32 rounding: near 0 by its series, whose ninth term is below 2^-32 at -0.3."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x / 40320)))))))
    return tl.where(x > -0.3, series, tl.exp(x) - 1)


@triton.jit
def _log1p_of_negative(y):
    """Return log(1 + y) for -1 <= y <= 0, to fp32 rounding: near 0 as 2 atanh(y / (2 + y)), by its series."""
    z = y / (2 + y)
    square = z * z
    series = 2 * z * (1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square / 11)))))
    return tl.where(y > -0.3, series, tl.log(1 + y))
