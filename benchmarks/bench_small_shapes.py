"""Small and odd shapes of the linear ops, each against the next aligned one: are there cliffs?"""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.bench_int8_linear import OPS as INT8
from benchmarks.bench_sparse24_linear import OPS as SPARSE24
from benchmarks.bench_ternary_linear import OPS as TERNARY
from benchmarks.case import Comparison, Contestant, WrongResult, hot, kernel_of
from benchmarks.linear_cases import LinearOp, check

ODD = (1, 17, 100, 1000)  # N or K, the other being
USUAL = 1024
SHAPES = [
    *((m, n, USUAL) for m in (1, 8) for n in ODD),
    *((m, USUAL, k) for m in (1, 8) for k in ODD),
    *((m, USUAL, USUAL) for m in (2, 3, 5, 7, 33)),
]


def aligned(m: int, n: int, k: int) -> tuple[int, int, int]:
    """Whole vectors of 64 columns and rows of the weight, whole tiles of 4 rows of activations."""
    return _up(m, 4) if m > 1 else 1, _up(n, 64), _up(k, 64)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def comparisons(threads: int, quick: bool) -> Iterator[Comparison]:
    for shape in SHAPES:
        yield _comparison(*shape)


@torch.inference_mode()
def _comparison(m: int, n: int, k: int) -> Comparison:
    contestants, wrong = [], {}
    for op in (*TERNARY, *INT8, *SPARSE24):
        try:
            at = _contestant(op, f"{op.name} aligned", *aligned(m, n, k))
            about = dict(op="small_shapes", kernel=kernel_of(op.op, op.values), baseline=at.name)
            contestants += [at, _contestant(op, op.name, m, n, k, **about)]
        except WrongResult as reason:
            wrong[op.name] = str(reason)
    return Comparison({"M": m, "N": n, "K": k}, "hot", contestants, wrong=wrong)


def _contestant(linear: LinearOp, name: str, m: int, n: int, k: int, **about) -> Contestant:
    generator = torch.Generator().manual_seed(0)
    packed = linear.pack(torch.randn(n, k, generator=generator) / k**0.5)
    x = torch.randn(m, k, generator=generator).to(linear.dtype)
    call = partial(linear.run, x, *packed.arguments)
    error = check(linear, packed, x, call())
    return Contestant(name, hot([call]), linear.work(m, n, k), error, **about)
