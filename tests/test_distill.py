"""distillation_loss against its formula in float64, written out row by row."""

import math

import pytest
import torch
from torch import Tensor
from trine.distill import distillation_loss


def by_hand(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    """One row at a time in float64; rows labelled -100 are left out."""
    classes = student.shape[-1]
    cross_entropies, divergences = [], []
    for s, t, label in zip(
        student.double().reshape(-1, classes),
        teacher.double().reshape(-1, classes),
        labels.reshape(-1).tolist(),
        strict=True,
    ):
        if label == -100:
            continue
        p_student, p_teacher = (
            (z / temperature).exp() / (z / temperature).exp().sum() for z in (s, t)
        )
        cross_entropies.append(s.exp().sum().log() - s[label])
        divergences.append((p_teacher * (p_teacher / p_student).log()).sum())
    rows = len(divergences)
    return (1 - alpha) * sum(cross_entropies) / rows + alpha * temperature**2 * sum(
        divergences
    ) / rows


def example(*leading: int, classes: int = 10, dtype: torch.dtype = torch.float32):
    student, teacher = (2 * torch.randn(2, *leading, classes)).to(dtype)
    return student, teacher, torch.randint(classes, leading)


def assert_matches(student, teacher, labels, *args) -> None:
    student = student.clone().requires_grad_()
    truth_student = student.detach().double().requires_grad_()
    loss, truth = distillation_loss(student, teacher, labels, *args), None
    truth = by_hand(truth_student, teacher, labels, *(args or (4.0, 0.7)))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-7)
    loss.backward()
    truth.backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[student.dtype]
    error = (student.grad.double() - truth_student.grad).norm()
    assert error <= tolerance * truth_student.grad.norm()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 20.0])
def test_matches_the_formula(temperature, alpha):
    assert_matches(*example(16), temperature, alpha)


def test_defaults_shapes_and_dtypes():
    assert_matches(*example(8))
    assert_matches(*example(2, 3, 4))
    assert_matches(*example())
    for dtype in (torch.bfloat16, torch.float16):
        assert_matches(*example(8, dtype=dtype))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_ignored_rows_count_in_neither_term(alpha):
    student, teacher, labels = example(4, 5)
    labels[0, 1:] = labels[3, 2] = -100
    assert_matches(student, teacher, labels, 3.0, alpha)

    student.requires_grad_()
    loss = distillation_loss(student, teacher, labels, 3.0, alpha)
    loss.backward()
    assert (student.grad[labels == -100] == 0).all()
    counted = labels != -100
    alone = distillation_loss(student[counted], teacher[counted], labels[counted], 3.0, alpha)
    torch.testing.assert_close(loss, alone)


def test_another_divergence():
    student, teacher, labels = example(6)
    labels[2] = -100
    student[2] = teacher[2] = torch.nan  # never read
    p, q = (torch.softmax(z.double() / 3, -1) for z in (student, teacher))
    m = 0.3 * q + 0.7 * p
    jsd = 0.3 * (q * (q / m).log()).sum(-1) + 0.7 * (p * (p / m).log()).sum(-1)
    loss = distillation_loss(student, teacher, labels, 3.0, 1.0, divergence="jsd", beta=0.3)
    torch.testing.assert_close(loss.double(), 9 * jsd[labels >= 0].mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_no_row_that_counts_is_nan(alpha):
    student, teacher, labels = example(3)
    assert distillation_loss(student, teacher, labels.fill_(-100), alpha=alpha).isnan()


def test_a_term_without_weight_adds_nothing():
    """0 times an infinite term would be NaN."""
    student, teacher, labels = example(3)
    student[:, 0] = -torch.inf
    labels.fill_(1)
    assert distillation_loss(student, teacher, labels, alpha=0.0).isfinite()
    teacher[:, 0] = -torch.inf
    labels.fill_(0)
    assert distillation_loss(student, teacher, labels, alpha=1.0).isfinite()
    assert distillation_loss(student, teacher, labels).isinf()


def test_teacher_is_a_constant():
    student, teacher, labels = example(3)
    teacher.requires_grad_()
    student.requires_grad_()
    distillation_loss(student, teacher, labels).backward()
    assert teacher.grad is None


def test_autocast_changes_nothing():
    student, teacher, labels = example(6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = distillation_loss(student, teacher, labels)
    assert torch.equal(inside, distillation_loss(student, teacher, labels))


def test_compile():
    student, teacher, labels = example(6)
    labels[2] = -100
    compiled = torch.compile(distillation_loss, fullgraph=True)
    gradients = []
    for function in (distillation_loss, compiled):
        s = student.clone().requires_grad_()
        function(s, teacher, labels).backward()
        gradients.append(s.grad)
    torch.testing.assert_close(*gradients)


def test_a_student_learns_its_teacher():
    teacher = 2 * torch.randn(8, 5)
    student = torch.zeros(8, 5, requires_grad=True)
    optimizer = torch.optim.SGD([student], lr=2.0)
    for _ in range(300):
        optimizer.zero_grad()
        distillation_loss(student, teacher, teacher.argmax(1), alpha=1.0).backward()
        optimizer.step()
    distance = torch.softmax(student.detach() / 4, 1) - torch.softmax(teacher / 4, 1)
    assert distance.abs().max() < 1e-3


def test_errors():
    student, teacher, labels = example(3)
    with pytest.raises(ValueError, match="must have the same shape"):
        distillation_loss(student, teacher[:2], labels)
    with pytest.raises(ValueError, match=r"labels must be int64 class indices of shape \[3\]"):
        distillation_loss(student, teacher, labels[:2])
    with pytest.raises(ValueError, match="labels must be int64"):
        distillation_loss(student, teacher, labels.float())
    with pytest.raises(ValueError, match="convert it with"):
        distillation_loss(student.double(), teacher, labels)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
            distillation_loss(student, teacher, labels, alpha=alpha)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            distillation_loss(student, teacher, labels, temperature, alpha=0.0)
    with pytest.raises(IndexError, match=r"label of row 0 is 1\d; it must lie in \[0, 10\)"):
        distillation_loss(student, teacher, labels + 10)
