"""The torch operator `trine::linear_softmax_kl`: PyTorch, on any device that has the raw ops."""

import torch
from torch import Tensor

from trine.ops._checks import check_one_device
from trine.ops.linear_softmax_kl import chunks, reference
from trine.ops.linear_softmax_kl.heads import Head
from trine.ops.softmax_kl import reference as of_logits
from trine.ops.softmax_kl.loss import sum_of

_NAME = "trine::linear_softmax_kl"
# Losses of rows as `trine::softmax_kl` gives them, the sum of coefficient * loss over both kinds,
# and those of the sum's gradients that are wanted.
_SCHEMA = (
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_indices, Tensor? labels, "
    "Tensor? class_weight, Tensor? row_mask, Tensor? soft_coefficient, Tensor? hard_coefficient, "
    "float temperature, str divergence, float beta, float label_smoothing, int classes, "
    "float student_scale, float student_cap, float teacher_scale, float teacher_cap, "
    "bool teacher_is_log, ScalarType student_dtype, ScalarType teacher_dtype, "
    "bool wants_hidden, bool wants_weight, bool wants_bias, int memory_limit) -> "
    "(Tensor sum, Tensor soft, Tensor hard, Tensor of_hidden, Tensor of_weight, Tensor of_bias)"
)
_TENSORS, _OPTIONS = 12, 10
_TRAINED = 3  # student_hidden, student_weight, student_bias


def _compute(*arguments) -> tuple[Tensor, ...]:
    check_one_device("linear_softmax_kl", *arguments[:_TENSORS])
    *heads, indices, labels, class_weight, mask, soft_c, hard_c = arguments[:_TENSORS]
    options = chunks.Options(*arguments[_TENSORS : _TENSORS + _OPTIONS])
    *dtypes, wants_hidden, wants_weight, wants_bias, limit = arguments[_TENSORS + _OPTIONS :]
    # The dtypes are settled; autocast would add its own.
    with torch.autocast(heads[0].device.type, enabled=False):
        results = chunks.losses_and_gradients(
            Head(*heads[:3], dtypes[0], limit),
            Head(*heads[3:], dtypes[1], limit),
            chunks.Targets(indices, labels, class_weight, mask),
            options,
            (soft_c, hard_c),
            chunks.Wanted(wants_hidden, wants_weight, wants_bias),
            limit,
        )
        total = results.soft.new_zeros(())
        for c, losses in ((soft_c, results.soft), (hard_c, results.hard)):
            if c is not None:  # a term without a share adds nothing, even if it is infinite
                total = total + sum_of(torch.where(c == 0, 0, c * losses))
    return total, *results


def _fake(*arguments) -> tuple[Tensor, ...]:
    check_one_device("linear_softmax_kl", *arguments[:_TENSORS])
    trained, labels = arguments[:_TRAINED], arguments[7]
    rows = arguments[0].shape[0]
    total, soft, hard = (
        arguments[0].new_empty(shape, dtype=torch.float32)
        for shape in ((), (rows,), (0 if labels is None else rows,))
    )
    gradients = (
        arguments[0].new_empty(0) if not wanted else t.new_empty(t.shape)
        for t, wanted in zip(trained, arguments[-1 - _TRAINED : -1], strict=True)
    )
    return total, soft, hard, *gradients


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]
    _, _, _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.gradients = [g.detach() for g in gradients] if any(inputs[-1 - _TRAINED : -1]) else None


def _gradients(ctx, of_sum: Tensor | None, of_soft: Tensor | None, of_hard: Tensor | None, *_):
    others = (None,) * (_TENSORS + len(ctx.options) - _TRAINED)
    if torch.is_grad_enabled():
        return *_differentiable_gradients(ctx, of_sum, of_soft, of_hard), *others
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is not None and of_soft is None and of_hard is None:
        # The memory is the caller's from now on; another backward call computes anew.
        gradients = [g.mul_(of_sum) for g in gradients]
    else:
        gradients = _gradients_anew(ctx, of_sum, of_soft, of_hard)
    wanted = ctx.needs_input_grad[:_TRAINED]
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *others


def _gradients_anew(ctx, *upstream: Tensor | None) -> list[Tensor]:
    *inputs, _, _ = ctx.saved_tensors
    coefficients = _coefficients(ctx, *upstream)
    *options, _, _, _, limit = ctx.options
    wanted = ctx.needs_input_grad[:_TRAINED]
    return op(*inputs, *coefficients, *options, *wanted, limit)[-_TRAINED:]


def _coefficients(ctx, of_sum, of_soft, of_hard) -> tuple[Tensor, Tensor | None]:
    """The gradients of each row's losses."""
    *inputs, soft_c, hard_c = ctx.saved_tensors
    zeros = inputs[0].new_zeros(inputs[0].shape[0], dtype=torch.float32)

    def added(of_losses: Tensor | None, c: Tensor | None) -> Tensor:
        total = zeros if of_losses is None else of_losses
        return total if of_sum is None or c is None else total + of_sum * c

    with_labels = inputs[7] is not None
    return added(of_soft, soft_c), added(of_hard, hard_c) if with_labels else None


def _differentiable_gradients(ctx, *upstream: Tensor | None) -> list[Tensor | None]:
    """From the definition in float64, which autograd differentiates as often as it is asked to."""
    *inputs, _, _ = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:_TRAINED]
    # Views, so that the gradients are those of this operator, however its inputs depend on one
    # another.
    trained = [None if t is None else t.view_as(t) for t in inputs[:_TRAINED]]
    teacher, others, mask = inputs[3:6], inputs[6:9], inputs[9]

    def logits(hidden: Tensor, *linear: Tensor | None) -> Tensor:
        if mask is not None:  # what does not count may be NaN, and 0 * NaN is NaN
            hidden = torch.where(mask[:, None], hidden, 0)
        return reference.logits(hidden, *linear)

    losses = of_logits.rows(
        logits(*trained), logits(*teacher), *others, mask, *ctx.options[:_OPTIONS]
    )
    upstream = (c for c in _coefficients(ctx, *upstream) if c is not None)
    total = sum((c * of_rows).sum() for c, of_rows in zip(upstream, losses, strict=False))
    found = torch.autograd.grad(
        total, [t for t, w in zip(trained, wanted, strict=True) if w], create_graph=True
    )
    gradients = iter(found)
    return [next(gradients) if w else None for w in wanted]


torch.library.define(_NAME, _SCHEMA)
torch.library.impl(_NAME, "CompositeExplicitAutograd", _compute)
torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _gradients, setup_context=_save)
op = torch.ops.trine.linear_softmax_kl.default
