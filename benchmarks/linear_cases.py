"""What every linear op runs: layers of language models, 1 to 512 rows, against the same peers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from trine.ops.int8_linear import reference as int8_reference

from benchmarks.case import (
    Bind,
    Comparison,
    Contestant,
    WrongResult,
    cold,
    copies,
    copies_to_rotate,
    hot,
    kernel_of,
    relative_error,
    sentence,
)
from benchmarks.ceilings import Work
from benchmarks.measure import Call
from benchmarks.peers import PEERS, Peer

# (N, K): the attention projections and the feed-forward layer of BitNet b1.58 2B, and a 4k square.
LAYERS = ((2560, 2560), (4096, 4096), (6912, 2560))
ROWS = (1, 8, 32, 128, 512)


@dataclass(frozen=True)
class Packed:
    arguments: tuple[Tensor, ...]  # of the op, after x: all that comes from memory
    values: Tensor  # dense [N, K]: int8 codes, or floats
    scale: Tensor | None = None  # of the codes, [N] or [1]

    def dense(self) -> Tensor:
        """What the packed weight stands for, float64."""
        values = self.values.double()
        return values if self.scale is None else values * self.scale.double()[:, None]


@dataclass(frozen=True)
class LinearOp:
    """How to run a linear op, what it must read and compute, and whom it must beat."""

    op: str
    variant: str
    pack: Callable[[Tensor], Packed]  # of a dense weight, float32 [N, K]
    run: Callable[..., Tensor]  # of x and the packed arguments
    bits_per_weight: float
    products: float  # multiplications per weight of the dense matrix
    rivals: tuple[str, ...]  # groups of peers
    baseline: str = "nn.Linear fp32"
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant}".strip()

    @property
    def values(self) -> str:
        """The kind of weight values, as an op with a kernel table for each names them."""
        return "int8" if "int8" in self.rivals else "float"

    def work(self, m: int, n: int, k: int) -> Work:
        ops = round(2 * m * n * k * self.products)
        read = round(n * k * self.bits_per_weight / 8)
        return Work(read, int8_ops=ops) if self.values == "int8" else Work(read, fp32_ops=ops)


def comparisons(
    ops: Sequence[LinearOp],
    layer: tuple[int, int],
    rows: Sequence[int],
    threads: int,
    quick: bool,
) -> Iterator[Comparison]:
    """Every op and every peer that one of them is judged by, at each row count, hot and cold."""
    contestants = Layer(ops, *layer, max(rows), threads, quick)
    for m in rows:
        yield from contestants.comparisons(m)


class Layer:
    """One weight in every format, as often as it takes to fill ROTATED_BYTES."""

    def __init__(
        self, ops: Sequence[LinearOp], n: int, k: int, rows: int, threads: int, quick: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.n, self.k = n, k
        self.x = torch.randn(rows, k, generator=generator)
        self.weight = torch.randn(n, k, generator=generator) / k**0.5
        self.packed = {op: op.pack(self.weight) for op in ops}
        self.ours = {op: copies(packed.arguments) for op, packed in self.packed.items()}
        groups = {group for op in ops for group in op.rivals} | {"fp32"}
        self.peers: dict[Peer, list[Bind]] = {}
        self.failures: dict[str, str] = {}
        self.exact: dict[Callable, Tensor] = {}
        for peer in (peer for peer in PEERS if peer.group in groups):
            if peer.compiles and quick:
                self.failures[peer.name] = "left out: compiling it takes too long for --quick"
                continue
            try:
                count = copies_to_rotate(peer.work(0, n, k).bytes_moved)
                self.peers[peer] = peer.make(self.weight, count, threads)
            except Exception as error:  # a peer's trouble of any kind is a row of the table
                self.failures[peer.name] = sentence(error)

    def _exact(self, peer: Peer) -> Tensor:
        """The product in float64, of all rows, with the weight that the peer was given."""
        if peer.stands_for not in self.exact:
            weight = peer.stands_for(self.weight).double()
            self.exact[peer.stands_for] = self.x.double() @ weight.T
        return self.exact[peer.stands_for]

    @torch.inference_mode()
    def comparisons(self, m: int) -> list[Comparison]:
        """Hot and cold, of all whose result at `m` rows is right."""
        contestants: dict[str, list[Contestant]] = {"hot": [], "cold": []}
        failures, wrong = dict(self.failures), {}

        def enter(name: str, calls: Sequence[Call], work: Work, error: float, **about) -> None:
            for weights, timed in (("hot", hot(calls)), ("cold", cold(calls))):
                contestants[weights].append(Contestant(name, timed, work, error, **about))

        for op, packed in self.packed.items():
            x = self.x[:m].to(op.dtype)
            calls = [partial(op.run, x, *arguments) for arguments in self.ours[op]]
            try:
                error = check(op, packed, x, calls[0]())
            except WrongResult as reason:
                wrong[op.name] = str(reason)
                continue
            kernel = kernel_of(op.op, op.values)
            rivals = tuple(peer.name for peer in self.peers if peer.group in op.rivals)
            about = dict(op=op.op, kernel=kernel, rivals=rivals, baseline=op.baseline)
            enter(op.name, calls, op.work(m, self.n, self.k), error, **about)
        for peer, binds in self.peers.items():
            try:
                calls = [bind(self.x[:m]) for bind in binds]
                error = relative_error(calls[0](), self._exact(peer)[:m])
            except Exception as reason:
                failures[peer.name] = sentence(reason)
                continue
            enter(peer.name, calls, peer.work(m, self.n, self.k), error)
        shape = {"M": m, "N": self.n, "K": self.k}
        return [
            Comparison(shape, weights, entered, failures=failures, wrong=wrong)
            for weights, entered in contestants.items()
        ]


def check(op: LinearOp, packed: Packed, x: Tensor, actual: Tensor) -> float:
    """The error against float64; raises WrongResult where it is more than the op may make."""
    if packed.scale is not None:  # integer ops: every bit is fixed
        expected = int8_reference.int8_linear(x, packed.values, packed.scale)
        if not torch.equal(actual, expected):
            different = int((actual != expected).sum())
            raise WrongResult(f"{different} of {actual.numel()} values differ from the definition")
        return relative_error(actual, x.double() @ packed.dense().T)
    wide, dense = x.double(), packed.dense()
    expected = wide @ dense.T
    # Rounding errors of sqrt(K) independent fp32 steps, and one rounding to the result's dtype.
    sums = 4 * torch.finfo(torch.float32).eps * x.shape[1] ** 0.5 * (wide.abs() @ dense.abs().T)
    limit = sums + torch.finfo(actual.dtype).eps / 2 * expected.abs()
    excess = ((actual.double() - expected).abs() / limit).max().item()
    if not excess <= 1:  # NaN is wrong too
        raise WrongResult(f"the largest error is {excess:.1f} times what the op may make")
    return relative_error(actual, expected)


@dataclass(frozen=True)
class PytestCase:
    op: LinearOp
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.op.name} M={self.m} N={self.n} K={self.k}"


def pytest_cases(ops: Sequence[LinearOp]) -> list[PytestCase]:
    return [PytestCase(op, m, n, k) for op in ops for n, k in LAYERS for m in ROWS]


def run_under_pytest(benchmark, case: PytestCase) -> None:
    """The body of every pytest-benchmark test: cold weights; a wrong kernel is never timed."""
    packed = case.op.pack(torch.randn(case.n, case.k) / case.k**0.5)
    x = torch.randn(case.m, case.k).to(case.op.dtype)
    calls = [partial(case.op.run, x, *args) for args in copies(packed.arguments)]
    check(case.op, packed, x, calls[0]())
    with torch.inference_mode():
        benchmark(cold(calls).call)
