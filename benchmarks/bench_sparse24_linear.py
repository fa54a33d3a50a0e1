"""sparse24_linear with fp32, bf16 and int8 values at the shapes of language models."""

from functools import partial

import pytest
import torch
from torch import Tensor
from trine.ops import pack_sparse24, sparse24_linear
from trine.quantize.weights import sparse24, sparse24_int8

from benchmarks.linear_cases import LinearOp, Packed, pytest_cases, run_under_pytest

INDEX_BITS = 1  # a nibble for four weights


def _pack_float(dtype: torch.dtype, weight: Tensor) -> Packed:
    kept, _ = sparse24(weight.to(dtype))
    return Packed(pack_sparse24(kept), kept)


def _pack_int8(weight: Tensor) -> Packed:
    codes, scale = sparse24_int8(weight)
    return Packed((*pack_sparse24(codes), scale), codes, scale)


def _run_int8(x: Tensor, values: Tensor, indices: Tensor, scale: Tensor) -> Tensor:
    return sparse24_linear(x, values, indices, weight_scale=scale)


def _float_op(variant: str, dtype: torch.dtype, **judged) -> LinearOp:
    return LinearOp(
        op="sparse24_linear",
        variant=variant,
        pack=partial(_pack_float, dtype),
        run=sparse24_linear,
        bits_per_weight=torch.finfo(dtype).bits / 2 + INDEX_BITS,
        products=0.5,
        dtype=dtype,
        **judged,
    )


OPS = [
    LinearOp(
        op="sparse24_linear",
        variant="int8",
        pack=_pack_int8,
        run=_run_int8,
        bits_per_weight=4 + INDEX_BITS,
        products=0.5,
        rivals=("fp32", "bf16", "int8"),
    ),
    _float_op("fp32", torch.float32, rivals=("fp32", "sparse")),
    _float_op("bf16", torch.bfloat16, rivals=("bf16",), baseline="nn.Linear bf16"),
]


@pytest.mark.parametrize("case", pytest_cases(OPS), ids=str)
def test_sparse24_linear(benchmark, case):
    run_under_pytest(benchmark, case)
