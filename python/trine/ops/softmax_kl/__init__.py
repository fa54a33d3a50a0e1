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

__all__ = ["softmax_kl"]

_op = torch.ops.trine.softmax_kl.default
_backward_op = torch.ops.trine.softmax_kl_backward.default
explain_missing_kernel("softmax_kl")
explain_missing_kernel("softmax_kl_backward")
_SAVED_COLUMNS = 5  # SoftmaxKlRow: what backward needs to know of a row


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 * KL(p_teacher || p_student) with p = softmax(logits / T), in one pass over the logits.

    It replaces `F.kl_div(log_softmax(s / T), softmax(t / T)) * T * T`, with no probability ever
    stored. The factor T^2 keeps the gradient's size independent of T (Hinton et al. 2015,
    arXiv:1503.02531); it is contained in the result, so do not multiply again. Computed in fp32
    whatever the inputs' dtype, also under autocast.

    A class whose logit is -inf for the teacher contributes 0, whatever the student's; one that is
    -inf for the student alone makes the loss +inf. A row that holds NaN or +inf, or nothing but
    -inf, gives NaN. Identical rows give exactly 0. A row of "none" whose loss receives a gradient
    of 0 (masked out with `torch.where`) passes on 0, even if it is NaN.

    Args:
        student_logits: [..., C], float32, bfloat16 or float16.
        teacher_logits: the same shape; its dtype may differ.
        temperature: T > 0. Far beyond the spread of the logits the loss drowns in the rounding of
            fp32, as it does in torch: for 1000 logits of unit variance its relative error is 1e-5
            at T = 100, 3e-3 at 1000, and nothing is left at 10000.
        reduction: "batchmean" divides the sum by the number of rows, which are all leading
            dimensions (`F.kl_div` counts the first one only), "sum", "none" (a loss per row), or
            "mean", which divides by the number of elements as `F.kl_div` does: C times smaller
            than the mean divergence, and hardly ever what is wanted.

    Returns:
        float32, a scalar, or for "none" the leading dimensions of the logits: a loss in 16 bits
        would be good to three digits only. Gradients flow to both arguments, each in its dtype,
        once: a second derivative is an error. Without rows "sum" is 0, the means are NaN as in
        torch.

    Raises:
        ValueError: shapes that differ, float64 or integer logits, a temperature that is not
            positive and finite, an unknown reduction.
    """
    if in_forward_mode():
        refuse_tangents("softmax_kl", student_logits, teacher_logits)
    loss, _ = _op(student_logits, teacher_logits, temperature, reduction)
    return loss


@torch.library.register_fake("trine::softmax_kl")
def _fake(student_logits, teacher_logits, temperature=1.0, reduction="batchmean"):
    check_one_device("softmax_kl", student_logits, teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "softmax_kl: student_logits and teacher_logits must have the same shape; they have "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    leading = student_logits.shape[:-1]
    loss = student_logits.new_empty(leading if reduction == "none" else (), dtype=torch.float32)
    rows = 1
    for size in leading:
        rows = rows * size
    return loss, student_logits.new_empty(rows, _SAVED_COLUMNS, dtype=torch.float32)


@torch.library.register_fake("trine::softmax_kl_backward")
def _fake_backward(grad_loss, student, teacher, saved, temperature, reduction, for_teacher):
    check_one_device("softmax_kl_backward", grad_loss, student, teacher, saved)
    logits = teacher if for_teacher else student
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output) -> None:
    student_logits, teacher_logits, ctx.temperature, ctx.reduction = inputs
    ctx.save_for_backward(student_logits, teacher_logits, output[1])


def _gradients(ctx, grad_loss: Tensor, _grad_saved: Tensor | None):
    def gradient(for_teacher: bool) -> Tensor:
        return _backward_op(
            grad_loss, *ctx.saved_tensors, ctx.temperature, ctx.reduction, for_teacher
        )

    wants_student, wants_teacher = ctx.needs_input_grad[:2]
    return (
        gradient(for_teacher=False) if wants_student else None,
        gradient(for_teacher=True) if wants_teacher else None,
        None,
        None,
    )


def _no_second_derivative(ctx, grad_gradient):
    raise NotImplementedError(
        "softmax_kl has no second derivative; for one, write the loss with F.log_softmax"
    )


torch.library.register_autograd("trine::softmax_kl", _gradients, setup_context=_save)
torch.library.register_autograd("trine::softmax_kl_backward", _no_second_derivative)
