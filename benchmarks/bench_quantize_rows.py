"""quantize_rows against the same steps written in PyTorch."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from trine.ops import quantize_rows
from trine.ops.quantize_rows import reference

from benchmarks.case import Comparison, Contestant, WrongResult, cold, copies, hot, kernel_of
from benchmarks.ceilings import Work
from benchmarks.peers.loss import compiled

SHAPES = ((1, 2560), (8, 2560), (32, 2560), (512, 2560), (512, 6912))


def _in_pytorch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    absmax = x.abs().amax(1)
    q = torch.round(x * (127.0 / absmax)[:, None]).to(torch.int8)
    return q, absmax / 127.0, q.sum(1, dtype=torch.int32)


def _check(x: Tensor) -> None:
    for actual, expected in zip(quantize_rows(x), reference.quantize_rows(x), strict=True):
        if not torch.equal(actual, expected):
            raise WrongResult("quantize_rows differs from its definition")


def comparisons(threads: int, quick: bool) -> Iterator[Comparison]:
    peers = {"eager": _in_pytorch, "torch.compile": compiled(_in_pytorch)}
    for m, k in SHAPES[::2] if quick else SHAPES:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
        wrong, functions = {}, dict(peers)
        try:
            _check(x)
            functions = {"quantize_rows": quantize_rows, **peers}
        except WrongResult as reason:
            wrong["quantize_rows"] = str(reason)
        work = Work(bytes_moved=4 * m * k + m * k)  # reads floats, writes bytes
        for inputs in ("hot", "cold"):
            contestants = []
            for name, function in functions.items():
                calls = [partial(function, *args) for args in copies((x,))]
                timed = hot(calls) if inputs == "hot" else cold(calls)
                ours = function is quantize_rows
                about = dict(
                    op=name,
                    kernel=kernel_of("quantize_rows"),
                    rivals=tuple(peers),
                    baseline="eager",
                )
                contestants.append(Contestant(name, timed, work, None, **(about if ours else {})))
            yield Comparison({"M": m, "K": k}, inputs, contestants, wrong=wrong)


@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_quantize_rows(benchmark, m, k):
    x = torch.randn(m, k)
    _check(x)
    with torch.inference_mode():
        benchmark(quantize_rows, x)
