"""`rms_norm_quantize_rows` and `layer_norm_quantize_rows` on Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.ops import _triton
from trine.ops._triton import magnitude_bits, narrow, round_to_int, row_scaling
from trine.ops.norm_quantize_rows import check_and_allocate_normed

_SUM_LANES = 8192  # kSumLanes in norm_quantize_rows.h gives the reason


@triton.jit
def sum_pairwise(values, LEVELS: tl.constexpr):
    """Of 2**LEVELS values, neighbours first: Triton's own sum has another order."""
    for level in tl.static_range(LEVELS):
        values = tl.sum(tl.reshape(values, [2 ** (LEVELS - 1 - level), 2]), 1)
    return tl.sum(values, 0)


@triton.jit
def _load(x, at, K):
    return tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)


@triton.jit
def _centred(x, at, K, centre, IS_LAYER: tl.constexpr):
    value = _load(x, at, K)
    if IS_LAYER:
        value = tl.where(at < K, value - centre, 0.0)
    return value


@triton.jit
def _normed(
    x,
    weight,
    bias,
    at,
    K,
    centre,
    r,
    IS_LAYER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """In float32, rounded to the type of x."""
    y = _centred(x, at, K, centre, IS_LAYER) * r
    if HAS_WEIGHT:
        y = y * _load(weight, at, K)
    if HAS_BIAS:
        y = y + _load(bias, at, K)
    return tl.where(at < K, narrow(y, x.dtype.element_ty).to(tl.float32), 0.0)


@triton.jit
def norm_quantize_rows_kernel(
    x,
    weight,
    bias,
    q,
    scale,
    total,
    K,
    count,
    eps,
    row_stride,
    IS_LAYER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row for each program; `count` is K as a float, 2**LEVELS the lanes of the sums."""
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    q += row * K
    LANES: tl.constexpr = 2**LEVELS
    centre = tl.zeros([], tl.float32)
    if IS_LAYER:
        values = tl.zeros([LANES], tl.float32)
        for begin in range(0, K, LANES):
            values += _load(x, begin + tl.arange(0, LANES), K)
        centre = tl.div_rn(sum_pairwise(values, LEVELS), count)
    squares = tl.zeros([LANES], tl.float32)
    for begin in range(0, K, LANES):
        value = _centred(x, begin + tl.arange(0, LANES), K, centre, IS_LAYER)
        squares += value * value
    mean = tl.div_rn(sum_pairwise(squares, LEVELS), count)
    r = tl.div_rn(tl.full([], 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, K, BLOCK):
        at = begin + offsets
        y = _normed(x, weight, bias, at, K, centre, r, IS_LAYER, HAS_WEIGHT, HAS_BIAS)
        largest = tl.maximum(largest, magnitude_bits(y))
    quantized, to_q, row_scale = row_scaling(tl.max(largest, 0))
    sums = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, K, BLOCK):
        at = begin + offsets
        y = _normed(x, weight, bias, at, K, centre, r, IS_LAYER, HAS_WEIGHT, HAS_BIAS)
        rounded = tl.where(quantized, round_to_int(y * to_q), 0)
        sums += rounded
        tl.store(q + at, rounded.to(tl.int8), mask=at < K)
    tl.store(scale + row, row_scale)
    tl.store(total + row, tl.sum(sums, 0))


def _run(
    op: str, is_layer: bool, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, scale, total = check_and_allocate_normed(op, x, weight=weight, bias=bias)
    rows = _triton.as_rows(x)
    m, k = rows.shape
    if m == 0:
        return q, scale, total
    lanes = min(max(triton.next_power_of_2(k), 2), _SUM_LANES)
    none = torch.empty(0, device=x.device)
    norm_quantize_rows_kernel[(m,)](
        rows,
        none if weight is None else weight.contiguous(),
        none if bias is None else bias.contiguous(),
        q,
        scale,
        total,
        k,
        float(k),
        eps,
        rows.stride(0),
        IS_LAYER=is_layer,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        LEVELS=lanes.bit_length() - 1,
        BLOCK=_triton.block_of(k),
        **_triton.LAUNCH,
    )
    return q, scale, total


def rms_norm_quantize_rows(
    x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _run("rms_norm_quantize_rows", False, x, weight, None, eps)


def layer_norm_quantize_rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _run("layer_norm_quantize_rows", True, x, weight, bias, eps)
