"""quantize_rows, alone and fused with RMSNorm, against the same steps in PyTorch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trine.ops import quantize_rows, rms_norm_quantize_rows
from trine.ops.quantize_rows import reference
from trine.ops.rms_norm_quantize_rows import reference as norm_reference

from benchmarks.case import Comparison, Contestant, WrongResult, cold, copies, hot, kernel_of
from benchmarks.ceilings import Work
from benchmarks.peers.loss import compiled

SHAPES = ((1, 2560), (8, 2560), (32, 2560), (512, 2560), (512, 6912))
EPS = 1e-5

Rows = tuple[Tensor, Tensor, Tensor]


def _in_pytorch(x: Tensor) -> Rows:
    absmax = x.abs().amax(1)
    q = torch.round(x * (127.0 / absmax)[:, None]).to(torch.int8)
    return q, absmax / 127.0, q.sum(1, dtype=torch.int32)


def _norm_in_pytorch(x: Tensor, weight: Tensor) -> Rows:
    return _in_pytorch(F.rms_norm(x, weight.shape, weight, EPS))


def _norm_then_quantize_rows(x: Tensor, weight: Tensor) -> Rows:
    return quantize_rows(F.rms_norm(x, weight.shape, weight, EPS))


def _fused(x: Tensor, weight: Tensor) -> Rows:
    return rms_norm_quantize_rows(x, weight, EPS)


@dataclass(frozen=True)
class Op:
    name: str
    run: Callable[..., Rows]
    definition: Callable[..., Rows]
    peers: dict[str, Callable[..., Rows]]
    has_weight: bool  # [K], beside x

    def inputs(self, m: int, k: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(m, k, generator=generator)
        return (x, 1 + torch.randn(k, generator=generator) / 4) if self.has_weight else (x,)

    def check(self, inputs: tuple[Tensor, ...]) -> None:
        for actual, expected in zip(self.run(*inputs), self.definition(*inputs), strict=True):
            if not torch.equal(actual, expected):
                raise WrongResult(f"{self.name} differs from its definition")


OPS = (
    Op(
        "quantize_rows",
        quantize_rows,
        reference.quantize_rows,
        {"eager": _in_pytorch, "torch.compile": compiled(_in_pytorch)},
        False,
    ),
    Op(
        "rms_norm_quantize_rows",
        _fused,
        partial(norm_reference.rms_norm_quantize_rows, eps=EPS),
        {
            "norm eager": _norm_in_pytorch,
            "norm torch.compile": compiled(_norm_in_pytorch),
            "rms_norm, quantize_rows": _norm_then_quantize_rows,
        },
        True,
    ),
)


def comparisons(threads: int, quick: bool) -> Iterator[Comparison]:
    for op in OPS:
        for m, k in SHAPES[::2] if quick else SHAPES:
            yield from _compare(op, m, k)


def _compare(op: Op, m: int, k: int) -> Iterator[Comparison]:
    inputs = op.inputs(m, k)
    wrong, functions = {}, dict(op.peers)
    try:
        op.check(inputs)
        functions = {op.name: op.run, **functions}
    except WrongResult as reason:
        wrong[op.name] = str(reason)
    work = Work(bytes_moved=4 * m * k + m * k)  # reads floats, writes bytes
    for state in ("hot", "cold"):
        contestants = []
        for name, function in functions.items():
            calls = [partial(function, *args) for args in copies(inputs)]
            timed = hot(calls) if state == "hot" else cold(calls)
            about = dict(
                op=name,
                kernel=kernel_of(op.name),
                rivals=tuple(op.peers),
                baseline=next(iter(op.peers)),
            )
            ours = function is op.run
            contestants.append(Contestant(name, timed, work, None, **(about if ours else {})))
        yield Comparison({"M": m, "K": k}, state, contestants, wrong=wrong)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_quantize_rows(benchmark, op, m, k):
    inputs = op.inputs(m, k)
    op.check(inputs)
    with torch.inference_mode():
        benchmark(op.run, *inputs)
