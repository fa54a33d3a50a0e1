"""quantize_rows, alone and fused with RMSNorm or LayerNorm, against the same steps in PyTorch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trine.ops import layer_norm_quantize_rows, quantize_rows, rms_norm_quantize_rows
from trine.ops.norm_quantize_rows import reference as norm_reference
from trine.ops.quantize_rows import reference

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


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _then(norm: Callable[..., Tensor], quantize: Callable[[Tensor], Rows]) -> Callable[..., Rows]:
    return lambda *inputs: quantize(norm(*inputs))


def _with_eps(op: Callable[..., Rows]) -> Callable[..., Rows]:
    return lambda *inputs: op(*inputs, EPS)


@dataclass(frozen=True)
class Op:
    name: str
    run: Callable[..., Rows]
    definition: Callable[..., Rows]
    peers: dict[str, Callable[..., Rows]]
    parameters: int = 0  # tensors [K] beside x
    kernel: str = "norm_quantize_rows"  # the name of its table

    def inputs(self, m: int, k: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(m, k, generator=generator)
        return x, *(1 + torch.randn(self.parameters, k, generator=generator) / 4)

    def check(self, inputs: tuple[Tensor, ...]) -> None:
        for actual, expected in zip(self.run(*inputs), self.definition(*inputs), strict=True):
            if not torch.equal(actual, expected):
                raise WrongResult(f"{self.name} differs from its definition")


def _fused(op: Callable[..., Rows], norm: Callable[..., Tensor], name: str, parameters: int) -> Op:
    in_pytorch = _then(norm, _in_pytorch)
    peers = {
        "norm eager": in_pytorch,
        "norm torch.compile": compiled(in_pytorch),
        f"{name}, quantize_rows": _then(norm, quantize_rows),
    }
    definition = getattr(norm_reference, op.__name__)
    return Op(op.__name__, _with_eps(op), _with_eps(definition), peers, parameters)


OPS = (
    Op(
        "quantize_rows",
        quantize_rows,
        reference.quantize_rows,
        {"eager": _in_pytorch, "torch.compile": compiled(_in_pytorch)},
        kernel="quantize_rows",
    ),
    _fused(rms_norm_quantize_rows, _rms_norm, "rms_norm", 1),
    _fused(layer_norm_quantize_rows, _layer_norm, "layer_norm", 2),
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
                kernel=kernel_of(op.kernel),
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
