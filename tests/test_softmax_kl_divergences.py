"""The divergences of softmax_kl against their formulas in float64, written out row by row."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import DTYPES
from test_softmax_kl import operator_arguments
from torch import Tensor
from trine.ops import softmax_kl
from trine.ops.softmax_kl import reference

INF, NAN = torch.inf, torch.nan
# Of every divergence the ones with a mixture at several shares.
CASES = [
    *(("forward_kl", 0.5), ("reverse_kl", 0.5), ("total_variation", 0.5)),
    *product(("jsd", "skewed_forward_kl", "skewed_reverse_kl"), (0.1, 0.5, 0.9)),
]
FINITE = CASES[2:]


def by_hand(s: Tensor, t: Tensor, temperature: float, divergence: str, beta: float) -> Tensor:
    """T^2 * D of two rows in float64, from the probabilities; no logit infinite."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    p, q = ((z.double() / temperature).softmax(0) for z in (s, t))
    share = {"skewed_reverse_kl": 1 - beta}.get(divergence, beta)
    m = share * q + (1 - share) * p
    return (
        temperature**2
        * {
            "forward_kl": lambda: kl(q, p),
            "reverse_kl": lambda: kl(p, q),
            "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m),
            "skewed_forward_kl": lambda: kl(q, m),
            "skewed_reverse_kl": lambda: kl(p, m),
            "total_variation": lambda: (p - q).abs().sum() / 2,
        }[divergence]()
    )


def truth_of(student, teacher, temperature, divergence, beta, weights=None):
    """The sum over rows and both gradients, in float64."""
    s, t = (z.detach().double().requires_grad_() for z in (student, teacher))
    rows = zip(s.flatten(0, -2), t.flatten(0, -2), strict=True)
    losses = torch.stack([by_hand(*row, temperature, divergence, beta) for row in rows])
    loss = (losses if weights is None else losses * weights.double().flatten()).sum()
    return loss.detach(), *torch.autograd.grad(loss, (s, t))


def results_of(student, teacher, temperature, divergence, beta, reduction="sum", **options):
    s, t = (z.detach().requires_grad_() for z in (student, teacher))
    options = dict(divergence=divergence, beta=beta, **options)
    loss = softmax_kl(s, t, temperature, reduction, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (s, t))


def assert_close(actual: Tensor, truth: Tensor, tolerance=1e-5, floor=0.0) -> None:
    """Norm-wise, beside what rounding to a 16-bit dtype must lose."""
    unavoidable = (truth.to(actual.dtype).double() - truth).norm() + floor
    assert (actual.double() - truth).norm() <= tolerance * truth.norm() + 1.1 * unavoidable


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_matches_the_formula(isa, divergence, beta):
    for i, classes in enumerate((1, 2, 15, 16, 17, 100, 1031, 17001)):
        inputs = reference.example_inputs(2, 2, classes=classes)
        student, teacher = inputs[0].to(DTYPES[i % 3]), inputs[1].to(DTYPES[i % 2])
        args = (student, teacher, (1, 2.5)[i % 2], divergence, beta)
        for actual, truth in zip(results_of(*args), truth_of(*args), strict=True):
            assert_close(actual, truth)
        for actual in results_of(student, student, 2.0, divergence, beta):
            assert (actual == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    rows=st.integers(1, 5),
    classes=st.integers(2, 700),
    spread=st.floats(0.3, 4),
    temperature=st.floats(0.7, 8),
    dtypes=st.tuples(*2 * [st.sampled_from(DTYPES)]),
    weighted=st.booleans(),
)
def test_any_combination(case, rows, classes, spread, temperature, dtypes, weighted):
    torch.manual_seed(0)
    student, teacher = ((spread * torch.randn(rows, classes)).to(dtype) for dtype in dtypes)
    weights = torch.rand(rows) + 0.1 if weighted else None
    args = (student, teacher, temperature, *case)
    expected = truth_of(*args, weights)
    floor = 1e-6 * temperature**2  # where rows are close their loss is all rounding
    for actual, truth in zip(results_of(*args, row_weight=weights), expected, strict=True):
        assert_close(actual, truth, 3e-5, floor)
    total = softmax_kl(*args[:3], "batchmean", divergence=case[0], beta=case[1], row_weight=weights)
    count = rows if weights is None else weights.double().sum()
    assert_close(total, expected[0] / count, 3e-5, floor / count)


@pytest.mark.parametrize(("divergence", "beta"), FINITE)
def test_classes_that_one_distribution_lacks(isa, divergence, beta):
    """They count by the limit of the formula; those that both lack count nothing."""
    student, teacher = reference.example_inputs(3, classes=2000)
    student[:, 100:300] = teacher[:, 250:700] = -INF
    results = results_of(student, teacher, 2.0, divergence, beta)
    nearly = (z.clamp(min=-1e3) for z in (student, teacher))  # exp underflows, in float64 too
    for actual, truth in zip(results, truth_of(*nearly, 2.0, divergence, beta), strict=True):
        assert_close(actual, truth.nan_to_num())


def test_reverse_kl_is_infinite_where_the_teacher_lacks_a_class(isa):
    student, teacher = reference.example_inputs(2, classes=50)
    teacher[0, 3] = student[1, 3] = -INF
    losses = softmax_kl(student, teacher, 1.0, "none", divergence="reverse_kl")
    assert losses.isinf().tolist() == [True, False]


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_bad_rows_are_nan_and_no_others(isa, divergence, beta):
    student, teacher = reference.example_inputs(5, classes=20000)
    student[0, 3], teacher[1, -1], student[2], teacher[3] = NAN, INF, -INF, -INF
    for result in results_of(student, teacher, 2.0, divergence, beta, "none"):
        assert result[:4].isnan().all()
        assert result[4].isfinite().all()


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_huge_logits(isa, divergence, beta):
    student, teacher = reference.example_inputs(4, classes=3000)
    args = (student * 3e3 + 1e4, teacher * 3e3 - 1e4, 1.0, divergence, beta)
    for actual in results_of(*args):
        assert actual.isfinite().all()
    args = (student + 1e4, teacher - 1e4, 1.0, divergence, beta)
    for actual, truth in zip(results_of(*args), truth_of(*args), strict=True):
        assert_close(actual, truth)


def test_nothing_depends_on_threads_or_on_how_rows_are_grouped(threads):
    """1500 rows of 1100 classes are taken in two groups; 3 of 40000 are cut into parts."""
    for shape in ((1500, 1100), (3, 40000)):
        student, teacher = torch.randn(2, *shape)
        results = []
        for number in (1, 3):
            threads(number)
            results.append(results_of(student, teacher, 2.0, "jsd", 0.5, "none"))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        alone = results_of(student[-1:], teacher[-1:], 2.0, "jsd", 0.5, "none")
        for a, b in zip(results[0], alone, strict=True):
            assert torch.equal(a[-1:], b)


def test_rows_of_weight_zero_are_not_read():
    student, teacher = reference.example_inputs(4, classes=3000)
    student[1], teacher[3] = NAN, INF
    weights = torch.tensor([2.0, 0, 0.5, 0])
    for divergence, beta in CASES:
        results = results_of(student, teacher, 2.0, divergence, beta, row_weight=weights)
        kept = (student[::2], teacher[::2], 2.0, divergence, beta)
        truth = truth_of(*kept, weights[::2])
        assert_close(results[0], truth[0])
        for actual, expected in zip(results[1:], truth[1:], strict=True):
            assert_close(actual[::2], expected)
            assert (actual[1::2] == 0).all()
        each = softmax_kl(student, teacher, 2.0, "none", divergence=divergence, row_weight=weights)
        assert (each[1::2] == 0).all()
    mean = softmax_kl(student, teacher, 2.0, "mean", row_weight=weights)
    total = softmax_kl(student, teacher, 2.0, "sum", row_weight=weights)
    torch.testing.assert_close(mean, total / (2.5 * 3000))
    assert softmax_kl(student, teacher, row_weight=torch.zeros(4)).isnan()


def test_denominator_and_temperature_squared():
    inputs = reference.example_inputs(6, classes=30)
    total = softmax_kl(*inputs, 3.0, "sum")
    for denominator in (17, torch.tensor(17)):
        torch.testing.assert_close(softmax_kl(*inputs, 3.0, denominator=denominator), total / 17)
    torch.testing.assert_close(softmax_kl(*inputs, 3.0, "sum", scale_by_t_squared=False), total / 9)
    with pytest.raises(ValueError, match="takes the place of 'batchmean'"):
        softmax_kl(*inputs, 3.0, "sum", denominator=17)
    with pytest.raises(ValueError, match="must be positive, it is 0"):
        softmax_kl(*inputs, 3.0, denominator=0)


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_second_derivatives(divergence, beta):
    """Against central differences of the first ones, and against float64."""
    student, teacher = (z.requires_grad_() for z in reference.example_inputs(3, classes=5))
    weights = torch.tensor([1.0, 0.5, 2])

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return softmax_kl(s, t, 2.0, divergence=divergence, beta=beta, row_weight=weights)

    def penalty(f, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(f(s, t), (s, t), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), (s, t))

    def exact(s: Tensor, t: Tensor) -> Tensor:
        rows = [by_hand(*row, 2.0, divergence, beta) for row in zip(s, t, strict=True)]
        return (torch.stack(rows) * weights.double()).sum() / weights.sum().double()

    if divergence != "total_variation":  # whose gradient jumps
        assert torch.autograd.gradgradcheck(
            loss, (student, teacher), eps=1e-2, atol=2e-3, rtol=1e-2
        )
    wide = (z.detach().double().requires_grad_() for z in (student, teacher))
    for a, b in zip(penalty(loss, student, teacher), penalty(exact, *wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_the_loss_may_be_used_twice():
    student, teacher = reference.example_inputs(4, classes=300)
    student.requires_grad_()
    loss = softmax_kl(student, teacher, divergence="jsd")
    (loss * 3 + loss).backward(retain_graph=True)
    first, student.grad = student.grad, None
    (4 * loss).backward()
    torch.testing.assert_close(first, student.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("divergence", sorted({name for name, _ in CASES}))
def test_opcheck_and_compile(divergence):
    student, teacher = reference.example_inputs(2, 4, classes=33)
    ops, mask = torch.ops.trine, torch.rand(8) > 0.3
    args = (student.requires_grad_(), teacher, 2.0, divergence, 0.3)
    args = operator_arguments(*args, row_mask=mask)
    torch.library.opcheck(ops.softmax_kl.default, args)
    with torch.no_grad():
        soft, hard, saved = ops.softmax_kl(*args)
    for for_teacher in (False, True):
        backward = (torch.ones_like(soft), hard, *args, saved, for_teacher)
        torch.library.opcheck(ops.softmax_kl_backward.default, backward)

    def function(s: Tensor) -> Tensor:
        return softmax_kl(s, teacher, 2.0, divergence=divergence, denominator=5)

    gradients = [
        torch.autograd.grad(f(student), student)[0]
        for f in (function, torch.compile(function, fullgraph=True))
    ]
    assert torch.equal(*gradients)


def test_errors():
    s = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="divergence must be one of 'forward_kl', 'reverse_kl'"):
        softmax_kl(s, s, divergence="kl")
    for beta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta of 'jsd' must lie between 0 and 1"):
            softmax_kl(s, s, divergence="jsd", beta=beta)
    with pytest.raises(ValueError, match=r"leading dimensions of the logits, \[2\]"):
        softmax_kl(s, s, row_weight=torch.ones(3))
