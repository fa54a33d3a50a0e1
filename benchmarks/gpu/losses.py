"""softmax_kl and linear_softmax_kl, forward and backward, against PyTorch and Liger."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from trine import ops

from benchmarks.bench_linear_softmax_kl import eager as eager_linear
from benchmarks.case import Comparison, WrongResult
from benchmarks.ceilings import Work
from benchmarks.gpu.entries import Entries, Made, kernel_of, rotated_copies
from benchmarks.peers import loss as peers
from benchmarks.peers.loss import compiled

OPS = ("softmax_kl", "linear_softmax_kl")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")  # which Liger has, too
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURE = 2.0
BLOCK = 64  # rows whose gradient is computed in float64 at a time
LINEAR_BLOCK = 512
# Norm-wise, of the gradients. Logits that stand between two products are rounded to bf16 there.
MOST_ERROR = {"fp32": 1e-5, "bf16": 5e-3}
MOST_LINEAR_ERROR = 2e-2
# Peers round probabilities' logarithms to bf16 and may lose a quarter; what loses more computes
# something else.
MOST_PEER_ERROR = 0.5

Loss = Callable[..., Tensor]
Gradients = tuple[Tensor, ...]
LIGER_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def _eager(divergence: str) -> Loss:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return peers.eager(student, teacher, None, TEMPERATURE, divergence)

    return loss


def _liger(divergence: str) -> Loss:
    from liger_kernel.transformers import LigerJSD

    of_logarithms = LigerJSD(beta=LIGER_BETA[divergence])

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        logarithms = (F.log_softmax(logits / TEMPERATURE, -1) for logits in (student, teacher))
        return of_logarithms(*logarithms) * TEMPERATURE**2

    return loss


def _eager_linear(*models: Tensor) -> Tensor:
    return eager_linear(*models, TEMPERATURE)


def _liger_linear() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearJSD

    whole = LigerFusedLinearJSD(jsd_beta=LIGER_BETA["forward_kl"], temperature=TEMPERATURE)
    return lambda *models: whole(*models, None) * TEMPERATURE**2


@contextmanager
def _training() -> Iterator[None]:
    """What is measured runs in inference mode, which knows no gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _gradients(loss: Loss, *inputs: Tensor) -> Gradients:
    with _training():
        return torch.autograd.grad(loss(*inputs), [t for t in inputs if t.requires_grad])


@_training()
def softmax_kl(
    shape: tuple[int, int, str], divergence: str, device: str, rotated: int
) -> Comparison:
    """Of (rows, classes, dtype)."""
    rows, classes, kind = shape
    logits = tuple(
        (3 * torch.randn(rows, classes, device=device)).to(DTYPES[kind]) for _ in range(2)
    )
    inputs = [(s.requires_grad_(), t) for s, t in rotated_copies(logits, rotated)]
    case = f"{kind} {divergence}"

    def error(loss: Loss, checked: int) -> float:
        """Of the gradient's first rows."""
        student, teacher = inputs[0]
        (actual,) = _gradients(loss, student, teacher)
        wrong = norm = 0.0
        for begin in range(0, checked, BLOCK):
            block = slice(begin, begin + BLOCK)
            wide = student[block].detach().double().requires_grad_()
            (expected,) = _gradients(_eager(divergence), wide, teacher[block].double())
            expected *= len(wide) / rows
            wrong += (actual[block].double() - expected).square().sum().item()
            norm += expected.square().sum().item()
        return (wrong / norm) ** 0.5

    def made(loss: Loss, checked: int, most: float, failure: type[Exception]) -> Made:
        found = error(loss, checked)
        _refuse(found, most, failure)
        return [partial(_gradients, loss, *pair) for pair in inputs], found

    # Both logits are read once, the gradient is written.
    work = Work(bytes_moved=3 * rows * classes * DTYPES[kind].itemsize)
    entries = Entries({"rows": rows, "classes": classes})
    names = {name: f"{name} {case}" for name in ("eager", "torch.compile", "Liger")}
    about = dict(rivals=tuple(names.values()), baseline=names["eager"])
    ours = partial(ops.softmax_kl, temperature=TEMPERATURE, divergence=divergence)
    entries.enter(
        f"softmax_kl {case}",
        work,
        lambda: made(ours, rows, MOST_ERROR[kind], WrongResult),
        op="softmax_kl",
        kernel=kernel_of("softmax_kl"),
        **about,
    )
    eager = _eager(divergence)
    theirs = partial(made, checked=BLOCK, most=MOST_PEER_ERROR, failure=RuntimeError)
    entries.enter(names["eager"], work, lambda: theirs(eager))
    entries.enter(names["torch.compile"], work, lambda: theirs(compiled(eager)))
    # It asks the device about the upstream gradient: no graph holds that.
    entries.enter(names["Liger"], work, lambda: theirs(_liger(divergence)), in_graph=False)
    return entries.comparison()


@_training()
def linear_softmax_kl(shape: tuple[int, int, int], device: str) -> Comparison:
    """Of (rows, width, classes), in bf16, forward KL. Each call lasts long: launches cost nothing
    beside it, and what it holds is far beyond any L2."""
    rows, width, classes = shape

    def tensor(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(*shape, device=device)).bfloat16()

    models = [
        tensor(*of, scale=scale)
        for of, scale in (((rows, width), 1), ((classes, width), 3 * width**-0.5)) * 2
    ]
    for trained in models[:2]:
        trained.requires_grad_()

    @cache
    def expected() -> Gradients:
        """In fp32: its error is far below that of bf16, and float64 takes minutes on some GPUs."""
        hidden, weight, *teacher = (t.detach().float() for t in models)
        weight.requires_grad_()
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for h, th, out in zip(
            *(t.split(LINEAR_BLOCK) for t in (hidden, teacher[0], of_hidden)), strict=True
        ):
            found = _gradients(_eager_linear, h.requires_grad_(), weight, th, teacher[1])
            share = len(h) / rows
            out.copy_(found[0] * share)
            of_weight += found[1].mul_(share)
        return of_hidden, of_weight

    def made(loss: Loss, most: float, failure: type[Exception]) -> Made:
        pairs = zip(_gradients(loss, *models), expected(), strict=True)
        error = max(((a.float() - e).norm() / e.norm()).item() for a, e in pairs)
        _refuse(error, most, failure)
        return [partial(_gradients, loss, *models)], error

    # Two logits and two gradients: what computes logits twice does more.
    work = Work(bf16_ops=4 * 2 * rows * width * classes)
    entries = Entries({"K": width, "rows": rows, "classes": classes})
    enter = partial(entries.enter, in_graph=False)
    ours = partial(ops.linear_softmax_kl, temperature=TEMPERATURE)
    enter(
        "linear_softmax_kl",
        work,
        lambda: made(ours, MOST_LINEAR_ERROR, WrongResult),
        op="linear_softmax_kl",
        kernel=kernel_of("softmax_kl"),
        rivals=("eager", "torch.compile", "Liger"),
        baseline="eager",
    )
    theirs = partial(made, most=MOST_PEER_ERROR, failure=RuntimeError)
    enter("eager", work, lambda: theirs(_eager_linear))
    enter("torch.compile", work, lambda: theirs(compiled(_eager_linear)))
    enter("Liger", work, lambda: theirs(_liger_linear()))
    return entries.comparison()


def _refuse(error: float, most: float, failure: type[Exception]) -> None:
    if not error <= most:
        raise failure(f"the gradient's error is {error:.2g}")
