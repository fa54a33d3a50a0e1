"""What the Triton kernels of the linear ops share: quantised rows, the order of tiles, outputs.

They serve CUDA tensors where the compiled library does not (see `trine.backends.describe`). Every
step rounds as on the other backends: division is `tl.div_rn`, and launches say
`enable_fp_fusion=False`, for Triton's `/` is approximate and it fuses a product and a sum.

Under `TRITON_INTERPRET=1` the same functions take CPU tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.ops.activation.triton import activated

# 1.5 * 2**23: floats of this size are one apart, so that adding it rounds half to even and leaves
# the integer in the low bits.
_ROUNDS_TO_INTEGER = tl.constexpr(12582912.0)
_BITS_OF_IT = tl.constexpr(0x4B400000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_SMALLEST_ABSMAX = tl.constexpr(2.0**-120)

LAUNCH = {"enable_fp_fusion": False}
INTERPRETED = triton.knobs.runtime.interpret
# Rows of quantised activations are zero up to a multiple of this.
ALIGNMENT = 128


@triton.jit
def round_to_int(value):
    rounded = value + _ROUNDS_TO_INTEGER
    return rounded.to(tl.int32, bitcast=True) - _BITS_OF_IT


@triton.jit
def row_scaling(magnitude):
    """Of a row with this largest magnitude (its bits): whether it has q, the factor, the scale."""
    absmax = magnitude.to(tl.float32, bitcast=True)
    finite = magnitude < _INFINITY
    zero = absmax < _SMALLEST_ABSMAX
    to_q = tl.div_rn(tl.full([], 127.0, tl.float32), absmax)
    scale = tl.where(finite, tl.div_rn(absmax, tl.full([], 127.0, tl.float32)), float("nan"))
    return finite & (zero == 0), to_q, tl.where(zero, 0.0, scale)


@triton.jit
def magnitude_bits(value):
    """Without their sign the bits of floats order as integers do, NaN above infinity."""
    return value.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def not_finite(value):
    """1 where it is NaN or infinite, else 0."""
    return (magnitude_bits(value) >= _INFINITY).to(tl.int32)


@triton.jit
def quantize_rows_kernel(x, q, scale, total, K, WIDTH, row_stride, BLOCK: tl.constexpr):
    """One row for each program; q is zero from K to WIDTH."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, K, BLOCK):
        at = begin + offsets
        value = tl.load(x + row * row_stride + at, mask=at < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(value))
    quantized, to_q, row_scale = row_scaling(tl.max(largest, 0))
    sums = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, WIDTH, BLOCK):
        at = begin + offsets
        value = tl.load(x + row * row_stride + at, mask=at < K, other=0.0).to(tl.float32)
        rounded = tl.where(quantized & (at < K), round_to_int(value * to_q), 0)
        sums += rounded
        tl.store(q + row * WIDTH + at, rounded.to(tl.int8), mask=at < WIDTH)
    tl.store(scale + row, row_scale)
    tl.store(total + row, tl.sum(sums, 0))


@triton.jit
def quantized_static(value, scale, zero_point):
    """The int32 in [-128, 127] that a finite value becomes, given these floats."""
    # Clamped to whole numbers before it is rounded: what is far beyond them could not be.
    steps = tl.div_rn(value, scale + tl.zeros_like(value))
    clamped = tl.minimum(tl.maximum(steps, -128.0 - zero_point), 127.0 - zero_point)
    return round_to_int(clamped) + zero_point.to(tl.int32)


@triton.jit
def quantize_rows_static_kernel(
    x, q, scale, input_scale, zero_point, K, WIDTH, row_stride, BLOCK: tl.constexpr
):
    """The same with one scale and zero point for the whole tensor, read on the device."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    fixed = tl.load(input_scale)
    zero = tl.load(zero_point).to(tl.float32)
    largest = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, K, BLOCK):
        at = begin + offsets
        value = tl.load(x + row * row_stride + at, mask=at < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(value))
    finite = tl.max(largest, 0) < _INFINITY
    for begin in range(0, WIDTH, BLOCK):
        at = begin + offsets
        value = tl.load(x + row * row_stride + at, mask=at < K, other=0.0).to(tl.float32)
        rounded = quantized_static(tl.where(finite, value, 0.0), fixed, zero)
        rounded = tl.where(finite & (at < K), rounded, 0)
        tl.store(q + row * WIDTH + at, rounded.to(tl.int8), mask=at < WIDTH)
    tl.store(scale + row, tl.where(finite, fixed, float("nan")))


@triton.jit
def rows_and_columns(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Those of the tile that this program computes.

    Eight rows of tiles are gone through column by column: both operands stay in the L2.
    """
    index = tl.program_id(0)
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    first = index // (8 * column_tiles) * 8
    rows = tl.minimum(row_tiles - first, 8)
    in_group = index % (8 * column_tiles)
    m = (first + in_group % rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    return m, in_group // rows * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Round to nearest even. Triton's interpreter cuts bfloat16 off instead."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & _MAGNITUDE) > _INFINITY, 0x7FC0, rounded)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def scaled_sums(acc, x_scale, weight_scale, m, n, M, N):
    """int32 sums as the floats they stand for, with a scale for each row of x and of the weight."""
    scaled = acc.to(tl.float32) * tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
    return scaled * tl.load(weight_scale + n, mask=n < N, other=0.0)[None, :]


@triton.jit
def store_outputs(
    y, scaled, bias, m, n, M, N, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr = 0
):
    if HAS_BIAS:
        scaled = scaled + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    scaled = activated(scaled, ACTIVATION)
    at = y + m.to(tl.int64)[:, None] * N + n[None, :]
    narrowed = narrow(scaled, y.dtype.element_ty)
    tl.store(at, narrowed, mask=(m < M)[:, None] & (n < N)[None, :])


def block_of(k: int) -> int:
    """Values that a program of `quantize_rows_kernel` takes at a time."""
    return min(max(triton.next_power_of_2(k), 128), 4096)


def as_rows(x: Tensor) -> Tensor:
    """`x` [..., K] as [M, K] whose rows are contiguous."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def quantize(
    x: Tensor, width: int, static: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of `x` [M, K] as int8 [M, width], zero from K on, their scales and sums.

    `static`: (input scale, zero point) for the whole tensor; the sums are then not given.
    """
    m, k = x.shape
    q = x.new_empty(m, width, dtype=torch.int8)
    scale = x.new_empty(m, dtype=torch.float32)
    total = x.new_empty(m, dtype=torch.int32)
    if m == 0:
        return q, scale, total
    block = block_of(max(k, width))
    if static is None:
        quantize_rows_kernel[(m,)](x, q, scale, total, k, width, x.stride(0), BLOCK=block, **LAUNCH)
    else:
        input_scale, zero_point = static
        if zero_point is None:
            zero_point = torch.zeros(1, dtype=torch.int32, device=x.device)
        quantize_rows_static_kernel[(m,)](
            x, q, scale, input_scale, zero_point, k, width, x.stride(0), BLOCK=block, **LAUNCH
        )
    return q, scale, total


def padded_rows(q: Tensor) -> Tensor:
    """Rows that were quantised before, int8 [M, K], as `quantize` gives them to a linear op."""
    return torch.nn.functional.pad(q, (0, padded(q.shape[1]) - q.shape[1])).contiguous()


def padded(k: int) -> int:
    return max(-(-k // ALIGNMENT), 1) * ALIGNMENT


def tuned(kernel, block_k: str, key: tuple[str, ...]):
    """`kernel` with its tiles chosen by measurement, once for each key, and kept on disk.

    The interpreter cannot measure, and small tiles make it go through every loop.
    """
    sizes = (
        (16, 32, 128, 4, 4),
        (16, 64, 128, 4, 5),
        (32, 64, 128, 4, 4),
        (64, 128, 64, 4, 4),
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
    )
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, block_k: k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in (((16, 32, 32, 4, 1),) if INTERPRETED else sizes)
    ]
    return triton.autotune(configs, key=list(key), cache_results=True)(kernel)


def cannot_multiply(weight: Tensor) -> bool:
    """Whether `tl.dot` gets it wrong: Triton's interpreter takes bfloat16 for integers."""
    return INTERPRETED and weight.dtype == torch.bfloat16


def tiles_of(m: int, n: int):
    """The grid that gives every tile of y [m, n] one program."""
    return lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)


def row_bucket(m: int) -> int:
    """The next power of two: the choice of tiles does not change within one."""
    return triton.next_power_of_2(max(m, 16))
