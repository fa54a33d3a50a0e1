"""What the public calls of the linear ops share: autocast, and the differentiable path.

The operators carry no autograd formula, because a Python one would cost every inference call more
than a small layer takes. The differentiable path is taken only when a gradient is wanted.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def in_autocast_dtype(x: Tensor) -> Tensor:
    """`x` as `torch.nn.functional.linear` would see it: in the autocast dtype, where one holds."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(device))
    return x


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class LinearThroughQuantization(torch.autograd.Function):
    """y = run(x, bias), with the gradient of y = x @ weight.T + bias.

    `weight` is a function, called in the backward pass only, that gives the dense weight which the
    packed one stands for. The rounding of the activations counts as the identity (the
    straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        bias: Tensor | None,
        run: Callable[[Tensor, Tensor | None], Tensor],
        weight: Callable[[], Tensor],
    ) -> Tensor:
        ctx.weight = weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.x_dtype = x.dtype
        return run(x, bias)

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y.float() @ ctx.weight()).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_y.float().reshape(-1, grad_y.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None
