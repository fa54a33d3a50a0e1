"""`int8_linear` on Triton: the formula and its roundings are those of the compiled kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.ops import _triton
from trine.ops._triton import rows_and_columns, scaled_sums, store_outputs
from trine.ops.int8_linear import _fake as check_and_allocate
from trine.ops.int8_linear import _fake_on_rows as check_rows_and_allocate


@triton.jit
def int8_linear_kernel(
    q,
    weight,
    y,
    x_scale,
    weight_scale,
    column_minus,
    bias,
    M,
    N,
    K,
    weight_stride,
    row_bucket,
    HAS_MINUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q [M, K] and weight [N, weight_stride] are zero behind their true columns."""
    m, n = rows_and_columns(M, N, BLOCK_M, BLOCK_N)
    q_rows = q + m.to(tl.int64)[:, None] * K
    weight_rows = weight + n.to(tl.int64)[None, :] * weight_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        a = tl.load(q_rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        inside = (n < N)[None, :] & (k < weight_stride)[:, None]
        b = tl.load(weight_rows + k[:, None], mask=inside, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    if HAS_MINUS:
        acc -= tl.load(column_minus + n, mask=n < N, other=0)[None, :]
    scaled = scaled_sums(acc, x_scale, weight_scale, m, n, M, N)
    store_outputs(y, scaled, bias, m, n, M, N, HAS_BIAS, ACTIVATION)


_tuned = _triton.tuned(int8_linear_kernel, "BLOCK_K", ("row_bucket", "N", "K"))


def int8_linear(
    x: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    y = check_and_allocate(
        x,
        packed_weight,
        weight_scale,
        bias,
        activation,
        input_scale=input_scale,
        input_zero_point=input_zero_point,
    )
    if y.numel() == 0:
        return y
    rows = _triton.as_rows(x)
    static = None if input_scale is None else (input_scale, input_zero_point)
    q, x_scale, _ = _triton.quantize(rows, _triton.padded(rows.shape[1]), static)
    minus = None
    if input_zero_point is not None:
        minus = (packed_weight.sum(1, dtype=torch.int32) * input_zero_point).to(torch.int32)
    _multiply(y, q, x_scale, packed_weight, weight_scale, bias, minus, activation)
    return y


def int8_linear_rows(
    q: Tensor,
    scale: Tensor,
    sum: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: int = 0,
) -> Tensor:
    y = check_rows_and_allocate(q, scale, sum, packed_weight, weight_scale, bias, dtype, activation)
    if y.numel() > 0:
        rows = _triton.padded_rows(q)
        _multiply(y, rows, scale.contiguous(), packed_weight, weight_scale, bias, None, activation)
    return y


def _multiply(
    y: Tensor,
    q: Tensor,
    x_scale: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    minus: Tensor | None,
    activation: int,
) -> None:
    weight = packed_weight.contiguous()
    (m, width), n = q.shape, weight.shape[0]
    _tuned[_triton.tiles_of(m, n)](
        q,
        weight,
        y,
        x_scale,
        weight_scale.contiguous(),
        minus,
        bias if bias is None else bias.contiguous(),
        m,
        n,
        width,
        weight.shape[1],
        _triton.row_bucket(m),
        HAS_MINUS=minus is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        **_triton.LAUNCH,
    )
