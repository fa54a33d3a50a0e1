"""What `ternary24_linear` means, in plain PyTorch. Slow and obvious; tests compare against it.

Integer sums are taken in float64, where they are exact (all below 2**53); every other step rounds
to fp32 once, in the order that the kernels keep.
"""

import torch
from torch import Tensor

from trine.ops.quantize_rows.reference import quantize_rows


def decode(packed_weight: Tensor, k: int) -> Tensor:
    """The values [N, K] in {-1, 0, 1}, float64: column k is in the bits from 6 * (k // 4) on."""
    column = torch.arange(k)
    bit = column // 4 * 6
    in_bytes = torch.nn.functional.pad(packed_weight, (0, 1)).long()
    group = in_bytes[:, bit // 8] | in_bytes[:, bit // 8 + 1] << 8
    group = group >> bit % 8
    first, second = group & 3, group >> 3 & 3
    is_first = (first == column % 4) & (first != 3)
    is_second = (second == column % 4) & (second != 0)
    first_is_minus, second_is_minus = (group & 4) != 0, (group & 32) != 0
    plus = (is_first & ~first_is_minus) | (is_second & ~second_is_minus)
    minus = (is_first & first_is_minus) | (is_second & second_is_minus)
    return plus.double() - (minus & ~plus).double()


def ternary24_linear(
    x: Tensor, packed_weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    k, n = x.shape[-1], packed_weight.shape[0]
    q, scale, _ = quantize_rows(x)
    acc = (q.double() @ decode(packed_weight, k).T).float()
    y = (acc * scale[:, None]) * weight_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], n)


def example_inputs(
    m: int = 3,
    n: int = 5,
    k: int = 37,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    scale_shape: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random arguments of `ternary24_linear`; the packed weight is any bits.

    `scale_shape` is that of weight_scale; None gives one scale per row.
    """
    packed_bytes = 16 * ((6 * ((k + 3) // 4) + 127) // 128)
    return (
        torch.randn(m, k).to(dtype),
        torch.randint(0, 256, (n, packed_bytes), dtype=torch.uint8),
        torch.rand((n,) if scale_shape is None else scale_shape) / 8 + 0.01,
        torch.randn(n).to(dtype) if bias else None,
    )
