"""ternary_linear against a float linear layer."""

import pytest
import torch
from torch import Tensor
from trine.ops import pack_ternary, ternary_linear
from trine.ops.ternary_linear import reference

from benchmarks.case import run_under_pytest
from benchmarks.linear_cases import LinearOp, linear_cases


def _weights(n: int, k: int) -> tuple[Tensor, ...]:
    return pack_ternary(torch.randint(-1, 2, (n, k), dtype=torch.int8)), torch.rand(1) / 64


CASES = linear_cases(
    LinearOp(
        name="ternary_linear",
        variant="",
        weights=_weights,
        run=ternary_linear,
        reference=reference.ternary_linear,
        tolerance=0.0,
        bits_per_weight=2,
        products=1,
        integer=True,
    )
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ternary_linear(benchmark, case):
    run_under_pytest(benchmark, case)
