"""What `quantize_rows` means, in plain PyTorch. Slow and obvious; tests compare against it."""

import torch
from torch import Tensor

SMALLEST_ABSMAX = 2.0**-120  # below it 127 / absmax could overflow: the row counts as zero


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m, k = x.shape[:-1].numel(), x.shape[-1]
    rows = x.reshape(m, k).float()
    absmax = rows.abs().amax(1) if k else rows.new_zeros(m)
    finite = torch.isfinite(rows).all(1)
    zero = absmax < SMALLEST_ABSMAX

    # A tensor, because torch computes `127.0 / absmax` as absmax.reciprocal() * 127, which rounds
    # twice, and on CUDA `absmax / 127.0` as a multiplication by 1 / 127.
    largest = torch.full_like(absmax, 127.0)
    q = torch.round(rows * (largest / absmax)[:, None]).clamp(-127, 127)
    q = torch.where((finite & ~zero)[:, None], q, 0.0).to(torch.int8)
    scale = torch.where(zero, 0.0, absmax / largest)
    scale = torch.where(finite, scale, torch.nan)
    return q, scale, q.sum(1, dtype=torch.int32)


def quantize_rows_static(
    x: Tensor, input_scale: Tensor, input_zero_point: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Static activations as `int8_linear` quantises them: q int8 [M, K] and each row's scale."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).float()
    zero_point = 0 if input_zero_point is None else int(input_zero_point)
    q = (torch.round(rows / input_scale.reshape(())) + zero_point).clamp(-128, 127)
    finite = torch.isfinite(rows).all(1)
    q = torch.where(finite[:, None], q, 0.0).to(torch.int8)
    scale = torch.where(finite, input_scale.reshape(()), torch.nan)
    return q, scale


def example_inputs(m: int = 3, k: int = 37, dtype: torch.dtype = torch.float32) -> tuple[Tensor]:
    return (torch.randn(m, k).to(dtype),)
