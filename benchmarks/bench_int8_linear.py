"""int8_linear at the shapes of language models."""

import pytest
from torch import Tensor
from trine.ops import int8_linear, pack_int8
from trine.quantize.weights import int8_absmax

from benchmarks.linear_cases import LinearOp, Packed, pytest_cases, run_under_pytest


def _pack(weight: Tensor) -> Packed:
    codes, scale = int8_absmax(weight)
    return Packed((pack_int8(codes), scale), codes, scale)


OPS = [
    LinearOp(
        op="int8_linear",
        variant="",
        pack=_pack,
        run=int8_linear,
        bits_per_weight=8,
        products=1,
        rivals=("fp32", "bf16", "int8"),
    )
]


@pytest.mark.parametrize("case", pytest_cases(OPS), ids=str)
def test_int8_linear(benchmark, case):
    run_under_pytest(benchmark, case)
