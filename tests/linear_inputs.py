"""Inputs that every linear op is tried on."""

import torch
from torch import Tensor
from trine.ops.int8_weight_linear import reference as int8_weight
from trine.ops.sparse24_linear import reference as sparse24

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (M, N, K): one of everything, odd sizes, chunk borders and their neighbours, no rows, no columns.
SHAPES = (
    (1, 1, 1),
    (1, 17, 100),
    (2, 5, 15),
    (3, 16, 16),
    (5, 33, 63),
    (7, 31, 64),
    (8, 48, 65),
    (33, 20, 257),
    (1, 70, 1000),
    (4, 3, 1024),
    (0, 4, 32),
    (4, 0, 32),
    (4, 3, 0),
)


def difficult_rows(k: int, dtype: torch.dtype) -> Tensor:
    """Rows that need care: zero, tiny, huge, constant, NaN, infinite, one outlier."""
    rows = torch.randn(8, k)
    rows[1] = 0
    rows[2] = rows[2].sign() * torch.finfo(dtype).tiny
    rows[3] = rows[3].sign() * torch.finfo(dtype).max
    rows[4] = -1.5
    rows[5, k // 2] = torch.nan
    rows[6, k - 1] = -torch.inf
    rows[7, 0] = 1e4
    return rows.to(dtype)


def non_contiguous(x: Tensor) -> list[Tensor]:
    """Tensors equal to `x` [M, K] with padded rows, transposed, and strided."""
    m, k = x.shape
    padded = torch.full((m, k + 3), torch.nan, dtype=x.dtype)
    padded[:, :k] = x
    every_second = torch.full((m, 2 * k), torch.nan, dtype=x.dtype)
    every_second[:, ::2] = x
    return [padded[:, :k], x.T.contiguous().T, every_second[:, ::2]]


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal in shape, dtype, and every value; NaN equals NaN, and 0 equals -0."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_within_sum_bound(
    actual: Tensor, expected: Tensor, magnitude: Tensor, k: int, unscaled: Tensor | None = None
) -> None:
    """What a float op gives [M, N], against the sum in float64, and `magnitude`, sum |x w|.

    The bound on the sum is 4 * eps * sqrt(K) * sum |x w|, then comes one fp32 rounding with the
    bias and one to the output's dtype. NaN and infinity must be exactly where they are expected.
    `unscaled` is the magnitude of the sums that are taken, where scales are applied to them.
    """
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape == magnitude.shape
    eps = torch.finfo(torch.float32).eps
    # A sum that leaves the range of fp32 on its way may end anywhere.
    taken = magnitude if unscaled is None else unscaled
    certain = ~(taken.isfinite() & (taken > torch.finfo(torch.float32).max))
    finite = certain & expected.isfinite()
    result = expected.double().abs()
    bound = 4 * eps * k**0.5 * magnitude + eps * result
    bound += torch.finfo(actual.dtype).eps * result + torch.finfo(actual.dtype).tiny
    error = (actual.double() - expected.double()).abs()
    assert (error[finite] <= bound[finite]).all(), (error / bound)[finite].max()
    special = certain & ~finite
    torch.testing.assert_close(actual[special], expected[special], rtol=0, atol=0, equal_nan=True)


def exact_int8_weight_inputs(
    m: int, n: int, k: int, dtype: torch.dtype, bias: bool = True, groups: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of `int8_weight_linear`, whose sums are exact in fp32 in any order."""
    x, weight, scale, bias_values = int8_weight.example_inputs(m, n, k, dtype, bias, groups)
    powers = torch.randint(-3, 0, scale.shape).float().exp2()
    return torch.randint(-8, 9, x.shape).to(dtype), weight, powers, bias_values


def exact_sparse24_inputs(
    m: int, n: int, k: int, dtype: torch.dtype, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of `sparse24_linear` with float values, whose sums are exact in fp32 in any order: every bit
    of the result is known."""
    inputs, _ = sparse24.example_inputs(m, n, k, dtype, dtype, bias)
    x, values, indices, bias_values = inputs
    values = torch.where(values == 0, 0, torch.randint(-31, 32, values.shape) / 8).to(dtype)
    return torch.randint(-8, 9, x.shape).to(dtype), values, indices, bias_values
