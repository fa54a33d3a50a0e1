"""What the activations of csrc/common/activation.h mean, step by step, in plain PyTorch.

Every operation is one of float32 that rounds once.
"""

import torch
from torch import Tensor

# Of 1, t, t^2, ...
_GELU = (
    "0x1.d5818ep-1",
    "-0x1.769c6ep-4",
    "-0x1.058c2ap-5",
    "-0x1.60b8b0p-11",
    "0x1.8a64cep-10",
    "0x1.219df2p-15",
    "-0x1.fac0d6p-15",
    "0x1.f8638ep-18",
    "-0x1.410c5cp-22",
)
_GELU_TANH = (
    "0x1.d5818ep-1",
    "-0x1.769d80p-4",
    "-0x1.057030p-5",
    "-0x1.5bd14ep-11",
    "0x1.c59e3ep-10",
    "-0x1.08c300p-12",
    "0x1.a6afaep-13",
    "-0x1.745fc4p-13",
    "0x1.299642p-14",
    "-0x1.ea106ep-17",
    "0x1.9c7628p-20",
    "-0x1.1b7782p-24",
)


def activated(x: Tensor, activation: str | None) -> Tensor:
    """The activation of that name of `x`, float32."""
    if activation is None:
        return x
    if activation == "relu":
        return torch.where(x < 0, 0.0, x)
    return _gelu(x, 8.0, _GELU) if activation == "gelu" else _gelu(x, 6.0, _GELU_TANH)


def _gelu(x: Tensor, most: float, coefficients: tuple[str, ...]) -> Tensor:
    t = torch.where(x.abs() > most, most, x.abs())
    *others, last = map(float.fromhex, coefficients)
    p = torch.full_like(t, last)
    for coefficient in reversed(others):
        p = p * t + coefficient
    for _ in range(3):
        p = p * p
    return torch.where(x < 0, -0.0, x) - t * p
