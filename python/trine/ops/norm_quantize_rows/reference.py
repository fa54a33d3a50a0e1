"""What `rms_norm_quantize_rows` and `layer_norm_quantize_rows` mean, in plain PyTorch. Slow and
obvious; tests compare against it."""

import torch
from torch import Tensor

from trine.ops.quantize_rows.reference import quantize_rows

SUM_LANES = 8192  # kSumLanes in norm_quantize_rows.h gives the reason


def sum_pairwise(rows: Tensor) -> Tensor:
    """Of each row of a float32 [M, K]: lane by lane in ascending order, then pairwise."""
    width = 1
    while width < min(rows.shape[1], SUM_LANES):
        width *= 2
    sums = rows.new_zeros(rows.shape[0], width)
    for part in rows.split(SUM_LANES, 1):
        sums[:, : part.shape[1]] += part
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    return sums[:, 0]


def mean(rows: Tensor) -> Tensor:
    total = sum_pairwise(rows)
    # Divisors are tensors, because torch may multiply by the reciprocal of a number.
    return total / torch.full_like(total, rows.shape[1])


def scaled(d: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Of float32 [M, K] rows."""
    # torch's square roots of float32 are not always the nearest ones; those of float64, rounded,
    # are.
    root = torch.sqrt((mean(d * d) + eps).double()).float()
    y = d * (torch.ones_like(root) / root)[:, None]
    if weight is not None:
        y = y * weight.float()
    return y if bias is None else y + bias.float()


def flattened(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).float()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return scaled(flattened(x), weight, None, eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    rows = flattened(x)
    return scaled(rows - mean(rows)[:, None], weight, bias, eps).to(x.dtype)


def rms_norm_quantize_rows(
    x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(rms_norm(x, weight, eps))


def layer_norm_quantize_rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_rows(layer_norm(x, weight, bias, eps))


def example_inputs(
    norm: str, m: int = 3, k: int = 37, dtype: torch.dtype = torch.float32, weight: bool = True
) -> tuple[Tensor | float | None, ...]:
    """Of the op of `norm`, "rms" or "layer": x, weight, for LayerNorm bias, eps."""
    x = 4 * torch.randn(m, k)
    parameters: list[Tensor | None] = [(1 + torch.randn(k) / 4).to(dtype) if weight else None]
    if norm == "layer":
        x = x + 2 * torch.randn(m, 1)  # a mean that is not 0
        parameters.append(torch.randn(k).to(dtype) / 2 if weight else None)
    return x.to(dtype), *parameters, 1e-5
