"""Linear layer with weights in {-1, 0, 1} and int8 activations quantised inside."""

import torch
from torch import Tensor

from trine import _library  # noqa: F401  (registers the operator)
from trine.ops._checks import (
    check_groups,
    check_one_device,
    check_quantized_rows,
    check_rows,
    explain_missing_kernel,
)
from trine.ops._linear import (
    in_autocast_dtype,
    linear_with_gradient,
    needs_grad,
    scaled_by_groups,
)
from trine.ops.activation import activation_code, check_code
from trine.ops.quantized_rows import QuantizedRows
from trine.ops.ternary_linear.pack import pack_ternary, unpack_ternary

__all__ = ["pack_ternary", "ternary_linear", "unpack_ternary"]

_op = torch.ops.trine.ternary_linear.default
_op_on_rows = torch.ops.trine.ternary_linear_rows.default
explain_missing_kernel("ternary_linear")
explain_missing_kernel("ternary_linear_rows")

_MAX_K = 2**22  # kTernaryMaxK in ternary_linear.h gives the reason


def ternary_linear(
    x: Tensor | QuantizedRows,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """Multiply `x` by a ternary weight: y = activation((acc * x_scale) * weight_scale + bias).

    Each row of x is quantised to int8 inside by its largest magnitude (see `quantize_rows`). The
    int32 sums are exact; scaling is in fp32 and rounds once to x's dtype, so every backend gives
    the same bits. With a weight_scale [N, G] the columns are cut into G equal groups, and
    y = activation((sum over g, ascending, of acc_g * weight_scale[:, g]) * x_scale + bias).
    Gradients flow to x and bias (straight-through). The scheme is that of BitNet b1.58 (Ma et al.
    2024, arXiv:2402.17764).

    Args:
        x: [..., K], float32, bfloat16 or float16; or already quantised.
        packed_weight: int32 [N, 4 * ceil(K / 64)], from `pack_ternary`.
        weight_scale: float32; one value ([] or [1]), one per row ([N]), or one per row and group
            ([N, G], where K / G is a multiple of 64).
        bias: [N], floating, or None.
        activation: None, "relu", "gelu" (with the normal distribution's function) or "gelu_tanh",
            applied in fp32 before the result is rounded; csrc/common/activation.h states the error.
            In the backward pass it has the derivative of its formula.

    Returns:
        [..., N] in x's dtype (under autocast, in its dtype). A row of x that holds NaN or infinity
        gives a row of NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, K > 2**22 (int32 could overflow), a packed
            weight or scale that requires a gradient, another activation.
    """
    code = 0 if activation is None else activation_code("ternary_linear", activation)
    if isinstance(x, QuantizedRows):
        return x.linear(_op_on_rows, packed_weight, weight_scale, bias, code)
    x = in_autocast_dtype(x)
    if needs_grad(x, bias, packed_weight, weight_scale):
        return linear_with_gradient(
            _run, _dense_weight, x, bias, packed_weight, weight_scale, activation=code
        )
    return _run(x, bias, packed_weight, weight_scale, code)


def _run(
    x: Tensor,
    bias: Tensor | None,
    packed_weight: Tensor,
    weight_scale: Tensor,
    activation: int = 0,
) -> Tensor:
    if activation == 0:  # one argument costs 0.4 us
        return _op(x, packed_weight, weight_scale, bias)
    return _op(x, packed_weight, weight_scale, bias, activation)


def _dense_weight(k: int, packed_weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The dense float32 [N, K] that a packed weight and its scales stand for."""
    return scaled_by_groups(unpack_ternary(packed_weight, k), weight_scale)


@torch.library.register_fake("trine::ternary_linear")
def _fake(
    x: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    check_code("ternary_linear", activation)
    check_one_device("ternary_linear", x, packed_weight, weight_scale, bias)
    check_rows("ternary_linear", x, _MAX_K)
    return x.new_empty(*x.shape[:-1], _check_weight(x.shape[-1], packed_weight, weight_scale, bias))


@torch.library.register_fake("trine::ternary_linear_rows")
def _fake_on_rows(q, scale, sum, packed_weight, weight_scale, bias, dtype, activation=0):
    check_code("ternary_linear", activation)
    check_one_device("ternary_linear", q, scale, sum, packed_weight, weight_scale, bias)
    check_quantized_rows("ternary_linear", q, scale, sum, dtype, _MAX_K)
    n = _check_weight(q.shape[1], packed_weight, weight_scale, bias)
    return q.new_empty(q.shape[0], n, dtype=dtype)


def _check_weight(k: int, packed_weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> int:
    """N, if everything fits rows of `k` columns."""
    _check(packed_weight.dim() == 2, "packed_weight must be [N, 4 * ceil(K / 64)]")
    n, words = packed_weight.shape
    _check(packed_weight.dtype == torch.int32, "packed_weight must be int32")
    _check(weight_scale.dtype == torch.float32, "weight_scale must be float32")
    _check(
        words == 4 * ((k + 63) // 64),
        f"x has K = {k} columns, which does not fit a packed_weight of {words} columns",
    )
    if weight_scale.dim() == 2 and weight_scale.shape[0] == n:
        check_groups("ternary_linear", weight_scale, k)
    else:
        _check(
            weight_scale.dim() <= 1 and weight_scale.numel() in (1, n),
            f"weight_scale must hold one value, [{n}] (one per row of packed_weight) or "
            f"[{n}, groups]",
        )
    if bias is not None:
        _check(
            bias.dim() == 1 and bias.shape[0] == n,
            f"bias must have shape [{n}], one value per output feature",
        )
    return n


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"ternary_linear: {message}")
