"""int8_weight_linear with fp32 and bf16 activations at the shapes of language models."""

from functools import partial

import pytest
import torch
from torch import Tensor
from trine.ops import int8_weight_linear, pack_int8
from trine.quantize.weights import dense, int8_absmax

from benchmarks.linear_cases import LinearOp, Packed, pytest_cases, run_under_pytest


def _pack(group: int | None, weight: Tensor) -> Packed:
    codes, scale = int8_absmax(weight, group)
    return Packed((pack_int8(codes), scale), dense(codes.double(), scale.double()))


def _op(variant: str, dtype: torch.dtype, baseline: str, group: int | None = None) -> LinearOp:
    return LinearOp(
        op="int8_weight_linear",
        variant=variant,
        pack=partial(_pack, group),
        run=int8_weight_linear,
        bits_per_weight=8 if group is None else 8 + 32 / group,
        products=1,
        rivals=("fp32", "bf16", "int8 weight"),
        baseline=baseline,
        dtype=dtype,
    )


OPS = [
    _op("fp32", torch.float32, "nn.Linear fp32"),
    _op("bf16", torch.bfloat16, "nn.Linear bf16"),
    _op("bf16 g64", torch.bfloat16, "nn.Linear bf16", group=64),
]


@pytest.mark.parametrize("case", pytest_cases(OPS), ids=str)
def test_int8_weight_linear(benchmark, case):
    run_under_pytest(benchmark, case)
