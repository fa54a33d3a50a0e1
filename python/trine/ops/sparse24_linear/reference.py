"""What `sparse24_linear` means, in plain PyTorch. Slow and obvious; tests compare against it."""

import torch
from torch import Tensor

from trine.ops.quantize_rows.reference import quantize_rows


def stored_columns(indices: Tensor) -> Tensor:
    """The column of every stored value: int64 [N, 16 * chunks] from uint8 [N, 4 * chunks]."""
    shifts = torch.tensor([0, 2, 4, 6])  # a byte is four positions of two bits, two for each group
    positions = (indices.long()[:, :, None] >> shifts) & 3
    first_column_of_group = 8 * torch.arange(indices.shape[1])[:, None] + torch.tensor([0, 0, 4, 4])
    return (positions + first_column_of_group).flatten(1)


def sparse_product(x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Sum over the stored values of value * x[column], in float64: [M, K] gives [M, N].

    Columns that are not stored are not read, whatever they hold; those past K read as zero.
    """
    m, k = x.shape
    rows = torch.zeros(m, 2 * values.shape[1], dtype=torch.float64)
    rows[:, :k] = x.double()
    pieces = zip(stored_columns(indices).split(64), values.double().split(64), strict=True)
    return torch.cat([(rows[:, columns] * v).sum(2) for columns, v in pieces], dim=1)


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Float values: the sum in float64, rounded once to fp32. Int8 values: exact."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if weight_scale is None:
        y = sparse_product(rows, values, indices).float()
    else:
        q, scale, _ = quantize_rows(rows)
        y = (sparse_product(q, values, indices).float() * scale[:, None]) * weight_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], len(values))


def example_inputs(
    m: int = 3,
    n: int = 5,
    k: int = 37,
    dtype: torch.dtype = torch.float32,
    values_dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], dict[str, Tensor]]:
    """Random arguments of `sparse24_linear`; the packed weight is laid out by hand."""
    chunks = (k + 31) // 32
    # first | second << 2 for each of the six ascending pairs of positions
    pairs = torch.tensor([0 | 1 << 2, 0 | 2 << 2, 0 | 3 << 2, 1 | 2 << 2, 1 | 3 << 2, 2 | 3 << 2])
    nibbles = pairs[torch.randint(0, 6, (n, 8 * chunks))]
    indices = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    if values_dtype == torch.int8:
        values = torch.randint(-127, 128, (n, 16 * chunks), dtype=torch.int8)
        scale = {"weight_scale": torch.rand(n) / 64}
    else:
        values, scale = torch.randn(n, 16 * chunks).to(values_dtype), {}
    values[stored_columns(indices) >= k] = 0
    args = (
        torch.randn(m, k).to(dtype),
        values,
        indices,
        torch.randn(n).to(dtype) if bias else None,
    )
    return args, scale
