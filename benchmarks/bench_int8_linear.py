"""int8_linear against a float linear layer."""

import pytest
import torch
from torch import Tensor
from trine.ops import int8_linear, pack_int8
from trine.ops.int8_linear import reference

from benchmarks.case import run_under_pytest
from benchmarks.linear_cases import LinearOp, linear_cases


def _weights(n: int, k: int) -> tuple[Tensor, ...]:
    return pack_int8(torch.randint(-127, 128, (n, k), dtype=torch.int8)), torch.rand(n) / 64


CASES = linear_cases(
    LinearOp(
        name="int8_linear",
        variant="",
        weights=_weights,
        run=int8_linear,
        reference=reference.int8_linear,
        tolerance=0.0,
        bits_per_weight=8,
        products=1,
        integer=True,
    )
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8_linear(benchmark, case):
    run_under_pytest(benchmark, case)
