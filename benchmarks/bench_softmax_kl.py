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
# Relative to the larger of p and q: 8 roundings of fp32, to which those of the logits' differences
# and of the log of the sums may add up.
KINK = 2.0**-21

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


def cases(threads: int, quick: bool) -> Iterator[Case]:
    """Peers, which take most of the time, stand beside the losses that people use.

    With one thread eager PyTorch fills its fresh pages for so long that the largest shape and its
    peers alone would take several minutes: the other shapes tell as much.
    """
    shapes = SHAPES[:2] if threads == 1 else SHAPES
    for shape in SHAPES[:1] if quick else shapes:
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
    truth = _gradient(_of_peer(peers.eager, divergence), *wide)
    if divergence == "total_variation":
        truth = nearest_subgradient(actual, truth, *wide[:2], 1.0 if labels is None else 0.5)
    return relative_error(actual, truth)


def nearest_subgradient(
    actual: Tensor, truth: Tensor, student: Tensor, teacher: Tensor, share: float
) -> Tensor:
    """Total variation's gradient in float64, of those it has the one that `actual` means.

    The slope of |p - q| jumps from -1 to 1 where p = q, and of 65 million pairs a few agree to
    within the rounding of fp32: there a number of that precision cannot tell the side, and one
    such class out of 8 million makes an error of 7e-4. These classes may have either slope, or 0;
    the mean slope of their row, which all its classes feel, follows. No other class is excused.
    """
    with torch.inference_mode(False), torch.enable_grad():
        p = torch.softmax(student / TEMPERATURE, -1)
        q = torch.softmax(teacher / TEMPERATURE, -1)
        gap = (p - q).detach()
        per_slope = share * TEMPERATURE / (2 * len(p)) * p.detach()
        side = gap.sign()
        meant = (side + (actual.double() - truth) / per_slope).round().clamp(-1, 1)
        near = gap.abs() <= KINK * torch.maximum(p, q).detach()
        other_side = torch.where(near, meant - side, 0)
        soft = share * TEMPERATURE**2 / (2 * len(p)) * (other_side * p).sum()
        return truth + torch.autograd.grad(soft, student)[0]


def _check(case: Case, inputs: tuple[Tensor | None, ...]) -> float:
    error = _error(_ours(case.divergence), case.divergence, *inputs)
    # fp32: 1e-5 norm-wise; bf16: half a unit in the last place of each value
    limit = 1e-5 if case.kind == "fp32" else 2.0**-8
    if not error <= limit:
        raise WrongResult(f"the gradient's error {error:.2e} exceeds {limit:.2e}")
    return error


def comparisons(threads: int, quick: bool) -> Iterator[Comparison]:
    for case in cases(threads, quick):
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
    if case.labelled and case.divergence == "forward_kl":  # no rival: it shows what a teacher adds
        alone = hot([partial(_gradient, peers.cross_entropy, *inputs)])
        name = f"cross entropy alone, eager {case.kind}"
        contestants.append(Contestant(name, alone, work, None))
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
