"""A benchmark case: one op at one shape, with a float baseline and the work that it must do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

# A model visits each layer once per pass, so a layer's weights come from memory, not from a cache.
# Weights are rotated through this many bytes: more than the last-level cache of common servers.
ROTATED_BYTES = 192 << 20


@dataclass(frozen=True)
class Work:
    """The least that any implementation of a case must do."""

    bytes_read: int
    int8_ops: int = 0  # multiplications and additions of int8 dot products
    fp32_ops: int = 0


@dataclass(frozen=True)
class Prepared:
    """A case with its data in memory, ready to run."""

    ours: Callable[[], object]
    baseline: Callable[[], object]
    check: Callable[[], None]  # raises AssertionError where our result is wrong


@dataclass(frozen=True)
class Case:
    op: str
    variant: str  # what distinguishes it from the op's other cases, such as the dtype
    shape: str
    baseline: str
    work: Work
    prepare: Callable[[], Prepared]

    def __str__(self) -> str:
        return f"{self.op} {self.variant} {self.shape}".replace("  ", " ")


def run_under_pytest(benchmark, case: Case) -> None:
    """The body of every pytest-benchmark test: a wrong kernel is never timed."""
    prepared = case.prepare()
    prepared.check()
    with torch.inference_mode():
        benchmark(prepared.ours)


def rotate(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Equal copies of `tensors` in turn, together at least ROTATED_BYTES, for ever."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    copies = -(-ROTATED_BYTES // max(size, 1))
    return cycle([tuple(t.clone() for t in tensors) for _ in range(copies)])
