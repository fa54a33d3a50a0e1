"""RMSNorm or LayerNorm, and per-row int8 quantisation, in one pass."""

import torch
from torch import Tensor

from trine import _library  # noqa: F401  (registers the operators)
from trine.ops._checks import check_one_device, explain_missing_kernel
from trine.ops.quantize_rows import check_and_allocate

__all__ = ["layer_norm_quantize_rows", "rms_norm_quantize_rows"]

_rms_norm = torch.ops.trine.rms_norm_quantize_rows.default
_layer_norm = torch.ops.trine.layer_norm_quantize_rows.default
explain_missing_kernel("rms_norm_quantize_rows")
explain_missing_kernel("layer_norm_quantize_rows")


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
    return _rms_norm(x, weight, eps)


def layer_norm_quantize_rows(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_rows(torch.nn.functional.layer_norm(x, [K], weight, bias, eps))` in one pass.

    The normalised row (Ba et al. 2016) is (d / sqrt(mean(d**2) + eps)) * weight + bias in fp32,
    where d = x - mean(x), rounded to x's dtype, as torch's, before it is quantised. Sums and root
    are those of `rms_norm_quantize_rows`, so that all backends give the same bits. The variance is
    that of the differences, whose digits do not cancel; a row of one value gives the bias, up to
    the rounding of its mean. torch's own norm is another by a few roundings of fp32, relative to
    the largest of |d| and |mean(x)|: q then by one at most. Not differentiable.

    The results feed the linear ops as a `QuantizedRows`.

    Args:
        x: [..., K], float32, bfloat16 or float16; leading dimensions are flattened to M rows.
        weight, bias: [K], floating, or None.
        eps: what is added to the variance.

    Returns:
        As `rms_norm_quantize_rows`; a row whose squares overflow fp32 is the bias, one whose sum
        does gets scale NaN and q 0.

    Raises:
        ValueError: x is not floating, has no dimension, or K > 16909320; weight or bias has another
            shape.
    """
    return _layer_norm(x, weight, bias, eps)


def check_and_allocate_normed(
    op: str, x: Tensor, **parameters: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The results, unwritten, of arguments that the kernels take."""
    check_one_device(op, x, *parameters.values())
    result = check_and_allocate(op, x)
    for name, values in parameters.items():
        if values is not None and (values.dim() != 1 or values.shape[0] != x.shape[-1]):
            raise ValueError(
                f"{op}: {name} must have shape [{x.shape[-1]}], one value per column of x"
            )
    return result


@torch.library.register_fake("trine::rms_norm_quantize_rows")
def _fake_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return check_and_allocate_normed("rms_norm_quantize_rows", x, weight=weight)


@torch.library.register_fake("trine::layer_norm_quantize_rows")
def _fake_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return check_and_allocate_normed("layer_norm_quantize_rows", x, weight=weight, bias=bias)
