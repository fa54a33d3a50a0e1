"""`softmax_kl` on Triton: one program for each row, which takes its classes in blocks.

What bounds it: memory. Forward reads both rows once (for the divergences with a mixture and total
variation twice: the logarithm of a sum of p and q needs both of them whole), backward reads both
once and writes one: 4 and 6 bytes a class in bfloat16, beside two to four exponentials. An H200
computes three of them while 4 bytes arrive. Not timed.

In the kernels a `model` is where its row of logits begins, and the scale and cap they are seen by.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from trine.ops import _triton
from trine.ops._checks import check_rows
from trine.ops._triton import narrow
from trine.ops.softmax_kl import _SAVED_COLUMNS
from trine.ops.softmax_kl import _fake as check_and_allocate
from trine.ops.softmax_kl import _fake_backward as check_and_allocate_gradient
from trine.ops.softmax_kl.triton_elements import (
    AS_THEY_ARE,
    CAPPED,
    INFINITY,
    JENSEN_SHANNON,
    KULLBACK_LEIBLER,
    LN_2,
    LOG2_E,
    SCALED,
    SKEWED_KL,
    TOTAL_VARIATION,
    divergence_gradient,
    probabilities_and_slopes,
    seen,
    slope_of_seen,
)

# Divergences: which, whether student and teacher are exchanged, whether beta has a meaning.
_DIVERGENCES = {
    "forward_kl": (KULLBACK_LEIBLER, False, False),
    "reverse_kl": (KULLBACK_LEIBLER, True, False),
    "jsd": (JENSEN_SHANNON, False, True),
    "skewed_forward_kl": (SKEWED_KL, False, True),
    "skewed_reverse_kl": (SKEWED_KL, True, True),
    "total_variation": (TOTAL_VARIATION, False, False),
}
_COLUMNS = tl.constexpr(_SAVED_COLUMNS)
_LEAST_TAIL = tl.constexpr(2.0**-23)  # of a teacher: fp32 knows 1 to this
# Classes that a program takes at a time: eight for each of 256 threads.
_BLOCK = 128 if _triton.INTERPRETED else 2048


@triton.jit
def _load(model, at, inside, HOW: tl.constexpr):
    """Logits as they are seen; -inf where there are none."""
    logits, scale, cap = model
    x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, seen(x, scale, cap, HOW), -INFINITY)


@triton.jit
def _in_order(student, teacher, REVERSED: tl.constexpr):
    """What is of a and of b."""
    if REVERSED:
        return teacher, student
    else:
        return student, teacher


@triton.jit
def _weights(class_weight, at, inside):
    if class_weight is None:
        return inside.to(tl.float32)
    else:
        return tl.load(class_weight + at, mask=inside, other=0.0)


# --- sums over a row: a maximum so far, and lanes of sums relative to it ------------------------


@triton.jit
def _empty_sums(SIZE: tl.constexpr):
    return tl.full([], -INFINITY, tl.float32), tl.zeros([SIZE], tl.float32)


@triton.jit
def _raised(maximum, values):
    """The maximum of all so far, by how much it rose, and what to subtract from logits."""
    higher = tl.maximum(maximum, tl.max(values, 0))
    rise = tl.where(maximum == -INFINITY, 0.0, higher - maximum)
    return higher, rise, tl.where(higher == -INFINITY, 0.0, higher)


@triton.jit
def _total(lanes):
    return tl.sum(lanes.to(tl.float64), 0)


@triton.jit
def _softmax_sums(sums, z, rate):
    """Maximum, and sum of exp((z - maximum) / T), with these logits, too."""
    maximum, total = sums
    maximum, rise, origin = _raised(maximum, z)
    return maximum, total * tl.exp2(-rise * rate) + tl.exp2((z - origin) * rate)


@triton.jit
def _smoothed_sums(sums, z, weight, inside):
    """Maximum, and sums of weight * (z - maximum) and of weight, with these logits, too."""
    maximum, logits, weights = sums
    maximum, rise, origin = _raised(maximum, z)
    term = tl.where(inside, weight * (z - origin), 0.0)
    return maximum, logits - rise * weights + term, weights + weight


@triton.jit
def _empty_divergence_sums(SIZE: tl.constexpr):
    lowest, nothing = _empty_sums(SIZE)
    return lowest, lowest, nothing, nothing, nothing, nothing - INFINITY


@triton.jit
def _divergence_sums(sums, a, b, rate, KIND: tl.constexpr):
    """With these logits, too, where x = (a - max_a) / T and y is alike: both maxima, the sums of
    exp(x), of exp(y), and for forward KL of exp(y) * (y - x) * T and the largest b of a = -inf."""
    max_a, max_b, sum_a, sum_b, weighted, impossible = sums
    max_a, rise_a, origin_a = _raised(max_a, a)
    max_b, rise_b, origin_b = _raised(max_b, b)
    x = a - origin_a
    y = b - origin_b
    power = tl.exp2(y * rate)
    shrink = tl.exp2(-rise_b * rate)
    if KIND == KULLBACK_LEIBLER:
        term = tl.where((power == 0) | (a == -INFINITY), 0.0, power * (y - x))
        weighted = (weighted + sum_b * (rise_a - rise_b)) * shrink + term
        impossible = tl.maximum(impossible, tl.where(a == -INFINITY, b, -INFINITY))
    sum_a = sum_a * tl.exp2(-rise_a * rate) + tl.exp2(x * rate)
    return max_a, max_b, sum_a, sum_b * shrink + power, weighted, impossible


@triton.jit
def _finished(sums, rate, KIND: tl.constexpr):
    """What is known of the row, but for mean slopes; and forward KL, whose mean is that of y - x,
    times T."""
    max_a, max_b, sum_a, sum_b, weighted, impossible = sums
    total_b = _total(sum_b)
    log2_ratio = tl.log2(_total(sum_a) / total_b)
    empty = (max_a == -INFINITY) | (max_b == -INFINITY)
    log2_ratio = tl.where(empty, float("nan"), log2_ratio)
    mean = log2_ratio
    kl = log2_ratio
    if KIND == KULLBACK_LEIBLER:
        mean = _total(weighted) / total_b
        kl = (mean * rate + log2_ratio) * LN_2
        kl = tl.where(kl < 0, 0.0, kl)  # rounding may leave a hair below 0
        lacks = tl.exp2((tl.max(impossible, 0) - max_b) * rate) > 0
        mean = tl.where(lacks, INFINITY, mean)
        kl = tl.where(lacks & (log2_ratio == log2_ratio), INFINITY, kl)
    log2_ratio = log2_ratio.to(tl.float32)
    mean = mean.to(tl.float32)
    return (max_a, max_b, log2_ratio, (1.0 / total_b).to(tl.float32), mean, mean), kl


@triton.jit
def _slope_terms(a, b, row, rate, beta, KIND: tl.constexpr):
    """p, q, p times its slope, and that plus q times its: the divergence is the sum of these, for
    it is a homogeneous function of p and q."""
    p, q, of_p, of_q = probabilities_and_slopes(a, b, row, rate, 1.0, beta, KIND)
    return p, q, p * of_p, p * of_p + q * of_q


@triton.jit
def _with_means(row, terms):
    """The row with its mean slopes, and the divergence, from lanes of `_slope_terms`."""
    p, q, of_p, of_both = terms
    slope = _total(of_p)
    divergence = _total(of_both)
    mean_a = (slope / _total(p)).to(tl.float32)
    mean_b = ((divergence - slope) / _total(q)).to(tl.float32)
    max_a, max_b, log2_ratio, inverse_sum_b, _, _ = row
    divergence = tl.where(divergence < 0, 0.0, divergence)
    divergence = tl.where(log2_ratio == log2_ratio, divergence, log2_ratio)
    return (max_a, max_b, log2_ratio, inverse_sum_b, mean_a, mean_b), divergence


# --- teachers known by some classes alone: each has a bin, all others are the tail --------------


@triton.jit
def _classes_of_bins(indices, slots, SLOTS: tl.constexpr):
    """-1: none. Bin number `slots` is the tail."""
    j = tl.arange(0, SLOTS)
    return tl.load(indices + j, mask=j < slots, other=-1).to(tl.int32)


@triton.jit
def _have_bins(index, begin, BLOCK: tl.constexpr):
    """Which of the classes from `begin` on do."""
    here = (index >= begin) & (index < begin + BLOCK)
    return tl.histogram(tl.where(here, index - begin, 0), BLOCK, mask=here) > 0


@triton.jit
def _logits_of_bins(student, teacher, index, slots, classes, tail, temperature, HOW: tl.constexpr):
    """The student's, relative to the largest, and the teacher's; `tail` is the maximum of the
    student's other logits and the sum of exp((z - maximum) / T)."""
    is_tail = tl.arange(0, index.shape[0]) == slots
    used = index >= 0
    s = _load(student, index, used & (index < classes), HOW)
    s = tl.where(index >= classes, float("nan"), s)
    maximum, total = tail
    highest = tl.maximum(maximum, tl.max(s, 0))
    origin = tl.where(highest == -INFINITY, 0.0, highest)
    s = tl.where(is_tail, maximum - origin + temperature * tl.log(total), s - origin)

    t = _load(teacher, tl.arange(0, index.shape[0]), used, SCALED)
    left = 1.0 - tl.sum(tl.exp(t.to(tl.float64) / temperature), 0)
    left = temperature * tl.log(tl.where(left < _LEAST_TAIL, _LEAST_TAIL, left)).to(tl.float32)
    left = tl.where(tl.sum(used.to(tl.int32), 0) == classes, -INFINITY, left)
    return s, tl.where(is_tail, left, t)


@triton.jit
def softmax_kl_kernel(
    student,
    teacher,
    indices,
    labels,
    class_weight,
    row_mask,
    saved,
    soft,
    hard,
    all_classes,
    student_stride,
    teacher_stride,
    slots,
    temperature,
    rate,
    beta,
    of_label,
    of_each,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    KIND: tl.constexpr,
    REVERSED: tl.constexpr,
    STUDENT_SEEN: tl.constexpr,
    TEACHER_SEEN: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`of_label` and `of_each` are the shares of the label and of each class in the cross entropy.
    SLOTS is 0, or more than the `slots` of a row."""
    i = tl.program_id(0).to(tl.int64)
    counted = True
    if row_mask is not None:
        counted = tl.load(row_mask + i) != 0
    classes = tl.where(counted, all_classes, 0)  # of a row that does not count nothing is read
    of_student = (student + i * student_stride, student_scale, student_cap)
    of_teacher = (teacher + i * teacher_stride, teacher_scale, teacher_cap)
    saved += i * _COLUMNS
    sums = _empty_divergence_sums(BLOCK)
    tail = _empty_sums(BLOCK)
    cross = _empty_sums(BLOCK)
    lowest, nothing = cross
    smoothed = (lowest, nothing, nothing)
    if SLOTS > 0:
        index = _classes_of_bins(indices + i * slots, slots, SLOTS)
    for begin in range(0, classes, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < classes
        s = _load(of_student, at, inside, STUDENT_SEEN)
        if labels is not None:
            cross = _softmax_sums(cross, s, LOG2_E)
            if SMOOTHED:
                w = _weights(class_weight, at, inside)
                smoothed = _smoothed_sums(smoothed, s, w, inside)
        if SLOTS > 0:
            tail = _softmax_sums(
                tail, tl.where(_have_bins(index, begin, BLOCK), -INFINITY, s), rate
            )
        else:
            a, b = _in_order(s, _load(of_teacher, at, inside, TEACHER_SEEN), REVERSED)
            sums = _divergence_sums(sums, a, b, rate, KIND)

    if SLOTS > 0:
        tail_max, tail_lanes = tail
        tail_sum = _total(tail_lanes).to(tl.float32)
        tail = (tail_max, tail_sum)
        s, t = _logits_of_bins(
            of_student, of_teacher, index, slots, classes, tail, temperature, STUDENT_SEEN
        )
        a, b = _in_order(s, t, REVERSED)
        sums = _divergence_sums(_empty_divergence_sums(SLOTS), a, b, rate, KIND)
        tl.store(saved + 8, tail_max)
        tl.store(saved + 9, tail_sum)
    row, divergence = _finished(sums, rate, KIND)
    if KIND != KULLBACK_LEIBLER:
        if SLOTS > 0:
            terms = _slope_terms(a, b, row, rate, beta, KIND)
        else:
            terms = (nothing, nothing, nothing, nothing)
            for begin in range(0, classes, BLOCK):
                at = begin + tl.arange(0, BLOCK)
                inside = at < classes
                s, t = (
                    _load(of_student, at, inside, STUDENT_SEEN),
                    _load(of_teacher, at, inside, TEACHER_SEEN),
                )
                a, b = _in_order(s, t, REVERSED)
                p, q, of_p, of_both = terms
                p_here, q_here, of_p_here, of_both_here = _slope_terms(a, b, row, rate, beta, KIND)
                terms = (p + p_here, q + q_here, of_p + of_p_here, of_both + of_both_here)
        row, divergence = _with_means(row, terms)
    tl.store(soft + i, tl.where(counted, divergence, 0.0).to(tl.float32))
    for column in tl.static_range(6):
        tl.store(saved + column, row[column])

    if labels is not None:
        label = tl.load(labels + i)
        inside = (label >= 0) & (label < classes)
        maximum, lanes = cross
        total = _total(lanes)
        factor = of_label * _weights(class_weight, label, inside)
        loss = factor * (tl.log(total) - (_load(of_student, label, inside, STUDENT_SEEN) - maximum))
        if SMOOTHED:
            _, logits, weights = smoothed
            weight = of_each * _total(weights)
            loss += weight * tl.log(total) - of_each * _total(logits)
            factor += weight
        valid = inside & (maximum > -INFINITY)
        loss = tl.where(valid, loss, float("nan"))
        tl.store(hard + i, tl.where(counted, loss, 0.0).to(tl.float32))
        tl.store(saved + 6, maximum)
        tl.store(saved + 7, tl.where(valid, factor / total, float("nan")).to(tl.float32))


@triton.jit
def _cross_entropy_gradient(z, at, inside, class_weight, cross, SMOOTHED: tl.constexpr):
    """With respect to z, of classes `at`: `factor` * softmax(z), less what the labels ask for."""
    scale, maximum, factor, label, of_label, of_each = cross
    asked = tl.where(at == label, of_label, 0.0)
    if SMOOTHED:
        asked += of_each * _weights(class_weight, at, inside)
    gradient = tl.exp2((z - maximum) * LOG2_E) * factor - asked
    return tl.where(scale == 0, 0.0, scale * gradient)


@triton.jit
def _store_gradient(gradient, model, at, inside, stored, value, HOW: tl.constexpr):
    """With respect to the logits, from that with respect to what is seen of them; 0 for padding."""
    logits, scale, cap = model
    if HOW != AS_THEY_ARE:
        x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        value *= slope_of_seen(x, scale, cap, HOW)
    value = narrow(tl.where(inside, value, 0.0), gradient.dtype.element_ty)
    tl.store(gradient + at, value, mask=stored)


@triton.jit
def softmax_kl_backward_kernel(
    grad_soft,
    grad_hard,
    gradient,
    width,
    student,
    teacher,
    indices,
    labels,
    class_weight,
    row_mask,
    saved,
    all_classes,
    student_stride,
    teacher_stride,
    slots,
    temperature,
    rate,
    beta,
    of_label,
    of_each,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    KIND: tl.constexpr,
    REVERSED: tl.constexpr,
    STUDENT_SEEN: tl.constexpr,
    TEACHER_SEEN: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FOR_TEACHER: tl.constexpr,
):
    """`gradient` [rows, width]; FOR_TEACHER there are no labels. The others as in forward."""
    i = tl.program_id(0).to(tl.int64)
    of_soft = tl.load(grad_soft + i) / temperature
    counted = of_soft != 0
    if labels is not None:
        of_hard = tl.load(grad_hard + i)
        counted = counted | (of_hard != 0)
    if row_mask is not None:
        counted = counted & (tl.load(row_mask + i) != 0)
    classes = tl.where(counted, all_classes, 0)  # where it is 0 the gradient is, even of NaN
    of_student = (student + i * student_stride, student_scale, student_cap)
    of_teacher = (teacher + i * teacher_stride, teacher_scale, teacher_cap)
    gradient += i * width
    saved += i * _COLUMNS
    log2_ratio = tl.load(saved + 2)
    row = (
        tl.load(saved),
        tl.load(saved + 1),
        log2_ratio,
        tl.load(saved + 3),
        tl.load(saved + 4),
        tl.load(saved + 5),
    )
    scale = tl.where(log2_ratio == log2_ratio, of_soft, log2_ratio)
    if labels is not None:
        label = tl.load(labels + i)
        share = of_label * _weights(class_weight, label, (label >= 0) & (label < classes))
        cross = (of_hard, tl.load(saved + 6), tl.load(saved + 7), label, share, of_each)
    if SLOTS > 0:
        index = _classes_of_bins(indices + i * slots, slots, SLOTS)
        index = tl.where(index < classes, index, -1)
        tail_max, tail_sum = tl.load(saved + 8), tl.load(saved + 9)
        tail = (tail_max, tail_sum)
        s_bins, t_bins = _logits_of_bins(
            of_student, of_teacher, index, slots, classes, tail, temperature, STUDENT_SEEN
        )
        a_bins, b_bins = _in_order(s_bins, t_bins, REVERSED)
        of_bins = divergence_gradient(a_bins, b_bins, row, rate, scale, beta, KIND, REVERSED)
        of_bins = tl.where(of_soft == 0, 0.0, of_bins)
        of_tail = tl.sum(tl.where(tl.arange(0, SLOTS) == slots, of_bins, 0.0), 0) / tail_sum
    for begin in range(0, width, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < classes
        stored = at < width
        s = _load(of_student, at, inside, STUDENT_SEEN)
        if SLOTS > 0:
            stored = stored & (_have_bins(index, begin, BLOCK) == 0)
            value = tl.exp2((s - tail_max) * rate) * of_tail
        else:
            a, b = _in_order(s, _load(of_teacher, at, inside, TEACHER_SEEN), REVERSED)
            value = divergence_gradient(a, b, row, rate, scale, beta, KIND, FOR_TEACHER != REVERSED)
        value = tl.where(of_soft == 0, 0.0, value)
        if labels is not None:
            value += _cross_entropy_gradient(s, at, inside, class_weight, cross, SMOOTHED)
        if FOR_TEACHER:
            _store_gradient(gradient, of_teacher, at, inside, stored, value, TEACHER_SEEN)
        else:
            _store_gradient(gradient, of_student, at, inside, stored, value, STUDENT_SEEN)
    if SLOTS > 0:
        inside = index >= 0
        if labels is not None:
            s_bins = _load(of_student, index, inside, STUDENT_SEEN)
            of_bins += _cross_entropy_gradient(s_bins, index, inside, class_weight, cross, SMOOTHED)
        _store_gradient(gradient, of_student, index, inside, inside, of_bins, STUDENT_SEEN)


def _kind(divergence: str, beta: float) -> tuple[int, bool]:
    if divergence not in _DIVERGENCES:
        names = ", ".join(f"'{name}'" for name in _DIVERGENCES)
        raise ValueError(f"softmax_kl: divergence must be one of {names}; it is '{divergence}'")
    kind, is_reversed, takes_beta = _DIVERGENCES[divergence]
    if takes_beta and not 0 < beta < 1:
        raise ValueError(
            f"softmax_kl: beta of '{divergence}' must lie between 0 and 1, it is {beta}; at the "
            "ends are 'forward_kl' and 'reverse_kl'"
        )
    return kind.value, is_reversed


def _how_seen(scale: float, cap: float) -> int:
    if not 0 < scale < math.inf or not 0 <= cap < math.inf:
        raise ValueError(
            f"softmax_kl: logit scales and soft-caps must be positive and finite; they are {scale} "
            f"and {cap}"
        )
    if cap:
        return CAPPED.value
    return AS_THEY_ARE.value if scale == 1 else SCALED.value


def _as_kernels_take_them(
    student: Tensor,
    teacher: Tensor,
    teacher_indices: Tensor | None,
    labels: Tensor | None,
    class_weight: Tensor | None,
    row_mask: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    label_smoothing: float,
    classes: int,
    student_scale: float,
    student_cap: float,
    teacher_scale: float,
    teacher_cap: float,
    teacher_is_log: bool,
) -> dict:
    """The arguments of the operators as those that both kernels share."""
    check_rows("softmax_kl", student)
    check_rows("softmax_kl", teacher)
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"softmax_kl: temperature must be positive and finite, it is {temperature}"
        )
    kind, is_reversed = _kind(divergence, beta)
    students, teachers = _triton.as_rows(student), _triton.as_rows(teacher)
    slots = 0 if teacher_indices is None else teacher.shape[-1]
    if teacher_is_log or slots:
        teacher_scale, teacher_cap = temperature, 0.0

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(-1).contiguous()

    block = min(triton.next_power_of_2(max(classes, 16)), _BLOCK)
    return {
        "student": students,
        "teacher": teachers,
        "indices": flat(teacher_indices),
        "labels": flat(labels),
        "class_weight": flat(class_weight),
        "row_mask": flat(row_mask),
        "all_classes": classes,
        "student_stride": students.stride(0),
        "teacher_stride": teachers.stride(0),
        "slots": slots,
        "temperature": temperature,
        "rate": math.log2(math.e) / temperature,
        "beta": beta,
        "of_label": 1 - label_smoothing,
        "of_each": label_smoothing / max(classes, 1),
        "student_scale": student_scale,
        "student_cap": student_cap,
        "teacher_scale": teacher_scale,
        "teacher_cap": teacher_cap,
        "KIND": kind,
        "REVERSED": is_reversed,
        "STUDENT_SEEN": _how_seen(student_scale, student_cap),
        "TEACHER_SEEN": _how_seen(teacher_scale, teacher_cap),
        "SMOOTHED": label_smoothing != 0,
        "SLOTS": 0 if teacher_indices is None else triton.next_power_of_2(slots + 1),
        "BLOCK": block,
        "num_warps": min(max(block // 256, 1), 8),
    }


def softmax_kl(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    shared = _as_kernels_take_them(*arguments)
    soft, hard, saved = check_and_allocate(*arguments)
    if shared["all_classes"] == 0:
        return soft.zero_(), hard.zero_(), saved
    if soft.numel() > 0:
        softmax_kl_kernel[(soft.numel(),)](soft=soft, hard=hard, saved=saved, **shared)
    return soft, hard, saved


def softmax_kl_backward(grad_soft: Tensor, grad_hard: Tensor, *others) -> Tensor:
    *arguments, saved, for_teacher = others
    shared = _as_kernels_take_them(*arguments)
    if for_teacher:
        if shared["indices"] is not None:
            raise ValueError("softmax_kl: a teacher known by some classes alone gets no gradient")
        shared["labels"] = None
    gradient = check_and_allocate_gradient(grad_soft, grad_hard, *others)
    if gradient.numel() > 0:
        softmax_kl_backward_kernel[(grad_soft.numel(),)](
            grad_soft=grad_soft.contiguous(),
            grad_hard=grad_hard.contiguous(),
            gradient=gradient,
            width=gradient.shape[-1],
            saved=saved,
            FOR_TEACHER=for_teacher,
            **shared,
        )
    return gradient
