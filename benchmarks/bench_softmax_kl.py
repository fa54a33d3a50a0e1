"""softmax_kl, forward and backward, against the loss written in PyTorch."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from trine.ops import softmax_kl

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
from benchmarks.peers.loss import EAGER, PEERS

SHAPES = ((4096, 1000), (1024, 32000))  # (rows, classes): ImageNet's classes, Llama's vocabulary
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURE = 2.0

Loss = Callable[[Tensor, Tensor, float], Tensor]


def _gradient(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        return torch.autograd.grad(loss(student, teacher, TEMPERATURE), student)[0]


def _logits(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, classes, generator=generator) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def _error(loss: Loss, student: Tensor, teacher: Tensor, divergence: str) -> float:
    """Of the gradient at some rows, norm-wise against float64."""
    part = slice(0, 64)
    student, teacher = student[part].detach(), teacher[part]
    actual = _gradient(loss, student.clone().requires_grad_(), teacher)
    expected = _gradient(EAGER[divergence], student.double().requires_grad_(), teacher.double())
    return relative_error(actual, expected)


def _check(student: Tensor, teacher: Tensor, divergence: str) -> float:
    error = _error(partial(softmax_kl, divergence=divergence), student, teacher, divergence)
    # fp32: 1e-5 norm-wise; bf16: half a unit in the last place of each value
    limit = 1e-5 if student.dtype == torch.float32 else 2.0**-8
    if not error <= limit:
        raise WrongResult(f"the gradient's error {error:.2e} exceeds {limit:.2e}")
    return error


def comparisons(threads: int, quick: bool) -> Iterator[Comparison]:
    for rows, classes in SHAPES:
        for kind, dtype in DTYPES.items():
            yield _comparison(rows, classes, kind, dtype, "forward_kl")
        for divergence in [name for name in EAGER if name != "forward_kl"]:
            kind = f"fp32 {divergence}"
            yield _comparison(rows, classes, kind, torch.float32, divergence)


def _comparison(
    rows: int, classes: int, kind: str, dtype: torch.dtype, divergence: str
) -> Comparison:
    student, teacher = _logits(rows, classes, dtype)
    peers = PEERS[divergence]
    # Both rows of logits are read and a gradient is written, however it is done.
    work = Work(bytes_moved=3 * rows * classes * dtype.itemsize)
    contestants, failures, wrong = [], {}, {}

    def enter(name: str, loss: Loss, error: float | None, **about) -> None:
        timed = hot([partial(_gradient, loss, student, teacher)])
        contestants.append(Contestant(f"{name} {kind}", timed, work, error, **about))

    try:
        rivals = tuple(f"{name} {kind}" for name, (_, competes) in peers.items() if competes)
        about = dict(op="softmax_kl", kernel=kernel_of("softmax_kl"), rivals=rivals)
        ours = partial(softmax_kl, divergence=divergence)
        error = _check(student, teacher, divergence)
        enter("softmax_kl", ours, error, **about, baseline=f"eager {kind}")
    except WrongResult as reason:
        wrong[f"softmax_kl {kind}"] = str(reason)
    for name, (loss, competes) in peers.items():
        try:
            enter(name, loss, _error(loss, student, teacher, divergence) if competes else None)
        except Exception as reason:  # a peer's trouble of any kind is a row of the table
            failures[f"{name} {kind}"] = sentence(reason)
    shape = {"rows": rows, "classes": classes}
    return Comparison(shape, "", contestants, failures=failures, wrong=wrong)


@pytest.mark.parametrize("divergence", EAGER)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_softmax_kl(benchmark, rows, classes, kind, divergence):
    student, teacher = _logits(rows, classes, DTYPES[kind])
    _check(student, teacher, divergence)
    benchmark(_gradient, partial(softmax_kl, divergence=divergence), student, teacher)
