"""The activations on Triton, for kernels launched with `enable_fp_fusion=False`.

csrc/common/activation.h has the reasons for every step.
"""

import triton
import triton.language as tl

# The coefficients of 1, of both; of t, t^2, ... of GELU and of the one with tanh.
_AT_ZERO = tl.constexpr(float.fromhex("0x1.d5818ep-1"))
_G1 = tl.constexpr(float.fromhex("-0x1.769c6ep-4"))
_G2 = tl.constexpr(float.fromhex("-0x1.058c2ap-5"))
_G3 = tl.constexpr(float.fromhex("-0x1.60b8b0p-11"))
_G4 = tl.constexpr(float.fromhex("0x1.8a64cep-10"))
_G5 = tl.constexpr(float.fromhex("0x1.219df2p-15"))
_G6 = tl.constexpr(float.fromhex("-0x1.fac0d6p-15"))
_G7 = tl.constexpr(float.fromhex("0x1.f8638ep-18"))
_G8 = tl.constexpr(float.fromhex("-0x1.410c5cp-22"))
_T1 = tl.constexpr(float.fromhex("-0x1.769d80p-4"))
_T2 = tl.constexpr(float.fromhex("-0x1.057030p-5"))
_T3 = tl.constexpr(float.fromhex("-0x1.5bd14ep-11"))
_T4 = tl.constexpr(float.fromhex("0x1.c59e3ep-10"))
_T5 = tl.constexpr(float.fromhex("-0x1.08c300p-12"))
_T6 = tl.constexpr(float.fromhex("0x1.a6afaep-13"))
_T7 = tl.constexpr(float.fromhex("-0x1.745fc4p-13"))
_T8 = tl.constexpr(float.fromhex("0x1.299642p-14"))
_T9 = tl.constexpr(float.fromhex("-0x1.ea106ep-17"))
_T10 = tl.constexpr(float.fromhex("0x1.9c7628p-20"))
_T11 = tl.constexpr(float.fromhex("-0x1.1b7782p-24"))


@triton.jit
def _magnitude_up_to(most, x):
    return tl.where(tl.abs(x) > most, most, tl.abs(x))


@triton.jit
def _gelu_from(x, t, p):
    p2 = p * p
    p4 = p2 * p2
    return tl.where(x < 0, -0.0, x) - t * (p4 * p4)


@triton.jit
def _gelu(x):
    t = _magnitude_up_to(8.0, x)
    p = t * _G8 + _G7
    p = p * t + _G6
    p = p * t + _G5
    p = p * t + _G4
    p = p * t + _G3
    p = p * t + _G2
    p = p * t + _G1
    p = p * t + _AT_ZERO
    return _gelu_from(x, t, p)


@triton.jit
def _gelu_tanh(x):
    t = _magnitude_up_to(6.0, x)
    p = t * _T11 + _T10
    p = p * t + _T9
    p = p * t + _T8
    p = p * t + _T7
    p = p * t + _T6
    p = p * t + _T5
    p = p * t + _T4
    p = p * t + _T3
    p = p * t + _T2
    p = p * t + _T1
    p = p * t + _AT_ZERO
    return _gelu_from(x, t, p)


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
