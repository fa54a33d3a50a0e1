"""sparse24_linear with fp32, bf16 and int8 values against a dense float linear layer."""

from functools import partial

import pytest
import torch
from torch import Tensor
from trine.ops import pack_sparse24, sparse24_linear
from trine.ops.sparse24_linear import reference

from benchmarks.case import run_under_pytest
from benchmarks.linear_cases import LinearOp, linear_cases

INDEX_BITS = 1  # a nibble for four weights


def _two_of_four(n: int, k: int) -> Tensor:
    """True at two random places of each four."""
    order = torch.rand(n, k // 4, 4).argsort(-1)
    return (order < 2).reshape(n, k)


def _float_weights(dtype: torch.dtype, n: int, k: int) -> tuple[Tensor, ...]:
    return pack_sparse24((torch.randn(n, k) * _two_of_four(n, k)).to(dtype))


def _int8_weights(n: int, k: int) -> tuple[Tensor, ...]:
    dense = torch.randint(-127, 128, (n, k), dtype=torch.int8) * _two_of_four(n, k)
    return *pack_sparse24(dense), torch.rand(n) / 64


def _run_int8(x: Tensor, values: Tensor, indices: Tensor, scale: Tensor) -> Tensor:
    return sparse24_linear(x, values, indices, weight_scale=scale)


def _reference_int8(x: Tensor, values: Tensor, indices: Tensor, scale: Tensor) -> Tensor:
    return reference.sparse24_linear(x, values, indices, weight_scale=scale)


def _float_op(variant: str, dtype: torch.dtype, tolerance: float) -> LinearOp:
    return LinearOp(
        name="sparse24_linear",
        variant=variant,
        weights=partial(_float_weights, dtype),
        run=sparse24_linear,
        reference=reference.sparse24_linear,
        tolerance=tolerance,
        bits_per_weight=torch.finfo(dtype).bits / 2 + INDEX_BITS,
        products=0.5,
        integer=False,
        baseline_dtype=dtype,
    )


CASES = [
    # fp32 sums of 1280 terms in another order than the reference's; one bf16 rounding
    *linear_cases(_float_op("fp32 values", torch.float32, tolerance=1e-5)),
    *linear_cases(_float_op("bf16 values", torch.bfloat16, tolerance=2.0**-8)),
    *linear_cases(
        LinearOp(
            name="sparse24_linear",
            variant="int8 values",
            weights=_int8_weights,
            run=_run_int8,
            reference=_reference_int8,
            tolerance=0.0,
            bits_per_weight=4 + INDEX_BITS,
            products=0.5,
            integer=True,
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse24_linear(benchmark, case):
    run_under_pytest(benchmark, case)
