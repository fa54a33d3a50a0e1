"""softmax_kl with its gradient computed in forward: what backward makes of it, however it is used.

Here by the CPU's kernels; tests/test_cuda_softmax_kl_on_cpu.py has CUDA's.
"""

import pytest
import torch
from instruction_sets import isas_to_test
from linear_inputs import assert_same_bits
from test_softmax_kl import operator_arguments
from torch import Tensor
from trine import backends
from trine.ops import softmax_kl
from trine.ops.softmax_kl import one_pass, reference

ROWS, CLASSES = 6, 37


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch):
    monkeypatch.setattr(one_pass, "_has_kernel", lambda device: True)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    student, teacher = reference.example_inputs(ROWS, classes=CLASSES)
    return student.requires_grad_(), teacher


def in_two_passes(function, *arguments):
    """The value without the operator that is tried here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_pass, "_has_kernel", lambda device: False)
        return function(*arguments)


def gradient(loss: Tensor, student: Tensor, factor: float = 1.0) -> Tensor:
    return torch.autograd.grad(loss * factor if factor != 1 else loss, student)[0]


@pytest.mark.parametrize("divergence", reference.DIVERGENCES)
@pytest.mark.parametrize("cpu_isa", isas_to_test("softmax_kl"))
def test_same_bits_as_forward_and_backward(cpu_isa, threads, divergence):
    """Few rows are shared by all threads; of many what one pass has computed is kept for the next,
    of the longest only a part. The same bits, with a cross entropy or not."""
    ops = torch.ops.trine
    for rows, classes, labelled in ((24, 1001, True), (9, 20011, False), (8, 120000, False)):
        student, teacher = reference.example_inputs(rows, classes=classes)
        labels = torch.randint(classes, (rows,)) if labelled else None
        arguments = operator_arguments(student, teacher, 2.0, divergence, 0.3, labels=labels)
        upstream = torch.rand(rows), torch.rand(rows * labelled)
        with backends.cpu_isa(cpu_isa):
            threads(3)
            soft, hard, saved = ops.softmax_kl(*arguments)
            gradient = ops.softmax_kl_backward(*upstream, *arguments, saved, False)
            for number in (1, 3):
                threads(number)
                found = ops.softmax_kl_with_gradient(*arguments, *upstream)
                for a, b in zip(found, (soft, hard, gradient, saved), strict=True):
                    assert_same_bits(a, b)


LABELS = torch.tensor([3, -100, 36, 0, 5, 5])
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean", "divergence": "jsd"},
    "labels": {"labels": LABELS, "alpha": 0.3, "label_smoothing": 0.1},
    "class weights": {"labels": LABELS, "class_weight": torch.linspace(0.5, 2, CLASSES)},
    "labels without a share": {"labels": LABELS, "alpha": 1.0, "return_terms": True},
    "row weights": {"row_weight": torch.tensor([1.0, 0, 2, 0.5, 1, 1]), "softcap": 4.0},
    "denominator": {"denominator": torch.tensor(11.0), "scale_by_t_squared": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_same_loss_and_gradient(logits, name):
    def compute() -> tuple[Tensor, ...]:
        result = softmax_kl(*logits, 2.0, **OPTIONS[name])
        terms = result if isinstance(result, tuple) else (result,)
        return (*terms, gradient(terms[0], logits[0]))

    for actual, expected in zip(compute(), in_two_passes(compute), strict=True):
        assert actual.requires_grad == expected.requires_grad
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.3, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_factor(logits, factor, dtype):
    student, teacher = (t.detach().to(dtype).requires_grad_() for t in logits)
    teacher.requires_grad_(False)
    loss = softmax_kl(student, teacher, 2.0)
    actual = gradient(loss, student, factor)
    wide = student.detach().double().requires_grad_()
    expected = gradient(reference.softmax_kl(wide, teacher, 2.0), wide, factor)
    assert actual.dtype == dtype
    allowed = 1e-5 if dtype == torch.float32 else 5e-3
    assert (actual.double() - expected).norm() <= allowed * expected.norm()


def test_every_backward_gives_the_same_bits(logits):
    student, teacher = logits
    loss = softmax_kl(student, teacher, 2.0)
    before = student.detach().clone(), teacher.clone()
    (loss * 0.3).backward(retain_graph=True)
    first, student.grad = student.grad, None
    kept = first.clone()
    for _ in range(2):
        (loss * 0.3).backward(retain_graph=True)
        assert torch.equal(student.grad, kept)
        student.grad = None
    assert torch.equal(first, kept)  # nobody has scaled what was handed on
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher, before[1])


def test_gradients_accumulate(logits):
    student, teacher = logits
    one = gradient(softmax_kl(student, teacher, 2.0), student)
    for _ in range(3):
        softmax_kl(student, teacher, 2.0).backward()
    torch.testing.assert_close(student.grad, 3 * one)
    loss = softmax_kl(student, teacher, 2.0)
    torch.testing.assert_close(gradient(loss + 2 * loss, student), 3 * one)


def test_a_factor_of_0_gives_exactly_0_also_of_nan(logits):
    student, teacher = logits
    with torch.no_grad():
        student[1, 4] = torch.nan
    loss = softmax_kl(student, teacher, 2.0)
    assert loss.isnan()
    assert (gradient(loss, student, 0.0) == 0).all()
    masked = softmax_kl(student, teacher, 2.0, row_weight=(torch.arange(ROWS) != 1).float())
    found = gradient(masked, student)
    assert (found[1] == 0).all()
    assert (found[0] != 0).all()


def test_infinite_terms_without_a_share(logits):
    student, teacher = logits
    with torch.no_grad():
        student[:, 0] = -torch.inf  # and a label's: its cross entropy is infinite
    labels = torch.zeros(ROWS, dtype=torch.int64)
    result = softmax_kl(
        student, teacher, 2.0, divergence="jsd", labels=labels, alpha=1.0, return_terms=True
    )
    assert result.hard.isinf()
    assert result.loss.isfinite()


def test_second_derivative(logits):
    student = logits[0].detach()[:2, :5].double().float().requires_grad_()
    teacher = logits[1][:2, :5]

    def second(loss: Tensor, s: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(loss * 3, s, create_graph=True)
        return torch.autograd.grad(first.square().sum(), s)[0]

    wide = student.detach().double().requires_grad_()
    expected = second(reference.softmax_kl(wide, teacher.double(), 2.0), wide)
    actual = second(softmax_kl(student, teacher, 2.0), student)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)


def test_what_is_left_to_two_passes(logits, monkeypatch):
    student, teacher = logits
    monkeypatch.setattr(one_pass, "op", None)  # would be called
    softmax_kl(student, teacher, 2.0, "none").sum().backward()
    softmax_kl(student, teacher.clone().requires_grad_()).backward()
    softmax_kl(student.half(), teacher).backward()  # a loss scale comes before rounding
    softmax_kl(student[:0], teacher[:0]).backward()
    total = torch.tensor(3.0, requires_grad=True)
    softmax_kl(student, teacher, denominator=total).backward()
    best = torch.log_softmax(teacher, 1).topk(3)
    softmax_kl(student, best.values, teacher_indices=best.indices).backward()
    with torch.no_grad():
        softmax_kl(student, teacher)
    softmax_kl(student.detach(), teacher)


@pytest.mark.parametrize("with_labels", [False, True])
def test_opcheck(logits, with_labels):
    student, teacher = logits
    labels = {"labels": LABELS.clamp(min=0)} if with_labels else {}
    coefficients = torch.rand(ROWS), torch.rand(ROWS * with_labels)
    arguments = (*operator_arguments(student, teacher, **labels), *coefficients)
    torch.library.opcheck(one_pass.op, arguments)
    raw = torch.ops.trine.softmax_kl_with_gradient.default
    torch.library.opcheck(raw, (student.detach(), *arguments[1:]))
    scale = torch.ops.trine.softmax_kl_scale_.default
    torch.library.opcheck(scale, (torch.randn(ROWS, CLASSES), torch.tensor(0.5)))


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_compile_with_backward(logits, factor):
    student, teacher = logits
    loss = softmax_kl(student, teacher, 2.0)
    compiled = torch.compile(softmax_kl, fullgraph=True, dynamic=True)(student, teacher, 2.0)
    assert torch.equal(compiled, loss)
    assert torch.equal(gradient(compiled, student, factor), gradient(loss, student, factor))
