"""ternary24_linear at the shapes of language models."""

import pytest
from torch import Tensor
from trine.ops import pack_ternary24, ternary24_linear
from trine.quantize.weights import ternary24_absmean

from benchmarks.linear_cases import LinearOp, Packed, pytest_cases, run_under_pytest


def _pack(weight: Tensor) -> Packed:
    codes, scale = ternary24_absmean(weight)
    return Packed((pack_ternary24(codes), scale), codes, scale)


OPS = [
    LinearOp(
        op="ternary24_linear",
        variant="",
        pack=_pack,
        run=ternary24_linear,
        bits_per_weight=1.5,
        products=0.5,
        rivals=("fp32", "bf16", "int8", "ternary"),
    )
]


@pytest.mark.parametrize("case", pytest_cases(OPS), ids=str)
def test_ternary24_linear(benchmark, case):
    run_under_pytest(benchmark, case)
