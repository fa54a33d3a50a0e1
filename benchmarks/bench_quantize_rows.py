"""quantize_rows against the same steps written in PyTorch."""

import pytest
import torch
from torch import Tensor
from trine.ops import quantize_rows
from trine.ops.quantize_rows import reference

from benchmarks.case import Case, Prepared, Work, rotate, run_under_pytest

SHAPES = ((1, 2560), (32, 2560), (512, 2560), (512, 6912))


def _in_pytorch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    absmax = x.abs().amax(1)
    q = torch.round(x * (127.0 / absmax)[:, None]).to(torch.int8)
    return q, absmax / 127.0, q.sum(1, dtype=torch.int32)


def _case(m: int, k: int) -> Case:
    def prepare() -> Prepared:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
        inputs, same_inputs = rotate((x,)), rotate((x,))
        return Prepared(
            ours=lambda: quantize_rows(*next(inputs)),
            baseline=lambda: _in_pytorch(*next(same_inputs)),
            check=lambda: _check(x),
        )

    return Case("quantize_rows", "", f"M={m} K={k}", "eager fp32", Work(4 * m * k), prepare)


def _check(x: Tensor) -> None:
    for actual, expected in zip(quantize_rows(x), reference.quantize_rows(x), strict=True):
        assert torch.equal(actual, expected), "quantize_rows: differs from its reference"


CASES = [_case(m, k) for m, k in SHAPES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantize_rows(benchmark, case):
    run_under_pytest(benchmark, case)
