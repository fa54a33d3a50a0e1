"""Who takes part in a comparison on the GPU: checked and recorded, or named with the reason."""

from collections.abc import Callable, Sequence

from torch import Tensor
from trine import backends

from benchmarks.case import Comparison, Contestant, WrongResult, copies, sentence
from benchmarks.ceilings import Work
from benchmarks.gpu import timing
from benchmarks.measure import Call

# A graph holds a call for each copy. What is so small that this many do not fill the L2 is an
# activation, which comes from there in a model, too.
MOST_COPIES = 256

# The calls to time, which do the same with memory of their own, and the first one's error.
Made = tuple[Sequence[Call], float | None]


def rotated_copies(tensors: tuple[Tensor, ...], rotated: int) -> list[tuple[Tensor, ...]]:
    """At least two: a single one would find its own end in the L2."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    return copies(tensors, min(max(rotated, 2 * size), MOST_COPIES * size))


def kernel_of(op: str) -> str:
    """What serves CUDA tensors: the files of the op's compiled kernels, or Triton."""
    # An op with a table for each kind of weight values has several entries.
    entry = next(entry for entry in backends.describe().ops if entry.op.split(" ")[0] == op)
    return ", ".join(entry.cuda_kernels)


class Entries:
    def __init__(self, shape: dict[str, int]) -> None:
        self.shape = shape
        self.contestants: list[Contestant] = []
        self.failures: dict[str, str] = {}
        self.wrong: dict[str, str] = {}

    def enter(
        self, name: str, work: Work, make: Callable[[], Made], in_graph: bool = True, **about
    ) -> None:
        """`about`: what a Contestant of ours says beside."""
        try:
            calls, error = make()
            recorded = timing.record(calls) if in_graph else timing.launched(calls)
            self.contestants.append(Contestant(name, recorded, work, error, **about))
        except WrongResult as reason:
            self.wrong[name] = str(reason)
        except Exception as reason:  # a peer's trouble of any kind is a row of the table; ours is
            (self.wrong if "op" in about else self.failures)[name] = sentence(reason)  # a failure

    def comparison(self) -> Comparison:
        return Comparison(
            self.shape, "cold", self.contestants, failures=self.failures, wrong=self.wrong
        )
