"""The activations on Triton, for kernels launched with `enable_fp_fusion=False`.

csrc/common/activation.h has the reasons for every step.
"""

import triton
import triton.language as tl

_TO_WHOLE = tl.constexpr(12582912.0)
_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e4p+0"))
_LN2_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-19"))
_HALF_LOG2_E = tl.constexpr(float.fromhex("0x1.715476p-1"))
_E2 = tl.constexpr(float.fromhex("0x1.fffffcp-4"))
_E3 = tl.constexpr(float.fromhex("-0x1.5554p-6"))
_E4 = tl.constexpr(float.fromhex("0x1.55585ep-9"))
_E5 = tl.constexpr(float.fromhex("-0x1.127528p-12"))
_E6 = tl.constexpr(float.fromhex("0x1.6ada78p-16"))
_P1 = tl.constexpr(float.fromhex("0x1.534976p-2"))
_P2 = tl.constexpr(float.fromhex("0x1.a4e2e2p-4"))
_P3 = tl.constexpr(float.fromhex("0x1.b2525cp-7"))
_Q1 = tl.constexpr(float.fromhex("0x1.75e6c2p+0"))
_Q2 = tl.constexpr(float.fromhex("0x1.bde4eep-1"))
_Q3 = tl.constexpr(float.fromhex("0x1.072118p-2"))
_Q4 = tl.constexpr(float.fromhex("0x1.105cd0p-5"))
_A = tl.constexpr(float.fromhex("0x1.988454p+1"))
_A_HIGH = tl.constexpr(float.fromhex("0x1.988p+1"))
_A_LOW = tl.constexpr(float.fromhex("0x1.14cf50p-13"))
_B = tl.constexpr(float.fromhex("0x1.2444f2p-3"))
_B_HIGH = tl.constexpr(float.fromhex("0x1.244p-3"))
_B_LOW = tl.constexpr(float.fromhex("0x1.3ca936p-17"))
_MOST = tl.constexpr(13.0)
_MOST_TANH = tl.constexpr(float.fromhex("0x1.3cccccp+3"))


@triton.jit
def _first_half(x):
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def _exp_of_minus_half(a, rest):
    shifted = a * _HALF_LOG2_E + _TO_WHOLE
    n = shifted - _TO_WHOLE
    f = ((a - n * _LN2_HIGH) - n * _LN2_LOW) + rest
    e = f * _E6 + _E5
    e = e * f + _E4
    e = e * f + _E3
    e = e * f + _E2
    e = e * f - 0.5
    e = e * f + 1.0
    bits = e.to(tl.int32, bitcast=True) - (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _gelu(x):
    t = tl.where(tl.abs(x) > _MOST, _MOST, tl.abs(x))
    high = _first_half(t)
    square = high * high
    rest = (t - high) * (t + high)
    t2 = square + rest
    p = (t * _P1 + 0.5) + t2 * (t * _P3 + _P2)
    q = (t * _Q1 + 1.0) + t2 * ((t * _Q3 + _Q2) + t2 * _Q4)
    return tl.where(x < 0, -0.0, x) - (t * _exp_of_minus_half(square, rest)) * tl.div_rn(p, q)


@triton.jit
def _gelu_tanh(x):
    t = tl.where(tl.abs(x) > _MOST_TANH, _MOST_TANH, tl.abs(x))
    high = _first_half(t)
    low = t - high
    square = high * high
    rest = low * (t + high)
    square_high = _first_half(square)
    square_low = square - square_high
    total = (square + rest) * _B + _A
    total_high = _first_half(total)
    total_low = ((_A_HIGH - total_high) + square_high * _B_HIGH) + (
        ((square_low * _B_HIGH + square * _B_LOW) + rest * _B) + _A_LOW
    )
    e = _exp_of_minus_half(high * total_high, high * total_low + low * total)
    return tl.where(x < 0, -0.0, x) - tl.div_rn(t * e, e + 1.0)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """`x` float32; ACTIVATION is one of `trine.ops.activation.CODES`, or 0."""
    if ACTIVATION == 1:
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == 2:
        return _gelu(x)
    elif ACTIVATION == 3:
        return _gelu_tanh(x)
    else:
        return x
