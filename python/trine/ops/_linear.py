"""What the public calls of the linear ops share: autocast, and the differentiable path.

The operators carry no autograd formula, because a Python one would cost every inference call more
than a small layer takes. The differentiable path is taken only when a gradient is wanted.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from trine.ops import activation as activations
from trine.ops._checks import FLOAT_DTYPES, in_forward_mode, refuse_tangents


def in_autocast_dtype(x: Tensor) -> Tensor:
    """`x` as `torch.nn.functional.linear` would see it: in the autocast dtype, where one holds."""
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype in FLOAT_DTYPES:
        return x.to(torch.get_autocast_dtype(device))
    return x


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Keeps an enclosing autocast region from turning a float32 product into a bfloat16 one."""
    # The meta device has no autocast, and PyTorch refuses to switch it off.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def needs_grad(*tensors: Tensor | None) -> bool:
    if in_forward_mode():
        refuse_tangents("a linear op", *tensors)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def scaled_by_groups(codes: Tensor, weight_scale: Tensor) -> Tensor:
    """`codes` [N, K] times their scales: one value, [N], or [N, groups] of consecutive columns."""
    if weight_scale.dim() < 2:
        return codes * weight_scale.reshape(-1, 1)
    by_group = codes.unflatten(1, (weight_scale.shape[1], -1))
    return (by_group * weight_scale[:, :, None]).flatten(1)


def linear_with_gradient(
    run: Callable[..., Tensor],
    dense_weight: Callable[..., Tensor],
    x: Tensor,
    bias: Tensor | None,
    *weight: Tensor | None,
    activation: int = 0,
) -> Tensor:
    """y = run(x, bias, *weight), with the gradients to x and bias of y = x @ dense.T + bias.

    `dense_weight(k, *weight)` gives the float32 [N, K] matrix that the packed tensors in `weight`
    stand for; it is called in the backward pass only, so that training keeps no dense copy. The
    packed tensors themselves get no gradient, and changing one in place between the two passes is
    an error, as for every PyTorch operator. The rounding of the activations counts as the identity
    (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432); gradients are computed in
    float32 and rounded once, to the dtype of x and of bias.

    With an `activation` (see `trine.ops.activation`) it is run(..., activation=activation), and the
    backward pass computes once more what the activation was applied to.

    Raises ValueError where a tensor in `weight` requires a gradient.
    """
    if needs_grad(*weight):
        raise ValueError(
            "a linear op gives no gradient to a packed weight or its scales; train a dense weight "
            "and pack it afterwards, or detach them"
        )
    return _LinearWithGradient.apply(run, dense_weight, activation, x, bias, *weight)


class _LinearWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, dense_weight, activation, x, bias, *weight):
        # First, because it checks everything.
        y = run(x, bias, *weight, activation=activation) if activation else run(x, bias, *weight)
        ctx.run = run
        ctx.activation = activation
        ctx.dense_weight = dense_weight
        ctx.k = x.shape[-1]
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*((x, bias) if activation else ()), *weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        _, _, _, x_needs_grad, bias_needs_grad, *_ = ctx.needs_input_grad
        grad_x = grad_bias = None
        grad_y, weight = grad_y.float(), ctx.saved_tensors
        if ctx.activation:
            before = ctx.run(*weight).float()
            grad_y = activations.gradient(ctx.activation, grad_y, before)
            weight = weight[2:]
        with without_autocast(grad_y):
            if x_needs_grad:
                dense = ctx.dense_weight(ctx.k, *weight)
                grad_x = (grad_y @ dense).to(ctx.x_dtype)
            if bias_needs_grad:
                grad_bias = grad_y.sum_to_size(grad_y.shape[-1:]).to(ctx.bias_dtype)
        return None, None, None, grad_x, grad_bias, *(None for _ in weight)
