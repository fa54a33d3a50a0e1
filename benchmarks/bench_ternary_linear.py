"""ternary_linear at the shapes of language models."""

import pytest
from torch import Tensor
from trine.ops import pack_ternary, ternary_linear
from trine.quantize.weights import ternary_absmean

from benchmarks.linear_cases import LinearOp, Packed, pytest_cases, run_under_pytest


def _pack(weight: Tensor) -> Packed:
    codes, scale = ternary_absmean(weight)
    return Packed((pack_ternary(codes), scale), codes, scale)


OPS = [
    LinearOp(
        op="ternary_linear",
        variant="",
        pack=_pack,
        run=ternary_linear,
        bits_per_weight=2,
        products=1,
        rivals=("fp32", "bf16", "int8", "ternary"),
    )
]


@pytest.mark.parametrize("case", pytest_cases(OPS), ids=str)
def test_ternary_linear(benchmark, case):
    run_under_pytest(benchmark, case)
