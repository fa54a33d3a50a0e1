"""RMSNorm and per-row int8 quantisation in one pass."""

import torch
from torch import Tensor

from trine import _library  # noqa: F401  (registers the operator)
from trine.ops._checks import check_one_device, explain_missing_kernel
from trine.ops.quantize_rows import check_and_allocate

__all__ = ["rms_norm_quantize_rows"]

_op = torch.ops.trine.rms_norm_quantize_rows.default
explain_missing_kernel("rms_norm_quantize_rows")


def rms_norm_quantize_rows(
    x: Tensor, weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_rows(torch.nn.functional.rms_norm(x, [K], weight, eps))` in one pass.

    The normalised row is (x / sqrt(mean(x**2) + eps)) * weight in fp32, rounded to x's dtype, as
    torch's, before it is quantised. The sum of squares is pairwise, in an order that every backend
    keeps, and the root is the nearest one, so that all give the same bits. torch's own norm is
    another by a few roundings of fp32: after rounding to x's dtype by one at most, and then q by
    one at most. Not differentiable.

    The results feed the linear ops as a `QuantizedRows`.

    Args:
        x: [..., K], float32, bfloat16 or float16; leading dimensions are flattened to M rows.
        weight: [K], floating, or None.
        eps: None is torch.finfo(x.dtype).eps.

    Returns:
        q int8 [M, K], scale float32 [M], and the sum of each row's q, int32 [M]. A row that holds
        NaN or infinity gets scale NaN and q 0; one whose squares overflow fp32 is 0.

    Raises:
        ValueError: x is not floating, has no dimension, or K > 16909320; weight has another shape.
    """
    if eps is None:
        eps = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
    return _op(x, weight, eps)


@torch.library.register_fake("trine::rms_norm_quantize_rows")
def _fake(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    op = "rms_norm_quantize_rows"
    check_one_device(op, x, weight)
    result = check_and_allocate(op, x)
    if weight is not None and (weight.dim() != 1 or weight.shape[0] != x.shape[-1]):
        raise ValueError(f"{op}: weight must have shape [{x.shape[-1]}], one value per column of x")
    return result
