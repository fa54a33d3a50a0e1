"""trine's operators in ONNX's, with the same roundings in the same order.

Rows are quantised one by one (Abs, ReduceMax, Div, Round) as `trine.ops.quantize_rows` does, not by
DynamicQuantizeLinear, which takes one asymmetric scale for the whole tensor. Products are
MatMulInteger, scaled as (acc * x_scale) * weight_scale + bias in float32. Their operands are
shifted to uint8 with zero point 128: ONNX Runtime is slow where the left one is signed (12 to 60
times on a processor without AVX-VNNI-INT8), and where only the right one is it saturates on AVX2,
unless that is as small as ternary codes are.
"""

from collections.abc import Callable

import torch
from onnxscript import ir
from onnxscript.onnx_opset import opset20 as op

from trine.ops.activation import CODES
from trine.ops.norm_quantize_rows.reference import SUM_LANES
from trine.ops.quantize_rows.reference import SMALLEST_ABSMAX

OPSET = 20
_FLOAT, _INT8 = ir.DataType.FLOAT, ir.DataType.INT8
_INT32, _UINT32, _UINT8 = ir.DataType.INT32, ir.DataType.UINT32, ir.DataType.UINT8


def int8_linear(
    x,
    packed_weight,
    weight_scale,
    bias=None,
    activation=0,
    input_scale=None,
    input_zero_point=None,
):
    k = x.shape[-1]
    if input_scale is not None:
        weight = _int8_weight(packed_weight, k)
        y = _static(x, weight, weight_scale, bias, input_scale, input_zero_point)
    else:
        y = _int8(*_quantize(_wide(x)), k, packed_weight, weight_scale, bias)
    return _as(_activated(y, activation), x.dtype)


def int8_linear_rows(q, scale, sum, packed_weight, weight_scale, bias, dtype, activation=0):
    x_scale, rows = op.Unsqueeze(scale, _last()), op.Cast(q, to=_FLOAT)
    y = _int8(rows, x_scale, q.shape[-1], packed_weight, weight_scale, bias)
    return _as(_activated(y, activation), dtype)


def int8_weight_linear(x, packed_weight, weight_scale, bias=None):
    """Not DequantizeLinear: of that and a product ONNX Runtime makes one that rounds x, too."""
    k, scale = x.shape[-1], op.Unsqueeze(weight_scale, _last())
    codes = op.Cast(_columns(packed_weight, k), to=_FLOAT)
    if len(weight_scale.shape) == 1:
        weight = op.Mul(codes, scale)
    else:
        n, groups = weight_scale.shape
        by_group = op.Reshape(codes, op.Constant(value_ints=[n, groups, k // groups]))
        weight = op.Reshape(op.Mul(by_group, scale), op.Constant(value_ints=[n, k]))
    return _as(_add(op.MatMul(_wide(x), op.Transpose(weight)), bias), x.dtype)


def ternary_linear(x, packed_weight, weight_scale, bias=None, activation=0):
    y = _ternary(*_quantize(_wide(x)), x.shape[-1], packed_weight, weight_scale, bias)
    return _as(_activated(y, activation), x.dtype)


def ternary_linear_rows(q, scale, sum, packed_weight, weight_scale, bias, dtype, activation=0):
    x_scale, rows = op.Unsqueeze(scale, _last()), op.Cast(q, to=_FLOAT)
    y = _ternary(rows, x_scale, q.shape[-1], packed_weight, weight_scale, bias)
    return _as(_activated(y, activation), dtype)


def quantize_rows(x):
    return _quantize_matrix(_rows(x))


def _rows(x):
    return op.Reshape(_wide(x), op.Constant(value_ints=[-1, x.shape[-1]]))


def _quantize_matrix(rows):
    q, scale = _quantize(rows)
    total = op.Cast(op.ReduceSum(q, _last(), keepdims=0), to=_INT32)  # below 2^24: exact
    return op.Cast(q, to=_INT8), op.Squeeze(scale, _last()), total


def rms_norm_quantize_rows(x, weight, eps):
    return _norm_quantize_rows(_rows(x), x, weight, None, eps)


def layer_norm_quantize_rows(x, weight, bias, eps):
    rows = _rows(x)
    return _norm_quantize_rows(op.Sub(rows, _mean(rows, x.shape[-1])), x, weight, bias, eps)


def _norm_quantize_rows(d, x, weight, bias, eps):
    """Of the rows of x, d from their centre."""
    mean = _mean(op.Mul(d, d), x.shape[-1])
    root = op.Cast(op.Add(mean, op.Constant(value_float=eps)), to=ir.DataType.DOUBLE)
    root = op.Cast(op.Sqrt(root), to=_FLOAT)  # a square root of float32 is not always the nearest
    # Not d * (1 / root), of which ONNX Runtime makes d / root, which rounds once.
    y = op.Mul(op.Mul(d, op.Div(op.Constant(value_float=2.0), root)), op.Constant(value_float=0.5))
    if weight is not None:
        y = op.Mul(y, _wide(weight))
    y = _add(y, bias)
    if x.dtype != _FLOAT:  # the norm's result is rounded before it is quantised
        y = op.Cast(op.Cast(y, to=x.dtype), to=_FLOAT)
    return _quantize_matrix(y)


def translation_table() -> dict[Callable, Callable]:
    """For torch.onnx.export's `custom_translation_table`."""
    translated = (
        *(int8_linear, int8_linear_rows, int8_weight_linear),
        *(ternary_linear, ternary_linear_rows),
        *(quantize_rows, rms_norm_quantize_rows, layer_norm_quantize_rows),
    )
    return {getattr(torch.ops.trine, each.__name__).default: each for each in translated}


def _int8(q, x_scale, k: int, packed_weight, weight_scale, bias):
    weight = _unsigned(op.Cast(_int8_weight(packed_weight, k), to=_FLOAT))
    acc = op.MatMulInteger(_unsigned(q), weight, _zero_point(), _zero_point())
    acc = op.Cast(acc, to=_FLOAT)
    return _add(op.Mul(op.Mul(acc, x_scale), weight_scale), bias)


def _ternary(q, x_scale, k: int, packed_weight, weight_scale, bias):
    codes = op.Transpose(_unpack_ternary(packed_weight, k))
    if len(weight_scale.shape) == 2:
        return _add(op.Mul(_by_group(q, codes, weight_scale, k), x_scale), bias)
    acc = op.Cast(op.MatMulInteger(_unsigned(q), codes, _zero_point()), to=_FLOAT)
    return _add(op.Mul(op.Mul(acc, x_scale), weight_scale), bias)


def _int8_weight(packed_weight, k: int):
    return op.Transpose(_columns(packed_weight, k))


def _static(x, weight, weight_scale, bias, input_scale, input_zero_point):
    """QuantizeLinear and DequantizeLinear around a product, which runtimes fuse into integers."""
    scale = op.Squeeze(input_scale, op.Constant(value_ints=[0]))
    zero = op.Constant(value_int=0) if input_zero_point is None else op.Squeeze(input_zero_point)
    zero = op.Cast(zero, to=_INT8)
    rows = op.DequantizeLinear(op.QuantizeLinear(_wide(x), scale, zero), scale, zero)
    return _add(op.MatMul(rows, op.DequantizeLinear(weight, weight_scale, axis=1)), bias)


def _mean(rows, k: int):
    """[M, 1]: lane by lane in ascending order, then pairwise, as the reference adds."""
    width = min(1 << (k - 1).bit_length(), SUM_LANES)
    padding = op.Constant(value_ints=[0, 0, 0, -k % width])
    values = op.Pad(rows, padding, op.Constant(value_float=0.0))
    sums = _slice(values, [0], [width], [1])
    for start in range(width, k, width):
        sums = op.Add(sums, _slice(values, [start], [start + width], [1]))
    while width > 1:
        sums = op.Reshape(sums, op.Constant(value_ints=[-1, width // 2, 2]))
        pair = [_slice(sums, [i], [i + 1], [2]) for i in (0, 1)]
        width //= 2
        sums = op.Reshape(op.Add(*pair), op.Constant(value_ints=[-1, width]))
    return op.Div(sums, op.Constant(value_float=float(k)))


def _quantize(x):
    """q [..., K], as floats, and scales [..., 1]: those of `trine.ops.quantize_rows`."""
    last = _last()
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
    q = op.Where(op.Or(is_zero, is_strange), zero, q)
    scale = op.Where(is_zero, zero, op.Div(absmax, largest))
    return q, op.Where(is_strange, op.Constant(value_float=float("nan")), scale)


def _unpack_ternary(packed_weight, k: int):
    """int8 [N, K] of 16 codes a word: k = 4i + j lies in bits 2i and 2i + 1 of byte j."""
    shifts = [8 * (k % 4) + 2 * (k // 4) for k in range(16)]
    words = op.Unsqueeze(op.Cast(packed_weight, to=_UINT32), _last())
    each = op.BitShift(words, _uint32(shifts), direction="RIGHT")
    codes = op.BitwiseAnd(each, _uint32([3]))
    n = packed_weight.shape[0]
    codes = _columns(op.Reshape(codes, op.Constant(value_ints=[n, -1])), k)
    return op.Cast(op.Sub(op.Cast(codes, to=_FLOAT), op.Constant(value_float=1.0)), to=_INT8)


def _by_group(q, codes, weight_scale, k: int):
    """The sum of acc_g * weight_scale[:, g] over the groups, ascending, as the kernels add."""
    groups, q = weight_scale.shape[1], _unsigned(q)
    size = k // groups
    total = None
    for group in range(groups):
        columns = [group * size], [(group + 1) * size]
        rows, weight = _slice(q, *columns, [-1]), _slice(codes, *columns, [0])
        acc = op.MatMulInteger(rows, weight, _zero_point())
        scale = op.Squeeze(
            _slice(weight_scale, [group], [group + 1], [1]), op.Constant(value_ints=[1])
        )
        part = op.Mul(op.Cast(acc, to=_FLOAT), scale)
        total = part if total is None else op.Add(total, part)
    return total


def _activated(y, code: int):
    """ReLU has trine's bits. ONNX has no operation on bits: its GELU is another approximation."""
    if code == CODES["relu"]:
        return op.Relu(y)
    if code:
        return op.Gelu(y, approximate="tanh" if code == CODES["gelu_tanh"] else "none")
    return y


def _columns(weight, k: int):
    """The first k columns; the others are padding."""
    return _slice(weight, [0], [k], [1])


def _slice(tensor, start: list[int], end: list[int], axis: list[int]):
    return op.Slice(tensor, *(op.Constant(value_ints=values) for values in (start, end, axis)))


def _wide(x):
    return x if x.dtype == _FLOAT else op.Cast(x, to=_FLOAT)


def _as(y, dtype):
    return y if dtype == _FLOAT else op.Cast(y, to=dtype)


def _last():
    return op.Constant(value_ints=[-1])


def _add(y, bias):
    return y if bias is None else op.Add(y, _wide(bias))


def _unsigned(q):
    return op.Cast(op.Add(q, op.Constant(value_float=128.0)), to=_UINT8)


def _zero_point():
    return op.Cast(op.Constant(value_int=128), to=_UINT8)


def _uint32(values: list[int]):
    return op.Cast(op.Constant(value_ints=values), to=_UINT32)
