"""softmax_kl, forward and backward, against the loss written in PyTorch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from trine.ops import softmax_kl
from trine.ops.softmax_kl.reference import DIVERGENCES

from benchmarks.case import (
    Comparison,
    Contestant,
    WrongResult,
    hot,
    kernel_of,
    relative_error,
    sentence,
)
from benchmarks.ceilings import Work
from benchmarks.peers import loss as peers

# (rows, classes): ImageNet's classes, the vocabularies of Llama 2 and 3
SHAPES = ((4096, 1000), (1024, 32000), (512, 128256))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURE = 2.0

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    divergence: str = "forward_kl"
    kind: str = "fp32"
    labelled: bool = False
    with_peers: bool = False

    def __str__(self) -> str:
        labels = " + cross-entropy" if self.labelled else ""
        return f"{self.kind} {self.divergence}{labels}"


def cases(quick: bool) -> Iterator[Case]:
    """Peers, which take most of the time, stand beside the losses that people use."""
    for shape in SHAPES[:1] if quick else SHAPES:
        for divergence in DIVERGENCES:
            common = divergence in ("forward_kl", "reverse_kl", "jsd")
            if quick and not common:
                continue
            yield Case(*shape, divergence, labelled=True, with_peers=common)
            yield Case(*shape, divergence, with_peers=divergence == "forward_kl" and not quick)
        yield Case(*shape, kind="bf16", labelled=True, with_peers=not quick)
        yield Case(*shape, kind="bf16")


def _ours(divergence: str) -> Loss:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return softmax_kl(student, teacher, TEMPERATURE, divergence=divergence, labels=labels)

    return loss


def _of_peer(function: Callable[..., Tensor], divergence: str) -> Loss:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return function(student, teacher, labels, TEMPERATURE, divergence)

    return loss


def _gradient(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        return torch.autograd.grad(loss(student, teacher, labels), student)[0]


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    size = case.rows, case.classes
    student, teacher = (torch.randn(size, generator=generator) for _ in range(2))
    labels = torch.randint(case.classes, size[:1], generator=generator) if case.labelled else None
    dtype = DTYPES[case.kind]
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels


def _error(loss: Loss, divergence: str, *inputs: Tensor | None) -> float:
    """Of the gradient at some rows, norm-wise against float64."""
    student, teacher, labels = (None if z is None else z[:64].detach() for z in inputs)
    actual = _gradient(loss, student.clone().requires_grad_(), teacher, labels)
    wide = student.double().requires_grad_(), teacher.double(), labels
    return relative_error(actual, _gradient(_of_peer(peers.eager, divergence), *wide))


def _check(case: Case, inputs: tuple[Tensor | None, ...]) -> float:
    error = _error(_ours(case.divergence), case.divergence, *inputs)
    # fp32: 1e-5 norm-wise; bf16: half a unit in the last place of each value
    limit = 1e-5 if case.kind == "fp32" else 2.0**-8
    if not error <= limit:
        raise WrongResult(f"the gradient's error {error:.2e} exceeds {limit:.2e}")
    return error


def comparisons(threads: int, quick: bool) -> Iterator[Comparison]:
    for case in cases(quick):
        yield _comparison(case)


def _comparison(case: Case) -> Comparison:
    inputs = _inputs(case)
    # Both rows of logits are read and a gradient is written, however it is done.
    work = Work(bytes_moved=3 * case.rows * case.classes * DTYPES[case.kind].itemsize)
    contestants, failures, wrong = [], {}, {}
    others = (
        {"eager": peers.eager, "torch.compile": peers.compiled(peers.eager)}
        if case.with_peers
        else {}
    )

    def enter(name: str, loss: Loss, error: float, **about) -> None:
        timed = hot([partial(_gradient, loss, *inputs)])
        contestants.append(Contestant(f"{name} {case}", timed, work, error, **about))

    try:
        about = dict(op="softmax_kl", kernel=kernel_of("softmax_kl"))
        if others:
            rivals = tuple(f"{name} {case}" for name in others)
            about |= dict(rivals=rivals, baseline=f"eager {case}")
        enter("softmax_kl", _ours(case.divergence), _check(case, inputs), **about)
    except WrongResult as reason:
        wrong[f"softmax_kl {case}"] = str(reason)
    for name, function in others.items():
        loss = _of_peer(function, case.divergence)
        try:
            enter(name, loss, _error(loss, case.divergence, *inputs))
        except Exception as reason:  # a peer's trouble of any kind is a row of the table
            failures[f"{name} {case}"] = sentence(reason)
    shape = {"rows": case.rows, "classes": case.classes}
    return Comparison(shape, "", contestants, failures=failures, wrong=wrong)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_softmax_kl(benchmark, shape, kind, divergence):
    case = Case(*shape, divergence, kind, labelled=True)
    inputs = _inputs(case)
    _check(case, inputs)
    benchmark(_gradient, _ours(divergence), *inputs)
