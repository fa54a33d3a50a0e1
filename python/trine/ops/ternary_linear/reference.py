"""What `ternary_linear` means, in plain PyTorch. Slow and obvious; tests compare against it.

Integer sums are taken in float64, where they are exact (all below 2**53); every other step rounds
to fp32 once, in the order that the kernels keep.
"""

import torch
from torch import Tensor

from trine.ops.activation.reference import activated
from trine.ops.quantize_rows.reference import quantize_rows


def decode(packed_weight: Tensor, k: int) -> Tensor:
    """The values [N, K] in {-1, 0, 1}, float64: column k is in byte k % 4 of word k // 16."""
    column = torch.arange(k)
    word = packed_weight.long()[:, column // 16]
    shift = 8 * (column % 4) + 2 * (column % 16 // 4)
    return ((word >> shift) & 3).double() - 1


def ternary_linear(
    x: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    k, n = x.shape[-1], packed_weight.shape[0]
    weight = decode(packed_weight, k)
    q, scale, _ = quantize_rows(x)
    if weight_scale.dim() == 2:
        y = torch.zeros(q.shape[0], n)
        size = k // weight_scale.shape[1]
        for g in range(weight_scale.shape[1]):
            group = slice(g * size, (g + 1) * size)
            acc = (q[:, group].double() @ weight[:, group].T).float()
            y = y + acc * weight_scale[:, g]
        y = y * scale[:, None]
    else:
        acc = (q.double() @ weight.T).float()
        y = (acc * scale[:, None]) * weight_scale
    if bias is not None:
        y = y + bias.float()
    return activated(y, activation).to(x.dtype).reshape(*x.shape[:-1], n)


def example_inputs(
    m: int = 3,
    n: int = 5,
    k: int = 37,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    scale_shape: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random arguments of `ternary_linear`; the packed weight is laid out by hand.

    `scale_shape` is that of weight_scale; None gives one scale per row.
    """
    words = 4 * ((k + 63) // 64)
    codes = torch.ones(n, 16 * words, dtype=torch.int64)
    codes[:, :k] = torch.randint(0, 3, (n, k))
    packed_weight = torch.zeros(n, words, dtype=torch.int64)
    for column in range(16):
        packed_weight |= codes[:, column::16] << (8 * (column % 4) + 2 * (column // 4))
    return (
        torch.randn(m, k).to(dtype),
        packed_weight.to(torch.int32),  # keeps the low 32 bits
        torch.rand((n,) if scale_shape is None else scale_shape) / 8 + 0.01,
        torch.randn(n).to(dtype) if bias else None,
    )
