"""`ternary_linear` on Triton: the formula and its roundings are those of the compiled kernels.

Bits 2i and 2i + 1 of byte j of a word hold the code of k = 4i + j, so that the bytes of a row,
shifted by 2i, are the codes of every sixteen k's 4i .. 4i + 3: four products with four selections
of the activations' columns, and no byte is loaded twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.ops import _triton
from trine.ops._triton import rows_and_columns, scaled_sums, store_outputs
from trine.ops.ternary_linear import _fake as check_and_allocate
from trine.ops.ternary_linear import _fake_on_rows as check_rows_and_allocate


@triton.jit
def _products(acc, q_rows, weight_rows, m_inside, n_inside, begin, end, BLOCK_BYTES: tl.constexpr):
    """acc += the products of bytes `begin` to `end` of the packed rows."""
    for first in range(begin, end, BLOCK_BYTES):
        byte = first + tl.arange(0, BLOCK_BYTES)
        inside = n_inside[None, :] & (byte < end)[:, None]
        packed = tl.load(weight_rows + byte[:, None], mask=inside, other=0x55)  # four zeros
        for i in tl.static_range(4):
            k = byte // 4 * 16 + 4 * i + byte % 4
            inside = m_inside[:, None] & (byte < end)[None, :]
            a = tl.load(q_rows + k[None, :], mask=inside, other=0)
            codes = (packed >> (2 * i)) & 3
            acc = tl.dot(a, codes.to(tl.int8) - 1, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def ternary_linear_kernel(
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
    GROUPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """q [M, WIDTH], zero behind its true columns; weight uint8 [N, weight_stride]."""
    m, n = rows_and_columns(M, N, BLOCK_M, BLOCK_N)
    q_rows = q + m.to(tl.int64)[:, None] * WIDTH
    weight_rows = weight + n.to(tl.int64)[None, :] * weight_stride
    nothing = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    if GROUPED:
        size = weight_stride // groups
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for g in range(groups):
            acc = _products(
                nothing, q_rows, weight_rows, m < M, n < N, g * size, (g + 1) * size, BLOCK_BYTES
            )
            group_scale = tl.load(weight_scale + n * groups + g, mask=n < N, other=0.0)[None, :]
            total = total + acc.to(tl.float32) * group_scale
        scaled = total * tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
    else:
        acc = _products(nothing, q_rows, weight_rows, m < M, n < N, 0, weight_stride, BLOCK_BYTES)
        # One scale for the whole tensor: that of row 0 for all of them.
        of_row = n * 0 if PER_TENSOR else n
        scaled = scaled_sums(acc, x_scale, weight_scale, m, of_row, M, N)
    store_outputs(y, scaled, bias, m, n, M, N, HAS_BIAS, ACTIVATION)


_tuned = _triton.tuned(ternary_linear_kernel, "BLOCK_BYTES", ("row_bucket", "N", "WIDTH", "groups"))


def ternary_linear(
    x: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    y = check_and_allocate(x, packed_weight, weight_scale, bias, activation)
    if y.numel() == 0:
        return y
    rows = _triton.as_rows(x)
    q, x_scale, _ = _triton.quantize(rows, _triton.padded(rows.shape[1]))
    _multiply(y, q, x_scale, packed_weight, weight_scale, bias, activation)
    return y


def ternary_linear_rows(
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
        _multiply(y, rows, scale.contiguous(), packed_weight, weight_scale, bias, activation)
    return y


def _multiply(
    y: Tensor,
    q: Tensor,
    x_scale: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: int,
) -> None:
    weight = packed_weight.contiguous().view(torch.uint8)
    (m, width), n = q.shape, weight.shape[0]
    grouped = weight_scale.dim() == 2
    _tuned[_triton.tiles_of(m, n)](
        q,
        weight,
        y,
        x_scale,
        weight_scale.contiguous(),
        bias if bias is None else bias.contiguous(),
        m,
        n,
        width,
        weight.shape[1],
        weight_scale.shape[1] if grouped else 1,
        _triton.row_bucket(m),
        PER_TENSOR=not grouped and weight_scale.numel() == 1,
        GROUPED=grouped,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        **_triton.LAUNCH,
    )
