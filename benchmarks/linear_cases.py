"""The cases that every linear op runs: layers of a 2B-parameter language model, 1 to 512 rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Prepared, Work, rotate

# (N, K) of BitNet b1.58 2B: attention projections and the feed-forward layer; and a square 16M.
LAYERS = ((2560, 2560), (6912, 2560), (4096, 4096))
ROWS = (1, 8, 32, 128, 512)


@dataclass(frozen=True)
class LinearOp:
    """How to run a linear op on random weights, and what it must read and compute."""

    name: str
    variant: str
    weights: Callable[[int, int], tuple[Tensor, ...]]  # of n, k: all that comes from memory
    run: Callable[..., Tensor]  # of x and the weights
    reference: Callable[..., Tensor]
    tolerance: float  # largest error against the reference, norm-wise; 0 means equal bits
    bits_per_weight: float
    products: float  # multiplications per weight of the dense matrix
    integer: bool
    baseline_dtype: torch.dtype = torch.float32


def linear_cases(op: LinearOp) -> list[Case]:
    return [_case(op, m, n, k) for n, k in LAYERS for m in ROWS]


def _case(op: LinearOp, m: int, n: int, k: int) -> Case:
    def prepare() -> Prepared:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(m, k, generator=generator).to(op.baseline_dtype)
        weights = op.weights(n, k)
        ours = rotate(weights)
        dense = rotate((torch.randn(n, k, generator=generator).to(op.baseline_dtype),))
        return Prepared(
            ours=lambda: op.run(x, *next(ours)),
            baseline=lambda: F.linear(x, *next(dense)),
            check=lambda: _check(op, x, weights),
        )

    ops = round(2 * m * n * k * op.products)
    work = Work(
        bytes_read=round(n * k * op.bits_per_weight / 8),
        int8_ops=ops if op.integer else 0,
        fp32_ops=0 if op.integer else ops,
    )
    baseline = f"F.linear {str(op.baseline_dtype).removeprefix('torch.')}"
    return Case(op.name, op.variant, f"M={m} N={n} K={k}", baseline, work, prepare)


def _check(op: LinearOp, x: Tensor, weights: tuple[Tensor, ...]) -> None:
    x = x[:8]  # the reference is slow; rows do not depend on each other
    actual, expected = op.run(x, *weights).double(), op.reference(x, *weights).double()
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error <= op.tolerance, f"{op.name}: error {error:.2e} exceeds {op.tolerance:.2e}"
