"""`int8_weight_linear` on Triton: codes become x's type in registers, sums are in float32.

A tile of y has at most 16 rows where x has no more, so that few rows read each weight once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.ops import _triton
from trine.ops._triton import rows_and_columns, store_outputs
from trine.ops.int8_weight_linear import _fake as check_and_allocate


@triton.jit
def int8_weight_linear_kernel(
    x,
    weight,
    y,
    weight_scale,
    bias,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    groups,
    row_bucket,
    WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x [M, K]; weight int8 [N, weight_stride]; weight_scale [N, groups]."""
    m, n = rows_and_columns(M, N, BLOCK_M, BLOCK_N)
    x_rows = x + m.to(tl.int64)[:, None] * x_stride
    weight_rows = weight + n.to(tl.int64)[None, :] * weight_stride
    scales = weight_scale + n.to(tl.int64) * groups
    size = K // groups
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(0, groups):
        end = (group + 1) * size
        of_group = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(group * size, end, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            a = tl.load(x_rows + k[None, :], mask=(m < M)[:, None] & (k < end)[None, :], other=0)
            b = tl.load(
                weight_rows + k[:, None], mask=(n < N)[None, :] & (k < end)[:, None], other=0
            )
            if WIDEN:
                wide = a.to(tl.float32)
                of_group = tl.dot(wide, b.to(tl.float32), of_group, input_precision="ieee")
            else:
                of_group = tl.dot(a, b.to(a.dtype), of_group)
        acc += of_group * tl.load(scales + group, mask=n < N, other=0.0)[None, :]
    store_outputs(y, acc, bias, m, n, M, N, HAS_BIAS)


_tuned = _triton.tuned(int8_weight_linear_kernel, "BLOCK_K", ("row_bucket", "N", "K", "groups"))


def int8_weight_linear(
    x: Tensor, packed_weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    y = check_and_allocate(x, packed_weight, weight_scale, bias)
    if y.numel() == 0:
        return y
    rows, weight = _triton.as_rows(x), packed_weight.contiguous()
    m, n = rows.shape[0], weight.shape[0]
    _tuned[_triton.tiles_of(m, n)](
        rows,
        weight,
        y,
        weight_scale.contiguous(),
        bias if bias is None else bias.contiguous(),
        m,
        n,
        rows.shape[1],
        rows.stride(0),
        weight.shape[1],
        weight_scale.shape[1] if weight_scale.dim() == 2 else 1,
        _triton.row_bucket(m),
        WIDEN=x.dtype == torch.float32 or _triton.cannot_multiply(x),
        HAS_BIAS=bias is not None,
        **_triton.LAUNCH,
    )
    return y
