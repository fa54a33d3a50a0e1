"""What the activations of csrc/common/activation.h mean, step by step, in plain PyTorch.

Every operation is one of float32 that rounds once, or one on bits.
"""

import torch
from torch import Tensor

_hex = float.fromhex
_MINIMAX = ("0x1.6ada78p-16", "-0x1.127528p-12", "0x1.55585ep-9", "-0x1.5554p-6")
_TO_WHOLE = 1.5 * 2.0**23


def activated(x: Tensor, activation: str | None) -> Tensor:
    """The activation of that name of `x`, float32."""
    if activation is None:
        return x
    return {"relu": _relu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}[activation](x)


def _relu(x: Tensor) -> Tensor:
    return torch.where(x < 0, 0.0, x)


def _gelu(x: Tensor) -> Tensor:
    t = _magnitude_up_to(13.0, x)
    high = _first_half(t)
    square, rest = high * high, (t - high) * (t + high)
    t2 = square + rest
    p = (0.5 + _hex("0x1.534976p-2") * t) + t2 * (_hex("0x1.a4e2e2p-4") + _hex("0x1.b2525cp-7") * t)
    q = (1.0 + _hex("0x1.75e6c2p+0") * t) + t2 * (
        (_hex("0x1.bde4eep-1") + _hex("0x1.072118p-2") * t) + t2 * _hex("0x1.105cd0p-5")
    )
    return _positive_part(x) - (t * _exp_of_minus_half(square, rest)) * (p / q)


def _gelu_tanh(x: Tensor) -> Tensor:
    a, a_high, a_low = map(_hex, ("0x1.988454p+1", "0x1.988p+1", "0x1.14cf50p-13"))
    b, b_high, b_low = map(_hex, ("0x1.2444f2p-3", "0x1.244p-3", "0x1.3ca936p-17"))
    t = _magnitude_up_to(_hex("0x1.3cccccp+3"), x)  # 9.9
    high = _first_half(t)
    low = t - high
    square, rest = high * high, low * (t + high)
    square_high = _first_half(square)
    square_low = square - square_high
    total = a + b * (square + rest)
    total_high = _first_half(total)
    total_low = ((a_high - total_high) + b_high * square_high) + (
        ((b_high * square_low + b_low * square) + b * rest) + a_low
    )
    e = _exp_of_minus_half(high * total_high, high * total_low + low * total)
    return _positive_part(x) - (t * e) / (1.0 + e)


def _exp_of_minus_half(a: Tensor, rest: Tensor) -> Tensor:
    shifted = a * _hex("0x1.715476p-1") + _TO_WHOLE
    n = shifted - _TO_WHOLE
    f = ((a - n * _hex("0x1.62e4p+0")) - n * _hex("0x1.7f7d1cp-19")) + rest
    first, *others = map(_hex, _MINIMAX)
    e = first * f + others[0]
    for coefficient in (*others[1:], _hex("0x1.fffffcp-4"), -0.5, 1.0):
        e = e * f + coefficient
    return (e.view(torch.int32) - (shifted.view(torch.int32) << 23)).view(torch.float32)


def _first_half(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & -4096).view(torch.float32)


def _magnitude_up_to(most: float, x: Tensor) -> Tensor:
    return torch.where(x.abs() > most, most, x.abs())


def _positive_part(x: Tensor) -> Tensor:
    return torch.where(x < 0, -0.0, x)
