"""`ternary24_linear` on Triton: the formula and its roundings are those of the compiled kernels.

The six bits of a group lie in two neighbouring bytes. They are four columns: four products with
four selections of the activations' columns, and no group is put together twice.
"""

import triton
import triton.language as tl
from torch import Tensor

from trine.ops import _triton
from trine.ops._triton import rows_and_columns, scaled_sums, store_outputs
from trine.ops.ternary24_linear import _fake as check_and_allocate


@triton.jit
def _column_of(group, COLUMN: tl.constexpr):
    """The weights in a column of groups; where both values lie in it, +1 goes before -1."""
    first = 1 - (group >> 1 & 2)
    second = 1 - (group >> 4 & 2)
    is_first = (group & 3) == COLUMN
    is_second = (group >> 3 & 3) == COLUMN
    if COLUMN == 0:
        return tl.where(is_first, first, 0)
    elif COLUMN == 3:
        return tl.where(is_second, second, 0)
    else:
        lone = tl.where(is_first, first, tl.where(is_second, second, 0))
        return tl.where(is_first & is_second, tl.maximum(first, second), lone)


@triton.jit
def ternary24_linear_kernel(
    q,
    weight,
    y,
    x_scale,
    weight_scale,
    bias,
    M,
    N,
    WIDTH,
    weight_stride,
    groups,
    row_bucket,
    PER_TENSOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """q [M, WIDTH], zero behind its true columns; weight uint8 [N, weight_stride]."""
    m, n = rows_and_columns(M, N, BLOCK_M, BLOCK_N)
    q_rows = q + m.to(tl.int64)[:, None] * WIDTH
    weight_rows = weight + n.to(tl.int64)[None, :] * weight_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for begin in range(0, groups, BLOCK_GROUPS):
        group = begin + tl.arange(0, BLOCK_GROUPS)
        byte = group * 6 // 8
        inside = (n < N)[None, :] & (group < groups)[:, None]
        low = tl.load(weight_rows + byte[:, None], mask=inside, other=0).to(tl.int32)
        inside = inside & (byte + 1 < weight_stride)[:, None]
        high = tl.load(weight_rows + byte[:, None] + 1, mask=inside, other=0).to(tl.int32)
        bits = (low | high << 8) >> (group * 6 % 8)[:, None] & 63
        for column in tl.static_range(4):
            inside = (m < M)[:, None] & (group < groups)[None, :]
            a = tl.load(q_rows + (4 * group + column)[None, :], mask=inside, other=0)
            acc = tl.dot(a, _column_of(bits, column).to(tl.int8), acc, out_dtype=tl.int32)
    # One scale for the whole tensor: that of row 0 for all of them.
    of_row = n * 0 if PER_TENSOR else n
    scaled = scaled_sums(acc, x_scale, weight_scale, m, of_row, M, N)
    store_outputs(y, scaled, bias, m, n, M, N, HAS_BIAS)


_tuned = _triton.tuned(ternary24_linear_kernel, "BLOCK_GROUPS", ("row_bucket", "N", "WIDTH"))


def ternary24_linear(
    x: Tensor, packed_weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    y = check_and_allocate(x, packed_weight, weight_scale, bias)
    if y.numel() == 0:
        return y
    rows = _triton.as_rows(x)
    (m, k), n = rows.shape, packed_weight.shape[0]
    q, x_scale, _ = _triton.quantize(rows, _triton.padded(k))
    _tuned[_triton.tiles_of(m, n)](
        q,
        packed_weight.contiguous(),
        y,
        x_scale,
        weight_scale.contiguous(),
        bias if bias is None else bias.contiguous(),
        m,
        n,
        q.shape[1],
        packed_weight.shape[1],
        triton.cdiv(k, 4),
        _triton.row_bucket(m),
        PER_TENSOR=weight_scale.numel() == 1,
        HAS_BIAS=bias is not None,
        **_triton.LAUNCH,
    )
    return y
