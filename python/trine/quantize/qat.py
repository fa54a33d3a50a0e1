"""Quantisation-aware training: a linear layer that already computes what its packed form will."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from trine import nn as packed_nn  # a package that imports this one: used in calls only
from trine._bits import only
from trine.ops._checks import check_rows
from trine.ops._linear import in_autocast_dtype, needs_grad, without_autocast
from trine.quantize.batch_norm import FoldedNorm
from trine.quantize.groups import misfit, split_group
from trine.quantize.input_range import InputRange, static_rows
from trine.quantize.qat_layer import QatLayer
from trine.quantize.schemes import (
    INT8_MAX,
    SCHEMES,
    Scheme,
    first_step,
    product,
    scheme_of,
    step_gradient,
    through_product,
)
from trine.quantize.weights import int8_rows, two_of_four


class QatLinear(QatLayer, nn.Linear):
    """nn.Linear with a dense master weight that is used as if it were packed.

    In training mode the forward pass is the arithmetic of the kernel, in floats; in evaluation mode
    it is the kernel itself on the current weight, so that it gives the bits of the converted layer.
    In both, gradients flow to the input, to all of the master weight (also to what 2:4 sets to 0),
    to the bias and to what the scheme learns beside them, through the straight-through estimator
    (Bengio et al. 2013, arXiv:1308.3432): rounding and pruning count as the identity, clamping does
    not (see `trine.quantize.schemes`).

    Args:
        in_features, out_features, bias, device, dtype: as for torch.nn.Linear.
        choice: how it will be packed.
            "int8", "int8-weight", "ternary" (absmean), "ternary-twn" (threshold), "sparse24",
            "sparse24-int8", "ternary24": by a rule, activations int8 with a scale for each row
            (floats in "int8-weight" and "sparse24"). "int8-weight", "ternary" and "ternary-twn"
            may end in a group size, as in "ternary-g128".
            "ternary-ttq": a learned scale for each sign, `sign_scale` [2].
            "int8-static": activations int8 with one scale and zero point, by `input_range`, the
            range seen so far (see `QatSchedule`).
            "int8-lsq": learned steps `weight_scale` [N] and `input_scale` [1].
        pruned_decay: of the 2:4 choices; every backward pass adds pruned_decay * w to the gradient
            of each weight w that is set to 0, so that these shrink and the pattern comes to rest
            (SR-STE, Zhou et al. 2021, arXiv:2102.04010).

    Where activations have one scale it is to be set before training: `prepare_qat` does, from
    sample inputs. Until then the layer gives NaN.

    Raises ValueError for another choice, a group size that does not divide in_features, and for a
    decay that is negative or of another choice.
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
        base, _ = split_group(choice)
        if base not in SCHEMES:
            raise ValueError(
                f"QatLinear: choice is {choice!r}; it must be one of {', '.join(SCHEMES)}"
            )
        if reason := misfit(choice, in_features):
            raise ValueError(f"QatLinear: choice is {choice!r}, but {reason}")
        if pruned_decay < 0 or (pruned_decay and "24" not in base):
            raise ValueError(
                f"QatLinear: pruned_decay is {pruned_decay} with choice {choice!r}; it is at least "
                "0, and a choice that prunes nothing has no use for it"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.choice, self.pruned_decay, self.norm = choice, pruned_decay, None
        self.input_range = InputRange(device) if self.scheme.input_range else None
        unset = torch.empty(1, device=device) if self.scheme.input_step else None
        self.input_scale = None if unset is None else nn.Parameter(unset)
        self.begin()

    @property
    def scheme(self) -> Scheme:
        return scheme_of(self.choice)

    def begin(self) -> None:
        """Set what is learned to where the current weight says; what activations need, to NaN."""
        for name, start in self.scheme.learned(self.used(self.weight)[0]).items():
            self.register_parameter(name, nn.Parameter(start))
        if self.scheme.static_input:
            unknown = self.weight.new_full((1,), torch.nan, dtype=torch.float32)
            self.begin_input(unknown, unknown, unknown)

    def take_up(self, norm: FoldedNorm) -> None:
        super().take_up(norm)
        self.begin()

    @torch.no_grad()
    def begin_input(self, low: Tensor, high: Tensor, mean_magnitude: Tensor) -> None:
        super().begin_input(low, high, mean_magnitude)
        if self.input_scale is not None:
            self.input_scale.copy_(first_step(mean_magnitude).reshape(1))

    @property
    def learned(self) -> list[nn.Parameter]:
        """What is learned beside weight and bias, but for the step of the activations."""
        return [getattr(self, name) for name in self.scheme.names]

    def forward(self, x: Tensor) -> Tensor:
        x = in_autocast_dtype(x)
        check_rows("QatLinear", x)
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"QatLinear: the input has shape {list(x.shape)}, "
                f"expected [..., {self.in_features}]"
            )
        if self.norm is not None and x.dim() != 2:
            raise ValueError(
                f"QatLinear: the input has shape {list(x.shape)}, expected [batch, "
                f"{self.in_features}], since the layer has taken up a batch norm"
            )
        if self.training and self.input_range is not None:
            self.input_range.watch(x)
        packed = None if self.training else self._packed_layer()
        if packed is not None and not needs_grad(x, *self.parameters()):
            return packed.with_bias(x, self.used_bias)
        weight = self.weight
        if self.pruned_decay:
            weight = _DecayOfPruned.apply(weight, self.pruned_decay)
        weight, bias = self.used(weight)
        bias = None if self.follows_batches else bias
        scale, zero_point = self._input_grid()
        y = _ThroughQuantization.apply(
            x, weight, bias, scale, zero_point, self.choice, packed, *self.learned
        )
        if not self.follows_batches:
            return y
        return self.norm.of_batch(y, functional.linear(x, self.weight.to(x.dtype)), self.bias)

    def _input_grid(self) -> tuple[Tensor | None, Tensor | None]:
        return super()._input_grid() if self.input_scale is None else (self.input_scale, None)

    def _learned(self) -> list[Tensor]:
        return self.learned

    def float_layer(self) -> nn.Linear:
        has_bias = self.used_bias is not None
        like = {"device": "meta", "dtype": self.weight.dtype}
        return nn.Linear(self.in_features, self.out_features, has_bias, **like)

    def _pack(self, **static_input: Tensor | None) -> packed_nn.PackedLinear:
        return self.scheme.pack(self, **static_input)

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
        return grad.add(only(~two_of_four(weight), weight), alpha=ctx.decay), None


class _ThroughQuantization(torch.autograd.Function):
    """The quantised linear layer with the gradient of the plain one at the quantised values."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
        choice: str,
        packed: packed_nn.PackedLinear | None,
        *learned: Tensor,
    ) -> Tensor:
        scheme = scheme_of(choice)
        terms = scheme.terms(weight, dict(zip(scheme.names, learned, strict=True)))
        # Not reshape(-1, K): K may be 0.
        inputs, row_scale = x.reshape(x.shape[:-1].numel(), x.shape[-1]), None
        if input_scale is not None:
            rows, row_scale = static_rows(inputs, input_scale, input_zero_point)
        elif scheme.float_input:
            rows = inputs
        else:
            rows, row_scale = int8_rows(inputs)
        ctx.choice, ctx.is_static = choice, input_scale is not None
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        grid = (inputs, input_scale, input_zero_point) if ctx.is_static else (None, None, None)
        of_terms = (tensor for term in terms for tensor in term)
        ctx.save_for_backward(weight, rows, row_scale, *grid, *learned, *of_terms)
        if packed is not None:
            return packed.with_bias(x, bias)

        # The order of the kernels, each step rounded to fp32 once; int8 products are exact. Of
        # several products the last one gets the bias, and the others are added to it.
        y = None
        for term in reversed(terms):
            with without_autocast(x):
                part = product(rows, row_scale, term)
            if y is None and bias is not None:
                part = part + bias.float()
            y = part if y is None else part + y
        return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable  # the saved values have no history
    def backward(ctx, grad_y: Tensor):
        scheme = scheme_of(ctx.choice)
        weight, rows, row_scale, inputs, input_scale, zero_point, *rest = ctx.saved_tensors
        learned = dict(zip(scheme.names, rest, strict=False))
        terms = list(zip(*[iter(rest[len(learned) :])] * 2, strict=True))
        needs_x, needs_weight, needs_bias, needs_step, _, _, _, *needs_learned = (
            ctx.needs_input_grad
        )
        grad = grad_y.reshape(rows.shape[0], grad_y.shape[-1])
        # Products in bfloat16 where a plain linear layer has them, too; float16 lacks the range for
        # gradients times scales.
        grad = grad if grad.dtype == torch.bfloat16 else grad.float()
        grad_x = grad_weight = grad_bias = grad_step = None
        of_learned: list[Tensor | None] = [None] * len(learned)
        with without_autocast(grad):
            if needs_x or needs_step:
                grad_x = sum(through_product(grad, term) for term in terms)
                if ctx.is_static:
                    grad_x, grad_step = through_grid(
                        grad_x.float(), inputs, input_scale, zero_point
                    )
                grad_x = grad_x.to(ctx.x_dtype).reshape(ctx.x_shape)
            if needs_weight or any(needs_learned):
                scaled = grad if row_scale is None else (grad * row_scale[:, None]).to(grad.dtype)
                of_dense = scaled.T @ rows.to(grad.dtype)
                grad_weight, found = scheme.gradients(of_dense.float(), weight, learned)
                grad_weight = grad_weight.to(weight.dtype)
                of_learned = [found[name].to(learned[name].dtype) for name in learned]
            if needs_bias:
                grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, grad_step, None, None, None, *of_learned


def through_grid(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the step, from that of the quantised x [M, K].

    x passes where it was not clamped; the step as `LearnedSteps` says, damped by its values.
    """
    shift = 0 if zero_point is None else zero_point
    inside, of_step = step_gradient(x.float() / scale, -128 - shift, 127 - shift)
    damping = 1 / math.sqrt(max(1, x.numel()) * INT8_MAX)
    return grad * inside, ((grad * of_step).sum() * damping).reshape(1)
