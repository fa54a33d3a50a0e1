"""What `rms_norm_quantize_rows` means, in plain PyTorch. Slow and obvious; tests compare against
it."""

import torch
from torch import Tensor

from trine.ops.quantize_rows.reference import quantize_rows

SUM_LANES = 8192  # kSumLanes in rms_norm_quantize_rows.h gives the reason


def sum_of_squares(rows: Tensor) -> Tensor:
    """Of each row of a float32 [M, K]: lane by lane in ascending order, then pairwise."""
    squares = rows * rows
    width = 1
    while width < min(rows.shape[1], SUM_LANES):
        width *= 2
    sums = rows.new_zeros(rows.shape[0], width)
    for part in squares.split(SUM_LANES, 1):
        sums[:, : part.shape[1]] += part
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    return sums[:, 0]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    m, k = x.shape[:-1].numel(), x.shape[-1]
    rows = x.reshape(m, k).float()
    total = sum_of_squares(rows)
    # Divisors are tensors, because torch may multiply by the reciprocal of a number. And its square
    # roots of float32 are not always the nearest ones; those of float64, rounded, are.
    mean = total / torch.full_like(total, k) + eps
    root = torch.sqrt(mean.double()).float()
    y = rows * (torch.ones_like(root) / root)[:, None]
    if weight is not None:
        y = y * weight.float()
    return y.to(x.dtype)


def rms_norm_quantize_rows(
    x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(rms_norm(x, weight, eps))


def example_inputs(
    m: int = 3, k: int = 37, dtype: torch.dtype = torch.float32, weight: bool = True
) -> tuple[Tensor, Tensor | None, float]:
    weights = (1 + torch.randn(k) / 4).to(dtype) if weight else None
    return (4 * torch.randn(m, k)).to(dtype), weights, 1e-5
