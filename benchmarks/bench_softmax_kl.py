"""softmax_kl, forward and backward, against the loss written in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trine.ops import softmax_kl

from benchmarks.case import Case, Prepared, Work, run_under_pytest

SHAPES = ((4096, 1000), (1024, 32000))  # (rows, classes): ImageNet's classes, Llama's vocabulary
TEMPERATURE = 2.0


def _eager(student: Tensor, teacher: Tensor) -> Tensor:
    log_p_student = F.log_softmax(student / TEMPERATURE, -1)
    p_teacher = F.softmax(teacher / TEMPERATURE, -1)
    return F.kl_div(log_p_student, p_teacher, reduction="batchmean") * TEMPERATURE**2


def _gradient(loss, student: Tensor, teacher: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        return torch.autograd.grad(loss(student, teacher), student)[0]


def _ours(student: Tensor, teacher: Tensor) -> Tensor:
    return softmax_kl(student, teacher, TEMPERATURE)


def _case(rows: int, classes: int, dtype: torch.dtype) -> Case:
    def prepare() -> Prepared:
        generator = torch.Generator().manual_seed(0)
        student = torch.randn(rows, classes, generator=generator).to(dtype).requires_grad_()
        teacher = torch.randn(rows, classes, generator=generator).to(dtype)
        return Prepared(
            ours=lambda: _gradient(_ours, student, teacher),
            baseline=lambda: _gradient(_eager, student, teacher),
            check=lambda: _check(student[:16].detach(), teacher[:16]),
        )

    # Forward reads both rows, backward reads both and writes one: five passes over the logits.
    bytes_moved = 5 * rows * classes * dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    shape = f"rows={rows} classes={classes}"
    return Case("softmax_kl", f"{name} fwd+bwd", shape, f"eager {name}", Work(bytes_moved), prepare)


def _check(student: Tensor, teacher: Tensor) -> None:
    actual = _gradient(_ours, student.clone().requires_grad_(), teacher).double()
    expected = _gradient(_eager, student.double().requires_grad_(), teacher.double())
    # fp32: 1e-5 norm-wise; bf16: half a unit in the last place of each value
    tolerance = 1e-5 if student.dtype == torch.float32 else 2.0**-8
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error <= tolerance, f"softmax_kl: gradient error {error:.2e} exceeds {tolerance:.2e}"


CASES = [_case(r, c, dtype) for r, c in SHAPES for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_softmax_kl(benchmark, case):
    run_under_pytest(benchmark, case)
