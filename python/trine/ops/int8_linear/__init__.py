"""Linear layer with int8 weights and int8 activations quantised inside."""

import torch
from torch import Tensor

from trine import _library  # noqa: F401  (registers the operator)
from trine.ops._checks import (
    check_one_device,
    check_quantized_rows,
    check_rows,
    explain_missing_kernel,
)
from trine.ops._linear import in_autocast_dtype, linear_with_gradient, needs_grad
from trine.ops.activation import activation_code, check_code
from trine.ops.int8_linear.pack import pack_int8, unpack_int8
from trine.ops.quantized_rows import QuantizedRows

__all__ = ["int8_linear", "pack_int8", "unpack_int8"]

_op = torch.ops.trine.int8_linear.default
_op_on_rows = torch.ops.trine.int8_linear_rows.default
explain_missing_kernel("int8_linear")
explain_missing_kernel("int8_linear_rows")

_MAX_K, _MAX_K_STATIC = 131072, 65536  # int8_linear.h gives the reasons


def int8_linear(
    x: Tensor | QuantizedRows,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Multiply `x` by an INT8 weight: y = activation((acc * x_scale) * weight_scale + bias).

    x is quantised inside: per row by its largest magnitude (see `quantize_rows`), or, where
    `input_scale` is given, with that scale and zero point for the whole tensor, as ONNX's
    QuantizeLinear does. The int32 sums are exact; scaling is in fp32 and rounds once to x's dtype,
    so every backend gives the same bits. Gradients flow to x and bias (straight-through).

    Args:
        x: [..., K], float32, bfloat16 or float16; or already quantised.
        packed_weight: int8 [N, 16 * ceil(K / 16)], from `pack_int8`.
        weight_scale: float32 [N].
        bias: [N], floating, or None.
        input_scale: float32, one value; None quantises each row by itself.
        input_zero_point: int32, one value in [-128, 127]; only with `input_scale`.
        activation: None, "relu", "gelu" (with the normal distribution's function) or "gelu_tanh",
            applied in fp32 before the result is rounded; csrc/common/activation.h states the error.
            In the backward pass it has the derivative of its formula.

    Returns:
        [..., N] in x's dtype (under autocast, in its dtype). A row of x that holds NaN or infinity
        gives a row of NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, K > 131072 (int32 could overflow; 65536 with
            `input_scale`), a packed weight or scale that requires a gradient, quantised x with
            `input_scale`, another activation.
    """
    code = 0 if activation is None else activation_code("int8_linear", activation)
    if isinstance(x, QuantizedRows):
        _check(input_scale is None, "input_scale is for x that is not quantised yet")
        return x.linear(_op_on_rows, packed_weight, weight_scale, bias, code)
    x = in_autocast_dtype(x)
    weight = (packed_weight, weight_scale, input_scale, input_zero_point)
    if needs_grad(x, bias, *weight):
        return linear_with_gradient(_run, _dense_weight, x, bias, *weight, activation=code)
    return _run(x, bias, *weight, code)


def _run(
    x: Tensor,
    bias: Tensor | None,
    packed_weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation: int = 0,
) -> Tensor:
    if input_scale is None and input_zero_point is None:  # keywords cost 1 us, one argument 0.4
        if activation == 0:
            return _op(x, packed_weight, weight_scale, bias)
        return _op(x, packed_weight, weight_scale, bias, activation)
    return _op(
        x,
        packed_weight,
        weight_scale,
        bias,
        activation,
        input_scale=input_scale,
        input_zero_point=input_zero_point,
    )


def _dense_weight(k: int, packed_weight: Tensor, weight_scale: Tensor, *_) -> Tensor:
    """The dense float32 [N, K] that the packed weight and its scales stand for."""
    return unpack_int8(packed_weight, k) * weight_scale[:, None]


@torch.library.register_fake("trine::int8_linear")
def _fake(
    x,
    packed_weight,
    weight_scale,
    bias=None,
    activation=0,
    *,
    input_scale=None,
    input_zero_point=None,
):
    check_code("int8_linear", activation)
    check_one_device(
        "int8_linear", x, packed_weight, weight_scale, bias, input_scale, input_zero_point
    )
    check_rows("int8_linear", x, _MAX_K if input_scale is None else _MAX_K_STATIC)
    return x.new_empty(*x.shape[:-1], _check_weight(x.shape[-1], packed_weight, weight_scale, bias))


@torch.library.register_fake("trine::int8_linear_rows")
def _fake_on_rows(q, scale, sum, packed_weight, weight_scale, bias, dtype, activation=0):
    check_code("int8_linear", activation)
    check_one_device("int8_linear", q, scale, sum, packed_weight, weight_scale, bias)
    check_quantized_rows("int8_linear", q, scale, sum, dtype, _MAX_K)
    n = _check_weight(q.shape[1], packed_weight, weight_scale, bias)
    return q.new_empty(q.shape[0], n, dtype=dtype)


def _check_weight(k: int, packed_weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> int:
    """N, if everything fits rows of `k` columns."""
    _check(packed_weight.dtype == torch.int8, "packed_weight must be int8")
    _check(packed_weight.dim() == 2, "packed_weight must be [N, 16 * ceil(K / 16)]")
    n, columns = packed_weight.shape
    _check(
        columns == 16 * ((k + 15) // 16),
        f"x has K = {k} columns, which does not fit a packed_weight of {columns} columns",
    )
    _check(
        weight_scale.dim() == 1 and weight_scale.shape[0] == n,
        f"weight_scale must be [{n}], one scale per row of packed_weight",
    )
    _check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == n),
        f"bias must have shape [{n}], one value per output feature",
    )
    return n


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"int8_linear: {message}")
