"""Linear layer whose weight holds at most two non-zeros in four columns (2:4 sparsity)."""

import torch
from torch import Tensor

from trine import _library  # noqa: F401  (registers the operator)
from trine.ops._checks import check_one_device, check_rows, explain_missing_kernel
from trine.ops._linear import in_autocast_dtype, linear_with_gradient, needs_grad
from trine.ops.sparse24_linear.pack import (
    DTYPES,
    expand_sparse24,
    pack_sparse24,
    unpack_sparse24,
)
from trine.ops.sparse24_linear.semi_structured import from_semi_structured, to_semi_structured

__all__ = [
    "from_semi_structured",
    "pack_sparse24",
    "sparse24_linear",
    "to_semi_structured",
    "unpack_sparse24",
]

_op = torch.ops.trine.sparse24_linear.default
explain_missing_kernel("sparse24_linear")

_MAX_K_INT8 = 131072  # kSparse24Int8MaxK in sparse24_linear.h gives the reason


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Multiply `x` by a 2:4-sparse weight (Mishra et al. 2021, arXiv:2104.08378).

    With float values, y = x @ weight.T + bias in fp32, rounded once to x's dtype; the order of the
    sum, and so the last bits, depend on the instruction set and on the number of rows, not on the
    number of threads. Where the processor has AVX512-BF16, bf16 values and eight or more rows of
    bf16 x are multiplied by it, and it takes subnormal numbers for 0. With int8 values, x is
    quantised per row (see `quantize_rows`) and the result has the bits of `int8_linear` on the
    dense weight, on every backend. Gradients flow to x and bias (exact with float values,
    straight-through with int8).

    Only the columns of x that are stored are read: NaN or infinity in another column does not reach
    the output with float values. One in a stored column does, also where the stored value is 0.

    Args:
        x: [..., K], float32, bfloat16 or float16; with float values on CUDA, of their dtype.
        values: [N, 16 * ceil(K / 32)], float32 (on the CPU only), bfloat16, float16 or int8, from
            `pack_sparse24`.
        indices: uint8 [N, 4 * ceil(K / 32)], from `pack_sparse24`. They are not checked for
            damage: a nibble whose two positions do not ascend gives a wrong number.
        bias: [N], floating, or None.
        weight_scale: float32 [N], with int8 values, and only with them.

    Returns:
        [..., N] in x's dtype (under autocast, in its dtype). With int8 values, a row of x that
        holds NaN or infinity gives a row of NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, int8 values with K > 131072 (int32 could
            overflow), values or weight_scale that require a gradient, float32 values on a GPU,
            float values of another dtype than x's on CUDA.
    """
    if not isinstance(x, Tensor):
        raise ValueError("sparse24_linear: x must be a tensor; give it the one before quantisation")
    x = in_autocast_dtype(x)
    if needs_grad(x, bias, values, indices, weight_scale):
        return linear_with_gradient(_run, _dense_weight, x, bias, values, indices, weight_scale)
    return _op(x, values, indices, bias, weight_scale=weight_scale)


def _run(
    x: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, weight_scale: Tensor | None
) -> Tensor:
    return _op(x, values, indices, bias, weight_scale=weight_scale)


def _dense_weight(k: int, values: Tensor, indices: Tensor, weight_scale: Tensor | None) -> Tensor:
    """The dense float32 [N, K] that the stored values and their scales stand for."""
    dense = expand_sparse24(values, indices, k).float()
    return dense if weight_scale is None else dense * weight_scale[:, None]


@torch.library.register_fake("trine::sparse24_linear")
def _fake(x, values, indices, bias=None, *, weight_scale=None):
    check_one_device("sparse24_linear", x, values, indices, bias, weight_scale)
    check_rows("sparse24_linear", x, None if weight_scale is None else _MAX_K_INT8)
    k = x.shape[-1]
    chunks = (k + 31) // 32
    _check(values.dim() == 2, "values must be [N, 16 * ceil(K / 32)]")
    n, columns = values.shape
    _check(
        columns == 16 * chunks,
        f"x has K = {k} columns, which does not fit values of {columns} columns",
    )
    _check(
        indices.dtype == torch.uint8
        and indices.dim() == 2
        and indices.shape[0] == n
        and indices.shape[1] == 4 * chunks,
        f"indices must be uint8 [{n}, {4 * chunks}], four bytes for every 16 values",
    )
    _check(values.dtype in DTYPES, "values must be float32, bfloat16, float16 or int8")
    _check(
        (values.dtype == torch.int8) == (weight_scale is not None),
        "weight_scale goes with int8 values, and only with them",
    )
    _check(
        weight_scale is None or (weight_scale.dim() == 1 and weight_scale.shape[0] == n),
        f"weight_scale must be [{n}], one scale per row of values",
    )
    _check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == n),
        f"bias must have shape [{n}], one value per output feature",
    )
    return x.new_empty(*x.shape[:-1], n)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"sparse24_linear: {message}")
