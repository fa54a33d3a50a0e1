"""What `int8_linear` means, in plain PyTorch. Slow and obvious; tests compare against it.

Integer sums are taken in float64, where they are exact (all below 2**53); every other step rounds
to fp32 once, in the order that the kernels keep.
"""

import torch
from torch import Tensor

from trine.ops.activation.reference import activated
from trine.ops.quantize_rows.reference import quantize_rows, quantize_rows_static


def int8_linear(
    x: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    k, n = x.shape[-1], packed_weight.shape[0]
    weight = packed_weight[:, :k].double()
    if input_scale is None:
        q, scale, _ = quantize_rows(x)
        zero_point = 0
    else:
        q, scale = quantize_rows_static(x, input_scale, input_zero_point)
        zero_point = 0 if input_zero_point is None else int(input_zero_point)
    acc = (q.double() @ weight.T - zero_point * weight.sum(1)).float()
    y = (acc * scale[:, None]) * weight_scale
    if bias is not None:
        y = y + bias.float()
    return activated(y, activation).to(x.dtype).reshape(*x.shape[:-1], n)


def example_inputs(
    m: int = 3, n: int = 5, k: int = 37, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random arguments of `int8_linear`; the packed weight is laid out by hand."""
    packed_weight = torch.zeros(n, 16 * ((k + 15) // 16), dtype=torch.int8)
    packed_weight[:, :k] = torch.randint(-127, 128, (n, k))
    return (
        torch.randn(m, k).to(dtype),
        packed_weight,
        torch.rand(n) / 64,
        torch.randn(n).to(dtype) if bias else None,
    )
