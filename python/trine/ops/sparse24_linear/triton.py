"""`sparse24_linear` on Triton: the weight is read packed, and multiplied expanded.

Triton has no instruction that takes a sparse operand. What is gained is the weight's traffic, 9/16
of a dense one's in half precision, which is what few rows of x cost; many rows cost a dense product
and the expansion. The weight is the first operand, and the tile of y transposed, because a tensor
core's instruction wants 64 rows of the first (16 before sm_90) and 8 columns of the second.

Times NaN or infinity an expanded zero is NaN, although its column is not stored. A sum that is
finite saw neither: rows of x with others are computed once more, from the stored columns alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.ops import _triton
from trine.ops._triton import not_finite, rows_and_columns, scaled_sums, store_outputs
from trine.ops.sparse24_linear import _fake as check_and_allocate


@triton.jit
def _column(c: tl.constexpr, nibbles, first, second):
    """What groups of four columns hold in column c."""
    return tl.where((nibbles & 3) == c, first, tl.where(nibbles >> 2 == c, second, 0))


@triton.jit
def _expand(values, indices, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """values [BLOCK_N, BLOCK_K / 2] and indices [BLOCK_N, BLOCK_K / 8] as [BLOCK_N, BLOCK_K]."""
    first, second = tl.split(tl.reshape(values, [BLOCK_N, BLOCK_K // 4, 2]))
    nibbles = tl.reshape(tl.join(indices & 15, indices >> 4), [BLOCK_N, BLOCK_K // 4])
    even = tl.join(_column(0, nibbles, first, second), _column(2, nibbles, first, second))
    odd = tl.join(_column(1, nibbles, first, second), _column(3, nibbles, first, second))
    return tl.reshape(tl.join(even, odd), [BLOCK_N, BLOCK_K])


@triton.jit
def _sums_of_stored_columns(x, values, indices, n_inside, K, stored):
    """One row of x: the sums of value * x[column of value], [1, BLOCK_N]."""
    CHUNK: tl.constexpr = 16  # values at a time; more of them cost the whole kernel registers
    total = tl.zeros([n_inside.shape[0], CHUNK], tl.float32)
    for begin in range(0, stored, CHUNK):
        v = begin + tl.arange(0, CHUNK)[None, :]
        value = tl.load(values + v, mask=n_inside, other=0)
        position = (tl.load(indices + v // 4, mask=n_inside, other=0) >> (2 * (v % 4))) & 3
        column = v // 2 * 4 + position
        factor = tl.load(x + column, mask=n_inside & (column < K), other=0)
        total += value.to(tl.float32) * factor.to(tl.float32)
    return tl.sum(total, 1)[None, :]


@triton.jit
def sparse24_linear_kernel(
    x,
    values,
    indices,
    y,
    x_scale,
    weight_scale,
    bias,
    M,
    N,
    K,
    x_stride,
    stored,
    row_bucket,
    WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x [M, K]; values [N, stored], int8 beside int8 x; uint8 indices [N, stored / 4]."""
    INTEGER: tl.constexpr = values.dtype.element_ty == tl.int8
    m, n = rows_and_columns(M, N, BLOCK_M, BLOCK_N)
    x_rows = x + m.to(tl.int64)[None, :] * x_stride
    values += n.to(tl.int64)[:, None] * stored
    indices += n.to(tl.int64)[:, None] * (stored // 4)
    n_inside = (n < N)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if INTEGER else tl.float32)
    for begin in range(0, 2 * stored, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        v = begin // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        packed = tl.load(values + v, mask=n_inside & (v < stored), other=0)
        byte = begin // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
        positions = tl.load(indices + byte, mask=n_inside & (byte < stored // 4), other=0)
        a = _expand(packed, positions, BLOCK_N, BLOCK_K)
        b = tl.load(x_rows + k[:, None], mask=(k < K)[:, None] & (m < M)[None, :], other=0)
        if INTEGER:
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        elif WIDEN:
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc)
    sums = tl.trans(acc)
    if INTEGER:
        scaled = scaled_sums(sums, x_scale, weight_scale, m, n, M, N)
        store_outputs(y, scaled, bias, m, n, M, N, HAS_BIAS)
    else:
        again = tl.max(not_finite(sums), 1)
        store_outputs(y, sums, bias, tl.where(again > 0, M, m), n, M, N, HAS_BIAS)
        if tl.max(again, 0) > 0:
            for i in range(BLOCK_M):
                this = tl.arange(0, BLOCK_M) == i
                if tl.max(tl.where(this, again, 0), 0) > 0:
                    at = tl.max(tl.where(this, m, 0), 0)
                    row = x + at.to(tl.int64) * x_stride
                    one = _sums_of_stored_columns(row, values, indices, n_inside, K, stored)
                    store_outputs(y, one, bias, at + tl.arange(0, 1), n, M, N, HAS_BIAS)


_tuned = _triton.tuned(sparse24_linear_kernel, "BLOCK_K", ("row_bucket", "N", "K"))


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    y = check_and_allocate(x, values, indices, bias, weight_scale=weight_scale)
    if values.dtype == torch.float32:
        raise ValueError(
            "sparse24_linear: float32 values have no kernel on this device; store the weight as "
            "float16, bfloat16 or int8, or move the tensors to the CPU"
        )
    if y.numel() == 0:
        return y
    rows, x_scale = _triton.as_rows(x), None
    k = rows.shape[1]
    if weight_scale is not None:
        rows, x_scale, _ = _triton.quantize(rows, _triton.padded(k))
        weight_scale = weight_scale.contiguous()
    m, n = rows.shape[0], values.shape[0]
    values, indices = values.contiguous(), indices.contiguous()
    _tuned[_triton.tiles_of(m, n)](
        rows,
        values,
        indices,
        y,
        x_scale,
        weight_scale,
        bias if bias is None else bias.contiguous(),
        m,
        n,
        k,
        rows.stride(0),
        values.shape[1],
        _triton.row_bucket(m),
        WIDEN=values.dtype != rows.dtype or _triton.cannot_multiply(values),
        HAS_BIAS=bias is not None,
        **_triton.LAUNCH,
    )
    return y
