"""What is compared: contestants for one piece of work, ours and others', checked before timing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor
from trine import _C, backends

from benchmarks.ceilings import Work
from benchmarks.measure import Call, Timed

# A model visits each layer once per pass, so a layer's weights come from memory, not from a cache.
# "Cold" rotates them through this many bytes: more than the last-level cache of common servers.
ROTATED_BYTES = 192 << 20

Bind = Callable[[Tensor], Call]  # of an input: the call that runs a layer on it


class WrongResult(Exception):
    """A kernel of ours computes something else than its definition: it is not timed."""


@dataclass(frozen=True)
class Contestant:
    name: str
    timed: object  # what the timer takes: measure.Timed, or for a GPU timing.Recorded
    work: Work
    error: float | None  # norm-wise against float64, of the result with the weights it was given
    op: str | None = None  # ours: the op; None: a peer
    kernel: str = ""
    rivals: tuple[str, ...] = ()  # ours: the peers it is judged by
    baseline: str = ""  # ours: the float PyTorch that every row is compared with


@dataclass(frozen=True)
class Comparison:
    """Contestants timed in turns. `failures`: who is not among them, and the reason."""

    shape: dict[str, int]
    weights: str  # "hot": the same each call; "cold": from memory
    contestants: Sequence[Contestant]
    mode: Callable[[], AbstractContextManager] = torch.inference_mode
    failures: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)  # our kernels that were refused


def copies_to_rotate(size: int, rotated: int = ROTATED_BYTES) -> int:
    return max(1, -(-rotated // max(size, 1)))


def copies(tensors: tuple[Tensor, ...], rotated: int = ROTATED_BYTES) -> list[tuple[Tensor, ...]]:
    """Equal copies of `tensors`, together at least `rotated` bytes."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    return [tuple(t.clone() for t in tensors) for _ in range(copies_to_rotate(size, rotated))]


def hot(calls: Sequence[Call]) -> Timed:
    """The same weights each time; the first call, untimed, brings them back into the caches."""
    return Timed(calls[0], before=calls[0])


def cold(calls: Sequence[Call]) -> Timed:
    """The weights of each of `calls` in turn; where there is but one, other memory is read before
    each time instead."""
    if len(calls) > 1:
        turns: Iterator[Call] = cycle(calls)
        return Timed(lambda: next(turns)(), before=lambda: next(turns)())
    return Timed(calls[0], before=_empty_caches, repeatable=False)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm-wise; `expected` is float64."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def kernel_of(op: str, values: str = "") -> str:
    """The kernel in force. An op with a table for each kind of weight values has several."""
    kernels = {entry.op: entry.kernel for entry in backends.describe().ops}
    return kernels.get(op) or kernels[f"{op} ({values} values)"]


def sentence(error: Exception) -> str:
    """Why a peer did not run, short enough for a table."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:160]


_other_memory: list[Tensor] = []


def _empty_caches() -> None:
    if not _other_memory:
        _other_memory.append(torch.ones(ROTATED_BYTES, dtype=torch.uint8))
    _C.read_memory(_other_memory[0].data_ptr(), ROTATED_BYTES, 4, 0)
