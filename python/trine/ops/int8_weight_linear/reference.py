"""What `int8_weight_linear` means, in plain PyTorch. Slow and obvious; tests compare against it."""

import torch
from torch import Tensor


def dequantised(packed_weight: Tensor, weight_scale: Tensor, k: int) -> Tensor:
    """The weight [N, K] that codes and scales stand for, exact in float64."""
    codes = packed_weight[:, :k].double()
    if weight_scale.dim() == 1:
        return codes * weight_scale.double()[:, None]
    groups = weight_scale.shape[1]
    return codes * weight_scale.double().repeat_interleave(k // groups, dim=1)


def int8_weight_linear(
    x: Tensor, packed_weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The sum in float64, rounded once to fp32."""
    k = x.shape[-1]
    y = (x.double() @ dequantised(packed_weight, weight_scale, k).T).float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def example_inputs(
    m: int = 3,
    n: int = 5,
    k: int = 37,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    groups: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random arguments of `int8_weight_linear`; the packed weight is laid out by hand.

    `groups` is how many scales a row has; None gives it one, in a weight_scale of [N].
    """
    packed_weight = torch.zeros(n, 16 * ((k + 15) // 16), dtype=torch.int8)
    packed_weight[:, :k] = torch.randint(-127, 128, (n, k))
    return (
        torch.randn(m, k).to(dtype),
        packed_weight,
        torch.rand((n,) if groups is None else (n, groups)) / 64,
        torch.randn(n).to(dtype) if bias else None,
    )
