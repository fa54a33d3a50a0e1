"""linear_softmax_kl, forward and backward, against linear layers and a loss in PyTorch.

    python -m benchmarks.bench_linear_softmax_kl

prints the most memory that each takes beside its arguments, on Linux: the high-water mark of a
fresh process, after a small call that has loaded the libraries.
"""

import multiprocessing
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trine.ops import linear_softmax_kl

from benchmarks.case import Comparison, Contestant, WrongResult, hot, kernel_of, relative_error
from benchmarks.ceilings import Work
from benchmarks.peers.loss import compiled
from benchmarks.peers.loss import eager as eager_loss

ROWS, WIDTH, CLASSES = 1024, 1024, 32000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURE = 2.0

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
Model = tuple[Tensor, Tensor]  # hidden states, weight


def eager(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, temperature: float) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(th, tw)
    return eager_loss(F.linear(h, w), teacher, None, temperature, "forward_kl")


def _gradients(loss: Loss, student: Model, teacher: Model) -> tuple[Tensor, ...]:
    with torch.inference_mode(False), torch.enable_grad():
        return torch.autograd.grad(loss(*student, *teacher, TEMPERATURE), student)


def _models(dtype: torch.dtype) -> tuple[Model, Model]:
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    student, teacher = (
        (tensor(ROWS, WIDTH, scale=1), tensor(CLASSES, WIDTH, scale=3 * WIDTH**-0.5))
        for _ in range(2)
    )
    return tuple(t.requires_grad_() for t in student), teacher


def _error(loss: Loss, student: Model, teacher: Model) -> float:
    """Of both gradients, the worse one, for some rows and classes; norm-wise against float64."""
    rows, classes = slice(0, 64), slice(0, 4000)

    def part(model: Model, dtype: torch.dtype) -> Model:
        hidden, weight = model
        return hidden[rows].detach().to(dtype), weight[classes].detach().to(dtype)

    def of(function: Loss, dtype: torch.dtype) -> tuple[Tensor, ...]:
        trained = tuple(t.requires_grad_() for t in part(student, dtype))
        return _gradients(function, trained, part(teacher, dtype))

    pairs = zip(of(loss, student[0].dtype), of(eager, torch.float64), strict=True)
    return max(relative_error(*pair) for pair in pairs)


def _check(student: Model, teacher: Model) -> float:
    error = _error(linear_softmax_kl, student, teacher)
    # Of fp32 the bound of the loss itself; of bf16 what PyTorch loses.
    in_fp32 = student[0].dtype == torch.float32
    limit = 1e-5 if in_fp32 else _error(eager, student, teacher)
    if not error <= limit:
        raise WrongResult(f"the gradients' error {error:.2e} exceeds {limit:.2e}")
    return error


def comparisons(threads: int, quick: bool) -> Iterator[Comparison]:
    for kind, dtype in DTYPES.items():
        yield _comparison(kind, *_models(dtype))


def _comparison(kind: str, student: Model, teacher: Model) -> Comparison:
    # Four matrix products, as who stores the logits needs them.
    in_fp32 = student[0].dtype == torch.float32
    work = Work(bytes_moved=0, fp32_ops=8 * ROWS * WIDTH * CLASSES if in_fp32 else 0)
    contestants, wrong = [], {}

    def enter(name: str, loss: Loss, error: float | None, **about) -> None:
        timed = hot([partial(_gradients, loss, student, teacher)])
        contestants.append(Contestant(f"{name} {kind}", timed, work, error, **about))

    rivals = (f"eager {kind}", f"torch.compile {kind}")
    try:
        about = dict(op="linear_softmax_kl", kernel=kernel_of("softmax_kl"), rivals=rivals)
        error = _check(student, teacher)
        enter("linear_softmax_kl", linear_softmax_kl, error, **about, baseline=rivals[0])
    except WrongResult as reason:
        wrong[f"linear_softmax_kl {kind}"] = str(reason)
    enter("eager", eager, _error(eager, student, teacher))
    enter("torch.compile", compiled(eager), None)
    shape = {"rows": ROWS, "classes": CLASSES}
    return Comparison(shape, "", contestants, wrong=wrong)


@pytest.mark.parametrize("kind", DTYPES)
def test_linear_softmax_kl(benchmark, kind):
    student, teacher = _models(DTYPES[kind])
    _check(student, teacher)
    benchmark(_gradients, linear_softmax_kl, student, teacher)


def _peak_bytes(name: str, kind: str) -> int:
    loss = {"linear_softmax_kl": linear_softmax_kl, "eager": eager}.get(name) or compiled(eager)
    student, teacher = _models(DTYPES[kind])

    def few(model: Model) -> Model:
        return model[0][:64].detach(), model[1][:2000].detach()

    small = tuple(t.requires_grad_() for t in few(student))
    _gradients(loss, small, few(teacher))

    def resident(what: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{what}:\s*(\d+) kB", status)[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = resident("VmRSS")
    _gradients(loss, student, teacher)
    return resident("VmHWM") - before


def main() -> None:
    for kind in DTYPES:
        for name in ("linear_softmax_kl", "eager", "torch.compile"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(f"{name} {kind}: {pool.apply(_peak_bytes, (name, kind)) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
