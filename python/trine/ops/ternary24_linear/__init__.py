"""Linear layer with 2:4-sparse weights in {-1, 0, 1} and int8 activations quantised inside."""

import torch
from torch import Tensor

from trine import _library  # noqa: F401  (registers the operator)
from trine.ops._checks import check_one_device, check_rows, explain_missing_kernel
from trine.ops._linear import in_autocast_dtype, linear_with_gradient, needs_grad
from trine.ops.ternary24_linear.pack import pack_ternary24, row_bytes, unpack_ternary24

__all__ = ["pack_ternary24", "ternary24_linear", "unpack_ternary24"]

_op = torch.ops.trine.ternary24_linear.default
explain_missing_kernel("ternary24_linear")

_MAX_K = 2**22  # kTernary24MaxK in ternary24_linear.h gives the reason


def ternary24_linear(
    x: Tensor, packed_weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiply `x` by a 2:4-sparse ternary weight: y = (acc * x_scale) * weight_scale + bias.

    Each row of x is quantised to int8 inside by its largest magnitude (see `quantize_rows`). The
    int32 sums are exact; scaling is in fp32 and rounds once to x's dtype, so every backend gives
    the bits of `ternary_linear` on the same dense weight, which takes two bits a weight where this
    takes one and a half. Gradients flow to x and bias (straight-through). It joins the weights of
    BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764) to the 2:4 sparsity of Mishra et al. 2021
    (arXiv:2104.08378).

    Args:
        x: [..., K], float32, bfloat16 or float16.
        packed_weight: uint8 [N, 16 * ceil(6 * ceil(K / 4) / 128)], from `pack_ternary24`.
        weight_scale: float32; one value ([] or [1]) or one per row ([N]).
        bias: [N], floating, or None.

    Returns:
        [..., N] in x's dtype (under autocast, in its dtype). A row of x that holds NaN or infinity
        gives a row of NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, K > 2**22 (int32 could overflow), a packed
            weight or scale that requires a gradient.
    """
    if not isinstance(x, Tensor):
        raise ValueError("ternary24_linear: x must be a tensor; give the one before quantisation")
    x = in_autocast_dtype(x)
    if needs_grad(x, bias, packed_weight, weight_scale):
        return linear_with_gradient(_run, _dense_weight, x, bias, packed_weight, weight_scale)
    return _op(x, packed_weight, weight_scale, bias)


def _run(x: Tensor, bias: Tensor | None, packed_weight: Tensor, weight_scale: Tensor) -> Tensor:
    return _op(x, packed_weight, weight_scale, bias)


def _dense_weight(k: int, packed_weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The dense float32 [N, K] that a packed weight and its scales stand for."""
    return unpack_ternary24(packed_weight, k) * weight_scale.reshape(-1, 1)


@torch.library.register_fake("trine::ternary24_linear")
def _fake(
    x: Tensor, packed_weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    check_one_device("ternary24_linear", x, packed_weight, weight_scale, bias)
    check_rows("ternary24_linear", x, _MAX_K)
    k = x.shape[-1]
    _check(packed_weight.dim() == 2, "packed_weight must be [N, 16 * ceil(6 * ceil(K / 4) / 128)]")
    n, width = packed_weight.shape
    _check(packed_weight.dtype == torch.uint8, "packed_weight must be uint8")
    _check(weight_scale.dtype == torch.float32, "weight_scale must be float32")
    _check(
        width == row_bytes(k),
        f"x has K = {k} columns, which does not fit a packed_weight of {width} columns",
    )
    _check(
        weight_scale.dim() <= 1 and weight_scale.numel() in (1, n),
        f"weight_scale must hold one value or [{n}] (one per row of packed_weight)",
    )
    if bias is not None:
        _check(
            bias.dim() == 1 and bias.shape[0] == n,
            f"bias must have shape [{n}], one value per output feature",
        )
    return x.new_empty(*x.shape[:-1], n)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"ternary24_linear: {message}")
