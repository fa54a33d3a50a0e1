"""How a weight is quantised in training: its levels, their scales, and what the gradient does.

A scheme sees the master weight and the parameters that it learns beside it, and says for which sum
of products the weight stands: values [N, K] and scales, with y = sum of x @ dense(values, scale).T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trine import nn as packed_nn  # a package that imports this one: used in calls only
from trine.quantize.groups import split_group
from trine.quantize.weights import FLOAT_INPUT, WEIGHT_RULES, dense, weight_rule

# A product of the sum: values [N, K] and their scale ([N], [1] or [N, groups]; None where values
# are floats).
Term = tuple[Tensor, Tensor | None]
Learned = Mapping[str, Tensor]

INT8_MAX = 127


@dataclass(frozen=True)
class Scheme:
    """A weight by one of WEIGHT_RULES, which learns nothing beside it; gradients pass unchanged.

    (The straight-through estimator, Bengio et al. 2013, arXiv:1308.3432.)
    """

    names: ClassVar[tuple[str, ...]] = ()  # of the parameters learned beside the weight

    choice: str
    input_range: bool = False  # activations have one scale, by the range seen in training
    input_step: bool = False  # activations have one scale, which is learned

    @property
    def float_input(self) -> bool:
        """Whether activations stay floats."""
        return split_group(self.choice)[0] in FLOAT_INPUT

    @property
    def static_input(self) -> bool:
        """Whether activations have one scale, not one for each row."""
        return self.input_range or self.input_step

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        """Where the parameters begin that are learned beside `weight`, by name."""
        return {}

    def terms(self, weight: Tensor, learned: Learned) -> list[Term]:
        return [weight_rule(self.choice)(weight)]

    def gradients(
        self, grad: Tensor, weight: Tensor, learned: Learned
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradients of `weight` and of each learned parameter.

        `grad` is that of the dense weight that the terms stand for, float32 [N, K].
        """
        return grad, {}

    def pack(self, layer: nn.Linear, **static_input: Tensor | None) -> packed_nn.PackedLinear:
        """The packed layer; `static_input` are input_scale and input_zero_point, where it has them.

        Raises ValueError for NaN or infinite weights.
        """
        if not static_input:
            return packed_nn.pack_linear(layer, self.choice)
        return packed_nn.Int8Linear.from_linear(layer, **static_input)


class LearnedSteps(Scheme):
    """INT8 whose step sizes are learned: LSQ (Esser et al. 2020, arXiv:1902.08153).

    w_q = clamp(rint(w / s), -127, 127) * s, with a step s for each row, and one for all of the
    activations, which are clamped to [-128, 127] steps. With g = 1 / sqrt(values of a step * 127),

        dL/ds = g * sum over its values of dL/dw_q * (rint(w / s) - w / s inside, the bound outside)

    and dL/dw = dL/dw_q inside, 0 outside. Steps begin at 2 * mean |w| / sqrt(127).
    """

    names = ("weight_scale",)

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        magnitudes = weight.detach().float().abs().sum(1)
        return {"weight_scale": first_step(magnitudes / max(1, weight.shape[1]))}

    def terms(self, weight: Tensor, learned: Learned) -> list[Term]:
        scale = learned["weight_scale"]
        codes = (weight.float() / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX)
        return [(codes, scale)]

    def gradients(
        self, grad: Tensor, weight: Tensor, learned: Learned
    ) -> tuple[Tensor, dict[str, Tensor]]:
        steps = weight.float() / learned["weight_scale"][:, None]
        inside, of_step = step_gradient(steps, -INT8_MAX, INT8_MAX)
        damping = 1 / math.sqrt(max(1, weight.shape[1]) * INT8_MAX)
        return grad * inside, {"weight_scale": (grad * of_step).sum(1) * damping}

    def pack(self, layer: nn.Linear, **static_input: Tensor | None) -> packed_nn.PackedLinear:
        _check_finite(layer, ("weight", "weight_scale"))
        ((codes, scale),) = self.terms(layer.weight.detach(), {"weight_scale": layer.weight_scale})
        return packed_nn.Int8Linear.from_codes(
            codes.to(torch.int8),
            scale,
            layer.bias,
            dtype=layer.weight.dtype,
            **static_input,
        )


class TrainedTernary(Scheme):
    """Two learned scales, one for each sign: TTQ (Zhu et al. 2017, arXiv:1612.01064).

    w_q = +p where w > d, -n where w < -d, else 0, with d = 0.05 * max |w|. p and n get the sum of
    the gradients of their weights (n with the other sign); w itself gets p * dL/dw_q, n * dL/dw_q
    or dL/dw_q. Served as two ternary products, of the codes c and of |c|, with the scales
    (p + n) / 2 and (p - n) / 2. p and n begin at the mean magnitude of their weights.
    """

    names = ("sign_scale",)

    THRESHOLD = 0.05  # of the largest magnitude, as published

    def codes(self, weight: Tensor) -> Tensor:
        wide = weight.detach().float()
        if not wide.numel():
            return wide
        beyond = wide.abs() > self.THRESHOLD * wide.abs().max()
        return wide.sign() * beyond

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        codes, magnitude = self.codes(weight), weight.detach().float().abs()
        ends = []
        for sign in (1, -1):
            chosen = codes == sign
            mean = (magnitude * chosen).sum(dtype=torch.float64) / chosen.sum()
            ends.append(torch.where(chosen.any(), mean, 1.0).float())
        return {"sign_scale": torch.stack(ends)}

    def terms(self, weight: Tensor, learned: Learned) -> list[Term]:
        codes = self.codes(weight)
        positive, negative = learned["sign_scale"].float().split(1)
        return [
            (codes, (positive + negative) / 2),
            (codes.abs(), (positive - negative) / 2),
        ]

    def gradients(
        self, grad: Tensor, weight: Tensor, learned: Learned
    ) -> tuple[Tensor, dict[str, Tensor]]:
        codes = self.codes(weight)
        positive, negative = learned["sign_scale"].float()
        factor = torch.where(codes > 0, positive, torch.where(codes < 0, negative, 1.0))
        of_signs = [(grad * (codes > 0)).sum(), -(grad * (codes < 0)).sum()]
        return grad * factor, {"sign_scale": torch.stack(of_signs)}

    def pack(self, layer: nn.Linear, **static_input: Tensor | None) -> packed_nn.PackedLinear:
        _check_finite(layer, ("weight", "sign_scale"))
        (codes, scale), (_, of_magnitude) = self.terms(
            layer.weight, {"sign_scale": layer.sign_scale.detach()}
        )
        return packed_nn.TwoScaleTernaryLinear.from_codes(
            codes.to(torch.int8),
            torch.cat((scale, of_magnitude)),
            layer.bias,
            dtype=layer.weight.dtype,
        )


def first_step(mean_magnitude: Tensor) -> Tensor:
    """Where a learned step of an int8 grid begins: 2 * E|x| / sqrt(127); 1 for nothing but 0."""
    step = 2 * mean_magnitude.float() / math.sqrt(INT8_MAX)
    return torch.where(step == 0, 1.0, step)


def step_gradient(steps: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """Which values lie inside the grid, and d x_q / d s of each: `steps` is x / s (+ 0)."""
    inside = (steps >= lowest) & (steps <= highest)
    return inside, torch.where(inside, steps.round() - steps, steps.clamp(lowest, highest))


def _check_finite(layer: nn.Linear, names: tuple[str, ...]) -> None:
    for name in names:
        if not getattr(layer, name).isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; it cannot be quantised")
    if hasattr(layer, "weight_scale") and not layer.weight_scale.all():
        raise ValueError("weight_scale holds 0: a learned step has vanished; lower its rate")


SCHEMES: dict[str, Scheme] = {choice: Scheme(choice) for choice in WEIGHT_RULES} | {
    "int8-static": Scheme("int8", input_range=True),
    "int8-lsq": LearnedSteps("int8", input_step=True),
    "ternary-ttq": TrainedTernary("ternary"),
}


def scheme_of(choice: str) -> Scheme:
    """The scheme of a choice that may end in a group size.

    Raises KeyError for another choice, and as `split_group` does.
    """
    base, group = split_group(choice)
    return SCHEMES[base] if group is None else Scheme(choice)


def product(rows: Tensor, row_scale: Tensor | None, term: Term) -> Tensor:
    """rows [M, K] @ dense(*term).T, float32 [M, N], in the order in which the kernels round.

    Products of integers are exact. Groups are added up in ascending order. `row_scale` is None for
    rows of floats.
    """
    values, scale = term
    if scale is None:
        return rows.float() @ values.float().T
    of_rows = 1 if row_scale is None else row_scale[:, None]
    if scale.dim() < 2:
        return (rows.float() @ values.float().T) * of_rows * scale
    size, total = values.shape[1] // scale.shape[1], None
    for group in range(scale.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        part = (rows[:, columns].float() @ values[:, columns].float().T) * scale[:, group]
        total = part if total is None else total + part
    return total * of_rows


def through_product(grad: Tensor, term: Term) -> Tensor:
    """From `grad`, that of the result [M, N] of `product`, and in its dtype: that of the rows."""
    values, scale = term
    if scale is not None and scale.dim() < 2:
        return (grad * scale).to(grad.dtype) @ values.to(grad.dtype)
    return grad @ dense(values, scale).to(grad.dtype)
