"""Per-row int8 quantisation of activations."""

import torch
from torch import Tensor

from trine import _library  # noqa: F401  (registers the operator)
from trine.ops._checks import check_rows, explain_missing_kernel

__all__ = ["quantize_rows"]

_op = torch.ops.trine.quantize_rows.default
explain_missing_kernel("quantize_rows")

_MAX_K = (2**31 - 1) // 127  # kQuantizeRowsMaxK in quantize_rows.h gives the reason


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise each row of `x` to int8, symmetric, by its largest magnitude.

    scale = absmax / 127 and q = clamp(rint(x * (127 / absmax)), -127, 127), rounding half to even,
    in fp32. A row with absmax < 2**-120 counts as zero (scale 0). A row that holds NaN or infinity
    gets scale NaN and q 0, so that whatever is computed from it is NaN. Not differentiable.

    Args:
        x: [..., K], float32, bfloat16 or float16; leading dimensions are flattened to M rows.

    Returns:
        q int8 [M, K], scale float32 [M], and the sum of each row's q, int32 [M].

    Raises:
        ValueError: x is not floating, has no dimension, or K > 16909320 (a row's int32 sum could
            overflow).
    """
    return _op(x)


@torch.library.register_fake("trine::quantize_rows")
def _fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return check_and_allocate("quantize_rows", x)


def check_and_allocate(op: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what `op` gives for the rows of `x`; the errors of `quantize_rows`."""
    check_rows(op, x, _MAX_K)
    k = x.shape[-1]
    m = 1
    for size in x.shape[:-1]:
        m = m * size
    return (
        x.new_empty(m, k, dtype=torch.int8),
        x.new_empty(m, dtype=torch.float32),
        x.new_empty(m, dtype=torch.int32),
    )
