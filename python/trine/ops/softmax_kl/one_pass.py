"""The loss together with its gradient, computed while the logits are on the chip or in its caches.

The rows' coefficients in a scalar loss are known before backward, so that forward can write the
gradient of the student's logits, and `loss.backward()` hands it on. Another factor from upstream
scales it; one of 1 (found out on the device, without waiting) costs nothing.
"""

import torch
from torch import Tensor

from trine import _library
from trine.ops._checks import check_one_device
from trine.ops.softmax_kl.loss import sum_of

# Of trine::softmax_kl, to which come the coefficients of the rows' losses.
_ARGUMENTS, _LABELS = 16, 3
_SCHEMA = (
    "(Tensor student_logits, Tensor teacher, Tensor? teacher_indices, Tensor? labels, "
    "Tensor? class_weight, Tensor? row_mask, float temperature, str divergence, float beta, "
    "float label_smoothing, int classes, float student_scale, float student_cap, "
    "float teacher_scale, float teacher_cap, bool teacher_is_log, Tensor soft_coefficient, "
    "Tensor hard_coefficient) -> "
    "(Tensor sum, Tensor soft, Tensor hard, Tensor gradient, Tensor saved)"
)
_OF_SUM = "trine::softmax_kl_sum"
_raw_op = torch.ops.trine.softmax_kl_with_gradient.default
_forward_op = torch.ops.trine.softmax_kl.default
_backward_op = torch.ops.trine.softmax_kl_backward.default
_scale_op = torch.ops.trine.softmax_kl_scale_.default


def pays(
    student: Tensor,
    teacher: Tensor,
    teacher_indices: Tensor | None,
    reduction: str,
    denominator: float | Tensor | None,
) -> bool:
    """Whether forward is to write the gradient: where a kernel does so in one pass.

    That of float16 is left to backward, for a loss scale has to reach it before it is rounded.
    """
    return (
        torch.is_grad_enabled()
        and student.requires_grad
        and not teacher.requires_grad
        and teacher_indices is None
        and reduction != "none"
        and not (isinstance(denominator, Tensor) and denominator.requires_grad)
        and student.dtype in (torch.bfloat16, torch.float32)
        and _has_kernel(student.device)
    )


def _has_kernel(device: torch.device) -> bool:
    if device.type == "cpu":
        # What torch.compile makes of it is a factor's pass over memory of its own, always.
        return not torch.compiler.is_compiling()
    if device.type != "cuda" or not (_library.cuda_library.loaded and torch.cuda.is_available()):
        return False
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor) == (9, 0)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    return torch.where(factor == 0, 0, gradient * factor)


def _scale_on_cpu(gradient: Tensor, factor: Tensor) -> None:
    value = factor.item()
    if value == 0:  # also of NaN
        gradient.zero_()
    elif value != 1:
        gradient.mul_(value)


def _compute(*arguments) -> tuple[Tensor, ...]:
    soft, hard, gradient, saved = _raw_op(*arguments)
    soft_c, hard_c = arguments[_ARGUMENTS:]
    # A term without a share adds nothing, even if it is infinite.
    total = sum_of(torch.where(soft_c == 0, 0, soft_c * soft))
    if arguments[_LABELS] is not None:
        total = total + sum_of(torch.where(hard_c == 0, 0, hard_c * hard))
    return total, soft, hard, gradient, saved


def _fake_raw(student: Tensor, *others) -> tuple[Tensor, ...]:
    check_one_device("softmax_kl", student, *(a for a in others if isinstance(a, Tensor)))
    *inputs, _, _ = others
    soft, hard, saved = _forward_op(student, *inputs)
    return soft, hard, student.new_empty(student.shape), saved


def _fake(*arguments) -> tuple[Tensor, ...]:
    soft, *others = _fake_raw(*arguments)
    return soft.new_empty(()), soft, *others


def _save(ctx, inputs, output) -> None:
    _, soft, hard, gradient, saved = output
    ctx.mark_non_differentiable(soft, hard, gradient, saved)
    ctx.set_materialize_grads(False)
    ctx.tensors = [isinstance(a, Tensor) for a in inputs]
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)), saved.detach())
    ctx.others = [a for a in inputs if not isinstance(a, Tensor)]
    ctx.gradient = gradient.detach()


def _gradients(ctx, of_sum: Tensor | None, *_):
    nothing = (None,) * (_ARGUMENTS + 1)
    if of_sum is None:
        return None, *nothing
    if torch.is_grad_enabled():
        return _again(ctx, of_sum), *nothing
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:  # handed on already, its memory belongs to somebody else
        gradient = _again(ctx, None)
    if type(gradient) is not Tensor:  # traced: what is in place there is a copy and more
        return _scaled(gradient, of_sum), *nothing
    _scale_op(gradient, of_sum)
    return gradient, *nothing


def _again(ctx, of_sum: Tensor | None) -> Tensor:
    """By the operator of backward, which is differentiable. The same bits as at the first time."""
    *tensors, saved = ctx.saved_tensors
    of_kind = {True: iter(tensors), False: iter(ctx.others)}
    *inputs, soft_c, hard_c = (next(of_kind[kind]) for kind in ctx.tensors)
    if of_sum is not None:
        soft_c, hard_c = of_sum * soft_c, of_sum * hard_c
    return _backward_op(soft_c, hard_c, *inputs, saved, False)


torch.library.register_fake("trine::softmax_kl_with_gradient", _fake_raw)
torch.library.impl("trine::softmax_kl_scale_", "CPU", _scale_on_cpu)
torch.library.register_fake("trine::softmax_kl_scale_", lambda gradient, factor: None)
torch.library.define(_OF_SUM, _SCHEMA)
torch.library.impl(_OF_SUM, "CompositeExplicitAutograd", _compute)
torch.library.register_fake(_OF_SUM, _fake)
torch.library.register_autograd(_OF_SUM, _gradients, setup_context=_save)
op = torch.ops.trine.softmax_kl_sum.default
