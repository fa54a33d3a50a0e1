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

__all__ = ["softmax_kl"]

_op = torch.ops.trine.softmax_kl.default
_backward_op = torch.ops.trine.softmax_kl_backward.default
explain_missing_kernel("softmax_kl")
explain_missing_kernel("softmax_kl_backward")
_SAVED_COLUMNS = 6  # SoftmaxKlRow: what backward needs to know of a row


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    row_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    scale_by_t_squared: bool = True,
) -> Tensor:
    """T^2 * D(p_teacher, p_student) with p = softmax(logits / T), no probability ever stored.

    It replaces `F.kl_div(log_softmax(s / T), softmax(t / T)) * T * T` and its relatives. The factor
    T^2 keeps the gradient's size independent of T (Hinton et al. 2015, arXiv:1503.02531); it is
    contained in the result, so do not multiply again. Computed in fp32 whatever the inputs' dtype,
    also under autocast.

    With p of the student, q of the teacher and m their mixture, `divergence` is one of

    - "forward_kl": KL(q || p), which covers the teacher's modes
    - "reverse_kl": KL(p || q), which seeks one (MiniLLM, arXiv:2306.08543)
    - "jsd": beta * KL(q || m) + (1 - beta) * KL(p || m), m = beta * q + (1 - beta) * p
      (GKD, arXiv:2306.13649, whose implementations take forward and reverse KL for beta = 0 and 1)
    - "skewed_forward_kl": KL(q || m), m = beta * q + (1 - beta) * p (DistiLLM, arXiv:2402.03898,
      with beta = 0.1)
    - "skewed_reverse_kl": KL(p || m), m = beta * p + (1 - beta) * q
    - "total_variation": the sum of |p - q|, halved

    A class whose logit is -inf in both rows contributes 0. Where one distribution has a class that
    the other lacks, a KL is +inf: forward KL for classes the student lacks, reverse KL for those
    the teacher lacks; the other divergences are finite. A row that holds NaN or +inf, or nothing
    but -inf, gives NaN. Identical rows give exactly 0. A row of "none" whose loss receives a
    gradient of 0 (masked out with `torch.where`) passes on 0, even if it is NaN.

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
        divergence: see above.
        beta: between 0 and 1, of the divergences that mix; the others ignore it.
        row_weight: [...], a factor of each row, which gets no gradient. A row of weight 0 (padding,
            a masked token: `labels != -100`) is never read: its loss and gradient are 0 even if it
            holds NaN. The means divide by the sum of the weights in place of the number of rows.
        denominator: what the sum is divided by in place of the number of rows, for "batchmean"
            only: the number of tokens in all the batches of a step, say. Positive; of a tensor that
            is not checked, for the check would have to wait for its device.
        scale_by_t_squared: False leaves the factor T^2 out.

    Returns:
        float32, a scalar, or for "none" the leading dimensions of the logits: a loss in 16 bits
        would be good to three digits only. Gradients flow to both arguments, each in its dtype.
        Second derivatives (`create_graph=True`) come from plain PyTorch in float64, which stores
        every probability. Without rows "sum" is 0, the means are NaN as in torch.

    Raises:
        ValueError: shapes that differ, float64 or integer logits, a temperature that is not
            positive and finite, an unknown reduction or divergence, beta outside (0, 1), a
            denominator that is not positive or stands beside another reduction than "batchmean".
    """
    if in_forward_mode():
        refuse_tangents("softmax_kl", student_logits, teacher_logits)
    if row_weight is not None:
        if row_weight.shape != student_logits.shape[:-1]:
            raise ValueError(
                "softmax_kl: row_weight must have the leading dimensions of the logits, "
                f"{list(student_logits.shape[:-1])}; its shape is {list(row_weight.shape)}"
            )
        row_weight = row_weight.detach().float().contiguous()
    if denominator is not None:
        if reduction != "batchmean":
            raise ValueError(
                "softmax_kl: a denominator takes the place of 'batchmean', the reduction is "
                f"'{reduction}'"
            )
        if not isinstance(denominator, Tensor) and not denominator > 0:
            raise ValueError(f"softmax_kl: the denominator must be positive, it is {denominator}")
        reduction = "sum"
    loss, _ = _op(
        student_logits, teacher_logits, row_weight, temperature, reduction, divergence, beta
    )
    if denominator is not None:
        loss = loss / denominator
    return loss if scale_by_t_squared else loss / temperature**2


@torch.library.register_fake("trine::softmax_kl")
def _fake(student_logits, teacher_logits, row_weight, temperature, reduction, divergence, beta):
    check_one_device("softmax_kl", student_logits, teacher_logits, row_weight)
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
def _fake_backward(grad_loss, student, teacher, row_weight, saved, *options):
    for_teacher = options[-1]
    check_one_device("softmax_kl_backward", grad_loss, student, teacher, saved, row_weight)
    logits = teacher if for_teacher else student
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output) -> None:
    student_logits, teacher_logits, row_weight, *ctx.options = inputs
    ctx.save_for_backward(student_logits, teacher_logits, row_weight, output[1])


def _gradients(ctx, grad_loss: Tensor, _grad_saved: Tensor | None):
    def gradient(for_teacher: bool) -> Tensor:
        return _backward_op(grad_loss, *ctx.saved_tensors, *ctx.options, for_teacher)

    wants_student, wants_teacher = ctx.needs_input_grad[:2]
    return (
        gradient(for_teacher=False) if wants_student else None,
        gradient(for_teacher=True) if wants_teacher else None,
        *(None for _ in ("row_weight", *ctx.options)),
    )


def _save_backward(ctx, inputs, output) -> None:
    grad_loss, student, teacher, row_weight, _saved, *ctx.options, ctx.for_teacher = inputs
    ctx.save_for_backward(grad_loss, student, teacher, row_weight)


def _second_derivative(ctx, grad_gradient: Tensor):
    """Of the definition in float64, which autograd differentiates as often as it is asked to."""
    *inputs, row_weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [t.view_as(t) if again else t.detach().requires_grad_() for t in inputs]
        grad_loss, student, teacher = inputs
        loss = reference.softmax_kl(student, teacher, *ctx.options, row_weight)
        logits = teacher if ctx.for_teacher else student
        (gradient,) = torch.autograd.grad(loss, logits, grad_loss.to(loss.dtype), create_graph=True)
        of_wanted = torch.autograd.grad(
            gradient,
            [t for t, is_wanted in zip(inputs, wanted, strict=True) if is_wanted],
            grad_gradient,
            create_graph=again,
            allow_unused=True,
        )
    gradients = iter(of_wanted)
    return (
        *(next(gradients) if is_wanted else None for is_wanted in wanted),
        *(None for _ in ("row_weight", "saved", *ctx.options, ctx.for_teacher)),
    )


torch.library.register_autograd("trine::softmax_kl", _gradients, setup_context=_save)
torch.library.register_autograd(
    "trine::softmax_kl_backward", _second_derivative, setup_context=_save_backward
)
