"""Divergence of a student's softmax from a teacher's: the soft-target loss of distillation."""

import torch
from torch import Tensor

from trine import _library  # noqa: F401  (registers the operator)
from trine.ops._checks import (
    check_one_device,
    explain_missing_kernel,
    in_forward_mode,
    refuse_tangents,
)
from trine.ops.softmax_kl import reference
from trine.ops.softmax_kl.loss import Loss, LossTerms, pair

__all__ = ["LossTerms", "softmax_kl"]

_op = torch.ops.trine.softmax_kl.default
_backward_op = torch.ops.trine.softmax_kl_backward.default
explain_missing_kernel("softmax_kl")
explain_missing_kernel("softmax_kl_backward")
_SAVED_COLUMNS = 10  # what backward needs to know of a row, on any backend at most
_TENSORS = 6  # arguments of the operator before its options


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    labels: Tensor | None = None,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    teacher_indices: Tensor | None = None,
    teacher_is_log_probabilities: bool = False,
    classes: int | None = None,
    softcap: float | tuple[float | None, float | None] | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    row_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    scale_by_t_squared: bool = True,
    return_terms: bool = False,
) -> Tensor | LossTerms:
    """T^2 * D(p_teacher, p_student) with p = softmax(logits / T), no probability ever stored.

    It replaces `F.kl_div(log_softmax(s / T), softmax(t / T)) * T * T` and its relatives. The factor
    T^2 keeps the gradient's size independent of T (Hinton et al. 2015, arXiv:1503.02531); it is
    contained in the result, so do not multiply again. Computed in fp32 whatever the inputs' dtype,
    also under autocast. With `labels` the loss is

        alpha * T^2 * D(p_teacher, p_student) + (1 - alpha) * F.cross_entropy(student, labels)

    With p of the student, q of the teacher and m their mixture, `divergence` is one of

    - "forward_kl": KL(q || p), which covers the teacher's modes
    - "reverse_kl": KL(p || q), which seeks one (MiniLLM, arXiv:2306.08543)
    - "jsd": beta * KL(q || m) + (1 - beta) * KL(p || m), m = beta * q + (1 - beta) * p
      (GKD, arXiv:2306.13649, whose implementations take forward and reverse KL for beta = 0 and 1)
    - "skewed_forward_kl": KL(q || m), m = beta * q + (1 - beta) * p (DistiLLM, arXiv:2402.03898,
      with beta = 0.1)
    - "skewed_reverse_kl": KL(p || m), m = beta * p + (1 - beta) * q
    - "total_variation": the sum of |p - q|, halved

    On the CPU, and on GPUs of compute capability 9.0 (H100, H200), a scalar loss of float32 or
    bfloat16 logits whose student alone takes a gradient computes that in forward, so that the
    logits are read once: in bfloat16 6 bytes a class for both directions, in place of 10. The
    gradient then stays in memory from forward on. `loss.backward()` hands it on; a factor from
    upstream other than 1 costs one more pass over it (4 bytes a class), as does a compiled function
    on a GPU; compiled for the CPU it is computed in backward. float16 takes two passes, for
    a loss scale has to come before the rounding, and so do a teacher of `teacher_indices` and rows
    that a cluster of eight blocks cannot hold (some 450 thousand classes of 16 bits).

    A class whose logit is -inf in both rows contributes 0. Where one distribution has a class that
    the other lacks, a KL is +inf: forward KL for classes the student lacks, reverse KL for those
    the teacher lacks; the other divergences are finite. A row that holds NaN or +inf, or nothing
    but -inf, gives NaN. Identical rows give exactly 0. A row of "none" whose loss receives a
    gradient of 0 (masked out with `torch.where`) passes on 0, even if it is NaN.

    Args:
        student_logits: [..., C], float32, bfloat16 or float16.
        teacher_logits: [..., C']; dtype and last dimension may differ from the student's (see
            `classes`). Or log-probabilities, see `teacher_is_log_probabilities`, or some of them,
            see `teacher_indices`.
        temperature: T > 0. Far beyond the spread of the logits the loss drowns in the rounding of
            fp32, as it does in torch: for 1000 logits of unit variance its relative error is 1e-5
            at T = 100, 3e-3 at 1000, and nothing is left at 10000.
        reduction: "batchmean" divides the sum by the number of rows, which are all leading
            dimensions (`F.kl_div` counts the first one only), "sum", "none" (a loss per row), or
            "mean", which divides by the number of elements as `F.kl_div` does: C times smaller
            than the mean divergence, and hardly ever what is wanted. The cross entropy's mean is
            that of `F.cross_entropy`, whose divisor is the sum of the labels' class weights.
        divergence: see above.
        beta: between 0 and 1, of the divergences that mix; the others ignore it.
        labels: int64 [...], classes, of a cross entropy beside the divergence (at T = 1).
        alpha: the divergence's share of the loss, from 0 to 1, where there are labels. A term whose
            share is 0 adds nothing, even where it is infinite or NaN.
        label_smoothing: of the cross entropy, from 0 to 1, as in `F.cross_entropy`.
        class_weight: [C], of the cross entropy, as `weight` of `F.cross_entropy`.
        ignore_index: the label of rows that count in neither term: they are never read.
        teacher_indices: int64 or int32 [..., k]: the classes of which `teacher_logits`, [..., k],
            holds log-probabilities (at the temperature T). What they lack to 1, at least 2^-23, is
            the probability of all other classes together, and the divergence is one of k + 1
            classes. Of a row no index twice; -1 leaves a place unused. The teacher gets no
            gradient.
        teacher_is_log_probabilities: `teacher_logits` holds log-probabilities, at the temperature T
            already; they may lack a constant.
        classes: C, where the last dimensions are padded: columns from C on are never read, and
            their gradient is 0. Needed only where the last dimensions differ.
        softcap: a logit x counts as softcap * tanh(x / softcap). One for both models or a pair
            (student's, teacher's); None: none.
        logit_scale: a positive factor of the logits, before the cap; one or a pair, too. Neither
            concerns a teacher's log-probabilities.
        row_weight: [...], a factor of each row, which gets no gradient. A row of weight 0 (padding,
            a masked token: `labels != -100`) is never read: its loss and gradient are 0 even if it
            holds NaN. The means divide by the sum of the weights in place of the number of rows.
        denominator: what the sum is divided by in place of the number of rows, for "batchmean"
            only: the number of tokens in all the batches of a step, say. Positive; of a tensor that
            is not checked, for the check would have to wait for its device.
        scale_by_t_squared: False leaves the factor T^2 out.
        return_terms: also return the two terms, for a log.

    Returns:
        float32, a scalar, or for "none" the leading dimensions of the logits: a loss in 16 bits
        would be good to three digits only. Gradients flow to both arguments, each in its dtype.
        Second derivatives (`create_graph=True`) come from plain PyTorch in float64, which stores
        every probability. Without rows "sum" is 0, the means are NaN as in torch. With return_terms
        a `LossTerms` of three such tensors.

    Raises:
        ValueError: shapes that differ, float64 or integer logits, a temperature that is not
            positive and finite, an unknown reduction or divergence, beta outside (0, 1), a
            denominator that is not positive or stands beside another reduction than "batchmean",
            options that do not go together.
        IndexError: a label outside [0, C), a teacher index outside [-1, C) (on the CPU).
    """
    if in_forward_mode():
        refuse_tangents("softmax_kl", student_logits, teacher_logits)
    if teacher_indices is not None and teacher_is_log_probabilities:
        raise ValueError(
            "softmax_kl: beside teacher_indices the teacher's values are log-probabilities anyway; "
            "leave teacher_is_log_probabilities away"
        )
    classes = _classes(student_logits, teacher_logits, teacher_indices, classes)
    is_log = teacher_is_log_probabilities or teacher_indices is not None
    student_scale, teacher_scale = pair(logit_scale, 1.0)
    student_cap, teacher_cap = pair(softcap, 0.0)
    loss = Loss(
        "softmax_kl",
        student_logits.shape[:-1],
        classes,
        temperature=temperature,
        reduction=reduction,
        labels=labels,
        alpha=alpha,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        row_weight=row_weight,
        denominator=denominator,
        scale_by_t_squared=scale_by_t_squared,
        return_terms=return_terms,
    )
    arguments = (
        student_logits,
        teacher_logits if teacher_indices is None else teacher_logits.detach(),
        teacher_indices,
        loss.labels,
        loss.class_weight,
        loss.mask,
        temperature,
        divergence,
        beta,
        label_smoothing,
        classes,
        *(student_scale, student_cap),
        *((1.0, 0.0) if is_log else (teacher_scale, teacher_cap)),
        teacher_is_log_probabilities,
    )
    if loss.rows == 0 or not one_pass.pays(
        student_logits, teacher_logits, teacher_indices, reduction, denominator
    ):
        soft, hard, _ = _op(*arguments)
        return loss.of(soft, hard)
    soft_coefficient, hard_coefficient = loss.coefficients(student_logits.device)
    if hard_coefficient is None:
        hard_coefficient = soft_coefficient.new_empty(0)
    total, soft, hard, *_ = one_pass.op(*arguments, soft_coefficient, hard_coefficient)
    if not return_terms:
        return total
    terms = loss.of(soft, hard)
    return LossTerms(total, total.detach() if terms.hard is None else terms.soft, terms.hard)


def _classes(student: Tensor, teacher: Tensor, indices: Tensor | None, classes: int | None) -> int:
    if student.dim() == 0:
        raise ValueError(
            "softmax_kl: student_logits must have at least one dimension, [..., C]; it is a scalar"
        )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "softmax_kl: student_logits and teacher_logits must have the same shape, but for a "
            f"padding of classes; they have {list(student.shape)} and {list(teacher.shape)}"
        )
    if indices is not None and indices.shape != teacher.shape:
        raise ValueError(
            "softmax_kl: teacher_indices must have the shape of the teacher's log-probabilities, "
            f"{list(teacher.shape)}; theirs is {list(indices.shape)}"
        )
    most = student.shape[-1] if indices is not None else min(student.shape[-1], teacher.shape[-1])
    if classes is None:
        if indices is None and student.shape != teacher.shape:
            raise ValueError(
                "softmax_kl: student_logits and teacher_logits must have the same shape, or "
                "`classes` must tell how many of their columns are classes; they have "
                f"{list(student.shape)} and {list(teacher.shape)}"
            )
        return most
    if not 0 <= classes <= most:
        raise ValueError(
            f"softmax_kl: classes must lie in [0, {most}], what the logits hold; it is {classes}"
        )
    return classes


def _number_of_rows(logits: Tensor) -> int:
    rows = 1
    for size in logits.shape[:-1]:
        rows = rows * size
    return rows


@torch.library.register_fake("trine::softmax_kl")
def _fake(student_logits, teacher, teacher_indices, labels, class_weight, row_mask, *options):
    check_one_device(
        "softmax_kl", student_logits, teacher, teacher_indices, labels, class_weight, row_mask
    )
    if student_logits.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "softmax_kl: student_logits and teacher_logits must have the same leading dimensions; "
            f"they have {list(student_logits.shape)} and {list(teacher.shape)}"
        )
    rows = _number_of_rows(student_logits)

    def new(*shape):
        return student_logits.new_empty(*shape, dtype=torch.float32)

    return new(rows), new(0 if labels is None else rows), new(rows, _SAVED_COLUMNS)


@torch.library.register_fake("trine::softmax_kl_backward")
def _fake_backward(grad_soft, grad_hard, student, teacher, *others):
    *_, for_teacher = others
    tensors = (a for a in others if isinstance(a, Tensor))
    check_one_device("softmax_kl_backward", grad_soft, grad_hard, student, teacher, *tensors)
    logits = teacher if for_teacher else student
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output) -> None:
    ctx.options = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS], output[2])


def _gradients(ctx, grad_soft: Tensor, grad_hard: Tensor, _grad_saved: Tensor | None):
    *tensors, saved = ctx.saved_tensors

    def gradient(for_teacher: bool) -> Tensor:
        return _backward_op(grad_soft, grad_hard, *tensors, *ctx.options, saved, for_teacher)

    wants_student, wants_teacher = ctx.needs_input_grad[:2]
    return (
        gradient(for_teacher=False) if wants_student else None,
        gradient(for_teacher=True) if wants_teacher else None,
        *(None for _ in (*tensors[2:], *ctx.options)),
    )


def _save_backward(ctx, inputs, output) -> None:
    *ctx.options, _saved, ctx.for_teacher = inputs[2 + _TENSORS :]
    ctx.save_for_backward(*inputs[: 2 + _TENSORS])


def _second_derivative(ctx, grad_gradient: Tensor):
    """Of the definition in float64, which autograd differentiates as often as it is asked to."""
    *inputs, indices, labels, class_weight, row_mask = ctx.saved_tensors
    wanted = ctx.needs_input_grad[: len(inputs)]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [t.view_as(t) if again else t.detach().requires_grad_() for t in inputs]
        *upstream, student, teacher = inputs
        terms = reference.rows(
            student, teacher, indices, labels, class_weight, row_mask, *ctx.options
        )
        total = sum((g.double() * term).sum() for g, term in zip(upstream, terms, strict=True))
        logits = teacher if ctx.for_teacher else student
        (gradient,) = torch.autograd.grad(total, logits, create_graph=True)
        of_wanted = torch.autograd.grad(
            gradient,
            [t for t, is_wanted in zip(inputs, wanted, strict=True) if is_wanted],
            grad_gradient,
            create_graph=again,
            allow_unused=True,
        )
    gradients = iter(of_wanted)
    others = (indices, labels, class_weight, row_mask, *ctx.options, "saved", ctx.for_teacher)
    return (
        *(next(gradients) if is_wanted else None for is_wanted in wanted),
        *(None for _ in others),
    )


torch.library.register_autograd("trine::softmax_kl", _gradients, setup_context=_save)
torch.library.register_autograd(
    "trine::softmax_kl_backward", _second_derivative, setup_context=_save_backward
)

# The operator that it is built on must be there first, with its fake.
from trine.ops.softmax_kl import one_pass  # noqa: E402
