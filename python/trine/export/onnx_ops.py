"""trine's operators in ONNX's, with the same roundings in the same order.

Rows are quantised one by one (Abs, ReduceMax, Div, Round) as `trine.ops.quantize_rows` does, not by
DynamicQuantizeLinear, which takes one asymmetric scale for the whole tensor. Products are
MatMulInteger, exact, and scaled as (acc * x_scale) * weight_scale + bias in float32.
"""

from collections.abc import Callable

import torch
from onnxscript import ir
from onnxscript.onnx_opset import opset20 as op

from trine.ops.quantize_rows.reference import SMALLEST_ABSMAX

OPSET = 20
_FLOAT, _INT8, _UINT32 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT32


def int8_linear(x, packed_weight, weight_scale, bias=None, input_scale=None, input_zero_point=None):
    weight = op.Transpose(_columns(packed_weight, _k(x)))
    if input_scale is not None:
        return _as(x, _static(x, weight, weight_scale, bias, input_scale, input_zero_point))
    q, x_scale = _quantize_rows(x)
    acc = op.Cast(op.MatMulInteger(q, weight), to=_FLOAT)
    return _as(x, _add(op.Mul(op.Mul(acc, x_scale), weight_scale), bias))


def ternary_linear(x, packed_weight, weight_scale, bias=None):
    codes = op.Transpose(_unpack_ternary(packed_weight, _k(x)))
    q, x_scale = _quantize_rows(x)
    if len(weight_scale.shape) == 2:
        y = op.Mul(_by_group(q, codes, weight_scale, _k(x)), x_scale)
    else:
        acc = op.Cast(op.MatMulInteger(q, codes), to=_FLOAT)
        y = op.Mul(op.Mul(acc, x_scale), weight_scale)
    return _as(x, _add(y, bias))


def translation_table() -> dict[Callable, Callable]:
    """For torch.onnx.export's `custom_translation_table`."""
    return {
        torch.ops.trine.int8_linear.default: int8_linear,
        torch.ops.trine.ternary_linear.default: ternary_linear,
    }


def _static(x, weight, weight_scale, bias, input_scale, input_zero_point):
    """QuantizeLinear and DequantizeLinear around a product, which runtimes fuse into integers."""
    scale = op.Squeeze(input_scale, op.Constant(value_ints=[0]))
    zero = op.Constant(value_int=0) if input_zero_point is None else op.Squeeze(input_zero_point)
    zero = op.Cast(zero, to=_INT8)
    rows = op.DequantizeLinear(op.QuantizeLinear(_wide(x), scale, zero), scale, zero)
    return _add(op.MatMul(rows, op.DequantizeLinear(weight, weight_scale, axis=1)), bias)


def _quantize_rows(x):
    """int8 [..., K] and float32 scales [..., 1]: those of `trine.ops.quantize_rows`."""
    x = _wide(x)
    last = op.Constant(value_ints=[-1])
    absmax = op.ReduceMax(op.Abs(x), last, keepdims=1)
    largest = op.Constant(value_float=127.0)
    zero = op.Constant(value_float=0.0)
    # 0 * x is NaN where x is NaN or infinite; what ReduceMax makes of a NaN is not defined.
    strange = op.Cast(op.IsNaN(op.Mul(x, zero)), to=_FLOAT)
    is_strange = op.Greater(op.ReduceMax(strange, last, keepdims=1), zero)
    is_zero = op.Less(absmax, op.Constant(value_float=SMALLEST_ABSMAX))
    q = op.Clip(
        op.Round(op.Mul(x, op.Div(largest, absmax))), op.Constant(value_float=-127.0), largest
    )
    q = op.Cast(op.Where(op.Or(is_zero, is_strange), zero, q), to=_INT8)
    scale = op.Where(is_zero, zero, op.Div(absmax, largest))
    return q, op.Where(is_strange, op.Constant(value_float=float("nan")), scale)


def _unpack_ternary(packed_weight, k: int):
    """int8 [N, K] of 16 codes a word: k = 4i + j lies in bits 2i and 2i + 1 of byte j."""
    shifts = [8 * (k % 4) + 2 * (k // 4) for k in range(16)]
    words = op.Unsqueeze(op.Cast(packed_weight, to=_UINT32), op.Constant(value_ints=[-1]))
    each = op.BitShift(words, _uint32(shifts), direction="RIGHT")
    codes = op.BitwiseAnd(each, _uint32([3]))
    n = packed_weight.shape[0]
    codes = _columns(op.Reshape(codes, op.Constant(value_ints=[n, -1])), k)
    return op.Cast(op.Sub(op.Cast(codes, to=_FLOAT), op.Constant(value_float=1.0)), to=_INT8)


def _by_group(q, codes, weight_scale, k: int):
    """The sum of acc_g * weight_scale[:, g] over the groups, ascending, as the kernels add."""
    groups = weight_scale.shape[1]
    size = k // groups
    total = None
    for group in range(groups):
        columns = [group * size], [(group + 1) * size]
        acc = op.MatMulInteger(_slice(q, *columns, [-1]), _slice(codes, *columns, [0]))
        scale = op.Squeeze(
            _slice(weight_scale, [group], [group + 1], [1]), op.Constant(value_ints=[1])
        )
        part = op.Mul(op.Cast(acc, to=_FLOAT), scale)
        total = part if total is None else op.Add(total, part)
    return total


def _columns(weight, k: int):
    """The first k columns; the others are padding."""
    return _slice(weight, [0], [k], [1])


def _slice(tensor, start: list[int], end: list[int], axis: list[int]):
    return op.Slice(tensor, *(op.Constant(value_ints=values) for values in (start, end, axis)))


def _wide(x):
    return x if x.dtype == _FLOAT else op.Cast(x, to=_FLOAT)


def _as(x, y):
    return y if x.dtype == _FLOAT else op.Cast(y, to=x.dtype)


def _add(y, bias):
    return y if bias is None else op.Add(y, _wide(bias))


def _uint32(values: list[int]):
    return op.Cast(op.Constant(value_ints=values), to=_UINT32)


def _k(x) -> int:
    return x.shape[-1]
