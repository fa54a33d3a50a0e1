"""The linear ops on the GPU: bf16 activations, a weight in every format, against the same peers."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from trine.ops import _triton_kernels
from trine.ops.int8_linear import reference

from benchmarks.case import (
    Bind,
    Comparison,
    WrongResult,
    copies_to_rotate,
    relative_error,
    sentence,
)
from benchmarks.gpu.entries import Entries, kernel_of, rotated_copies
from benchmarks.gpu.peers import PEERS
from benchmarks.linear_cases import LinearOp, Packed
from benchmarks.measure import Call
from benchmarks.peers import Peer

BASELINE = "nn.Linear bf16"
# Of floats, whose last bits are free: what rounding the result to bf16 costs.
MOST_ERROR = torch.finfo(torch.bfloat16).eps


def _in_triton(op: LinearOp, *arguments: Tensor) -> Tensor:
    return getattr(import_module(f"trine.ops.{op.op}.triton"), op.op)(*arguments)


class Layer:
    """One weight in every format, each as often as it takes to fill `rotated` bytes."""

    def __init__(
        self, ops: Sequence[LinearOp], n: int, k: int, rows: int, device: str, rotated: int
    ) -> None:
        self.n, self.k, self.rotated = n, k, rotated
        self.x = torch.randn(rows, k, device=device).bfloat16()
        self.weight = torch.randn(n, k, device=device) / k**0.5
        self.packed = {op: op.pack(self.weight) for op in ops}
        self.ours = {op: rotated_copies(p.arguments, rotated) for op, p in self.packed.items()}
        self.definitions: dict[LinearOp, Tensor] = {}
        self.made: dict[Peer, list[Bind] | str] = {}
        self.exact: dict[Callable, Tensor] = {}

    def _exact(self, peer: Peer) -> Tensor:
        """The product in float64 with the weight that the peer was given."""
        if peer.stands_for not in self.exact:
            weight = peer.stands_for(self.weight).double()
            self.exact[peer.stands_for] = self.x.double() @ weight.T
        return self.exact[peer.stands_for]

    @torch.inference_mode()
    def comparison(self, m: int, slow_start: bool) -> Comparison:
        """At `m` rows; `slow_start`: with Triton kernels and whatever takes seconds to start."""
        entries = Entries({"M": m, "N": self.n, "K": self.k})
        peers = [peer for peer in PEERS if slow_start or not peer.compiles]
        for op in self.packed:
            groups = ("bf16", "int8", "sparse")[: 3 if op.op == "sparse24_linear" else 2]
            rivals = tuple(peer.name for peer in peers if peer.group in groups)
            about = dict(op=op.op, rivals=rivals, baseline=BASELINE)
            work = op.work(m, self.n, self.k)
            run = partial(self._calls_of, op, m, op.run)
            entries.enter(op.name, work, run, kernel=kernel_of(op.op), **about)
            if slow_start and op.op in _triton_kernels.OPS:
                run = partial(self._calls_of, op, m, partial(_in_triton, op))
                entries.enter(f"{op.name} triton", work, run, kernel="triton", **about)
        for peer in peers:
            work = peer.work(m, self.n, self.k)
            entries.enter(peer.name, work, partial(self._calls_of_peer, peer, m))
        return entries.comparison()

    def _calls_of(self, op: LinearOp, m: int, run) -> tuple[list[Call], float]:
        x, packed = self.x[:m], self.packed[op]
        actual = run(x, *packed.arguments)
        error = relative_error(actual, x.double() @ packed.dense().T)
        if packed.scale is None:
            if not error < MOST_ERROR:
                raise WrongResult(f"the error is {error:.2g}")
        elif not torch.equal(actual, expected := self._definition(op, packed)[:m]):
            different = int((actual != expected).sum())
            raise WrongResult(f"{different} of {actual.numel()} values differ from the definition")
        return [partial(run, x, *arguments) for arguments in self.ours[op]], error

    def _definition(self, op: LinearOp, packed: Packed) -> Tensor:
        """Every bit of the result at all rows, which do not depend on each other."""
        if op not in self.definitions:
            self.definitions[op] = reference.int8_linear(self.x, packed.values, packed.scale)
        return self.definitions[op]

    def _calls_of_peer(self, peer: Peer, m: int) -> tuple[list[Call], float]:
        if peer not in self.made:
            count = max(2, copies_to_rotate(peer.work(0, self.n, self.k).bytes_moved, self.rotated))
            try:
                self.made[peer] = peer.make(self.weight, count, 0)
            except Exception as reason:
                self.made[peer] = sentence(reason)
        binds = self.made[peer]
        if isinstance(binds, str):
            raise RuntimeError(binds)
        calls = [bind(self.x[:m]) for bind in binds]
        error = relative_error(calls[0](), self._exact(peer)[:m])
        if not error < 0.1:
            raise RuntimeError(f"its result is wrong: the error is {error:.2g}")
        return calls, error
