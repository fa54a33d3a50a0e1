"""Linear layer with int8 weights and floating activations (weight-only INT8, W8A16)."""

import torch
from torch import Tensor

from trine import _library  # noqa: F401  (registers the operator)
from trine.ops._checks import (
    check_groups,
    check_one_device,
    check_rows,
    explain_missing_kernel,
)
from trine.ops._linear import (
    in_autocast_dtype,
    linear_with_gradient,
    needs_grad,
    scaled_by_groups,
)
from trine.ops.int8_linear.pack import unpack_int8

__all__ = ["int8_weight_linear"]

_op = torch.ops.trine.int8_weight_linear.default
explain_missing_kernel("int8_weight_linear")


def int8_weight_linear(
    x: Tensor, packed_weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiply `x` by an INT8 weight and leave `x` as it is (weight-only, W8A16).

    y = sum over groups g of weight_scale[n, g] * (sum over k of g of x[k] * w[n, k]), + bias, in
    fp32, rounded once to x's dtype. The order of the sum, and so the last bits, depend on the
    instruction set and on the number of rows, not on the number of threads. Where the processor has
    AVX512-BF16, many rows of bf16 x are multiplied by it, and it takes subnormal numbers for 0.
    Gradients flow to x and bias.

    Args:
        x: [..., K], float32, bfloat16 or float16.
        packed_weight: int8 [N, 16 * ceil(K / 16)], from `pack_int8`.
        weight_scale: float32 [N], one per row; or [N, groups], one for each of that many equal
            groups of consecutive columns, whose size must be a multiple of 64.
        bias: [N], floating, or None.

    Returns:
        [..., N] in x's dtype (under autocast, in its dtype). NaN and infinity in a row of x go
        where the sum takes them.

    Raises:
        ValueError: shapes or dtypes that do not fit, groups that do not cut K into multiples of 64,
            a packed weight or scale that requires a gradient.
    """
    if not isinstance(x, Tensor):
        raise ValueError("int8_weight_linear: x must be a tensor, the one before quantisation")
    x = in_autocast_dtype(x)
    if needs_grad(x, bias, packed_weight, weight_scale):
        return linear_with_gradient(_run, _dense_weight, x, bias, packed_weight, weight_scale)
    return _op(x, packed_weight, weight_scale, bias)


def _run(x: Tensor, bias: Tensor | None, packed_weight: Tensor, weight_scale: Tensor) -> Tensor:
    return _op(x, packed_weight, weight_scale, bias)


def _dense_weight(k: int, packed_weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The dense float32 [N, K] that the packed weight and its scales stand for."""
    return scaled_by_groups(unpack_int8(packed_weight, k), weight_scale)


@torch.library.register_fake("trine::int8_weight_linear")
def _fake(x, packed_weight, weight_scale, bias=None):
    check_one_device("int8_weight_linear", x, packed_weight, weight_scale, bias)
    check_rows("int8_weight_linear", x)
    k = x.shape[-1]
    _check(packed_weight.dtype == torch.int8, "packed_weight must be int8")
    _check(packed_weight.dim() == 2, "packed_weight must be [N, 16 * ceil(K / 16)]")
    n, columns = packed_weight.shape
    _check(
        columns == 16 * ((k + 15) // 16),
        f"x has K = {k} columns, which does not fit a packed_weight of {columns} columns",
    )
    _check(
        weight_scale.dim() in (1, 2) and weight_scale.shape[0] == n,
        f"weight_scale must be [{n}] (one per row of packed_weight) or [{n}, groups]",
    )
    if weight_scale.dim() == 2:
        check_groups("int8_weight_linear", weight_scale, k)
    _check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == n),
        f"bias must have shape [{n}], one value per output feature",
    )
    return x.new_empty(*x.shape[:-1], n)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"int8_weight_linear: {message}")
