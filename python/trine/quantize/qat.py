"""Quantisation-aware training: a linear layer that already computes what its packed form will."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trine import nn as packed_nn  # a package that imports this one: used in calls only
from trine.ops._checks import check_rows
from trine.ops._linear import in_autocast_dtype, needs_grad, without_autocast
from trine.quantize.weights import WEIGHT_RULES, int8_rows, two_of_four


class QatLinear(nn.Linear):
    """nn.Linear with a dense master weight that is used as if it were packed.

    In training mode the forward pass is the arithmetic of the kernel, in floats; in evaluation mode
    it is the kernel itself on the current weight, so that it gives the bits of the converted layer.
    In both, gradients flow to the input, to all of the master weight (also to what 2:4 sets to 0)
    and to the bias, through the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432):
    rounding and pruning count as the identity.

    Args:
        in_features, out_features, bias, device, dtype: as for torch.nn.Linear.
        choice: "int8", "ternary", "sparse24", "sparse24-int8" or "ternary24".
        pruned_decay: of the 2:4 choices; every backward pass adds pruned_decay * w to the gradient
            of each weight w that is set to 0, so that these shrink and the pattern comes to rest
            (SR-STE, Zhou et al. 2021, arXiv:2102.04010).

    Raises ValueError for another choice, and for a decay that is negative or of another choice.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        choice: str = "int8",
        pruned_decay: float = 0.0,
    ) -> None:
        if choice not in WEIGHT_RULES:
            raise ValueError(
                f"QatLinear: choice is {choice!r}; it must be one of {', '.join(WEIGHT_RULES)}"
            )
        if pruned_decay < 0 or (pruned_decay and "24" not in choice):
            raise ValueError(
                f"QatLinear: pruned_decay is {pruned_decay} with choice {choice!r}; it is at least "
                "0, and a choice that prunes nothing has no use for it"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.choice, self.pruned_decay = choice, pruned_decay
        self._packed: tuple[Tensor, packed_nn.PackedLinear] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = in_autocast_dtype(x)
        check_rows("QatLinear", x)
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"QatLinear: the input has shape {list(x.shape)}, "
                f"expected [..., {self.in_features}]"
            )
        packed = None if self.training else self._packed_weight()
        if packed is not None and not needs_grad(x, self.weight, self.bias):
            return packed.with_bias(x, self.bias)
        weight = self.weight
        if self.pruned_decay:
            weight = _DecayOfPruned.apply(weight, self.pruned_decay)
        return _ThroughQuantization.apply(x, weight, self.bias, self.choice, packed)

    def pack(self) -> packed_nn.PackedLinear:
        """The packed layer that this one stands for; raises ValueError for NaN weights."""
        return packed_nn.pack_linear(self, self.choice).train(self.training)

    @torch.compiler.disable  # compiled code could not see that the weight has changed
    def _packed_weight(self) -> packed_nn.PackedLinear:
        """The packed layer of the current weight, made anew where the weight has changed.

        The weight itself is compared, not its version counter: averaging and loading often write
        through `weight.data`, which no counter shows. Reading it costs less than using it.
        """
        weight = self.weight.detach()
        if self._packed is not None:
            packed_from, packed = self._packed
            same_kind = packed_from.dtype == weight.dtype and packed_from.device == weight.device
            if same_kind and torch.equal(packed_from, weight):
                return packed
        self._packed = (weight.clone(), self.pack())
        return self._packed[1]

    def train(self, mode: bool = True) -> QatLinear:
        if mode:
            self._packed = None  # its memory is for the training now
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # copies pack for themselves

    def extra_repr(self) -> str:
        decay = f", pruned_decay={self.pruned_decay}" if self.pruned_decay else ""
        return f"{super().extra_repr()}, choice={self.choice}{decay}"


class _DecayOfPruned(torch.autograd.Function):
    """The identity of a weight, whose gradient gains decay * w where 2:4 sets w to 0."""

    @staticmethod
    def forward(ctx, weight: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.decay = decay
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        return grad + ctx.decay * weight.masked_fill(two_of_four(weight), 0), None


class _ThroughQuantization(torch.autograd.Function):
    """The quantised linear layer with the gradient of the plain one at the quantised values."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        choice: str,
        packed: packed_nn.PackedLinear | None,
    ) -> Tensor:
        values, weight_scale = WEIGHT_RULES[choice](weight)
        # Not reshape(-1, K): K may be 0.
        rows, row_scale = x.reshape(x.shape[:-1].numel(), x.shape[-1]), None
        if weight_scale is not None:
            rows, row_scale = int8_rows(rows)
        ctx.save_for_backward(rows, row_scale, values, weight_scale)
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if packed is not None:
            return packed.with_bias(x, bias)

        # The order of the kernels, each step rounded to fp32 once; int8 products are exact.
        with without_autocast(x):
            y = rows.float() @ values.float().T
        if weight_scale is not None:
            y = y * row_scale[:, None] * weight_scale
        if bias is not None:
            y = y + bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable  # the saved values have no history
    def backward(ctx, grad_y: Tensor):
        rows, row_scale, values, weight_scale = ctx.saved_tensors
        grad = grad_y.reshape(rows.shape[0], grad_y.shape[-1]).float()
        grad_x = grad_weight = grad_bias = None
        with without_autocast(grad):
            if ctx.needs_input_grad[0]:
                scaled = grad if weight_scale is None else grad * weight_scale
                grad_x = (scaled @ values.float()).to(ctx.x_dtype).reshape(ctx.x_shape)
            if ctx.needs_input_grad[1]:
                scaled = grad if row_scale is None else grad * row_scale[:, None]
                grad_weight = (scaled.T @ rows.float()).to(ctx.weight_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None
