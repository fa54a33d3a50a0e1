"""softmax_kl: every instruction set against the float64 reference, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE, on_device
from linear_inputs import DTYPES, assert_same_bits, non_contiguous
from torch import Tensor
from trine.ops import softmax_kl
from trine.ops.softmax_kl import reference

INF, NAN = torch.inf, torch.nan
TOLERANCE = 1e-5  # relative; of the norm for gradients


def with_gradients(function, student: Tensor, teacher: Tensor, *args) -> tuple[Tensor, ...]:
    """The loss, and the gradients of its weighted sum to both arguments; a scalar counts 0.5."""
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    loss = function(student, teacher, *args)
    weights = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return (loss.detach(), *torch.autograd.grad((loss * weights).sum(), (student, teacher)))


def operator_arguments(
    student: Tensor, teacher: Tensor, temperature=2.0, divergence="forward_kl", beta=0.5, **others
) -> tuple:
    """What the operator itself takes."""
    options = dict(
        teacher_indices=None,
        labels=None,
        class_weight=None,
        row_mask=None,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        label_smoothing=0.0,
        classes=student.shape[-1],
        student_scale=1.0,
        student_cap=0.0,
        teacher_scale=1.0,
        teacher_cap=0.0,
        teacher_is_log=False,
    )
    assert others.keys() <= options.keys()
    return student, teacher, *(options | others).values()


def assert_close_to_truth(actual: Tensor, truth: Tensor) -> None:
    """Within TOLERANCE of the truth's norm, beside what rounding to a 16-bit dtype must lose."""
    assert torch.isfinite(actual).all()
    unavoidable = (truth.to(actual.dtype) - truth).norm() if actual.dtype != torch.float32 else 0
    assert (actual.double() - truth).norm() <= TOLERANCE * truth.norm() + 1.1 * unavoidable


def assert_matches_reference(student: Tensor, teacher: Tensor, *args) -> None:
    actual = with_gradients(softmax_kl, student, teacher, *args)
    truth = with_gradients(reference.softmax_kl, student.double(), teacher.double(), *args)
    for got, expected, dtype in zip(
        actual, truth, (torch.float32, student.dtype, teacher.dtype), strict=True
    ):
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert_close_to_truth(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 1000, 1024, 1025, 32001])
def test_matches_reference(isa, dtype, classes):
    assert_matches_reference(*reference.example_inputs(3, classes=classes, dtype=dtype), 2.0)


def test_matches_reference_where_huge_pages_are_advised(isa):
    assert_matches_reference(*reference.example_inputs(33, classes=32003), 2.0)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("temperature", [0.5, 1, 3.7, 20])
def test_temperatures_and_reductions(isa, reduction, temperature):
    inputs = reference.example_inputs(4, 3, classes=1031)
    assert_matches_reference(*inputs, temperature, reduction)


def test_dtypes_may_differ(isa):
    student, teacher = reference.example_inputs(5, classes=100)
    for student_dtype in DTYPES:
        for teacher_dtype in DTYPES:
            assert_matches_reference(student.to(student_dtype), teacher.to(teacher_dtype), 2.0)


@pytest.mark.parametrize("upstream", [1.0, -1e4, 1e-37, 1e38, INF, NAN])
def test_bf16_gradients_are_rounded_once(isa, upstream):
    """To nearest even: what the fp32 kernel computes from the same saved rows, rounded by torch. A
    GPU's two kernels may differ before they round, so a value that near to a tie may go either way.
    """
    forward, backward = torch.ops.trine.softmax_kl, torch.ops.trine.softmax_kl_backward
    difference = 0.0
    if isa == DEVICE:
        forward, backward, difference = on_device(forward), on_device(backward), 2.0**-22
    student, teacher = reference.example_inputs(5, classes=1003, dtype=torch.bfloat16)
    saved = forward(*operator_arguments(student, teacher))[2]
    upstreams = torch.full((5,), upstream), torch.empty(0)
    for for_teacher in (False, True):
        narrow, wide = (
            backward(*upstreams, *operator_arguments(s, t), saved, for_teacher)
            for s, t in ((student, teacher), (student.float(), teacher.float()))
        )
        less, more = ((wide.double() * (1 + d)).bfloat16() for d in (-difference, difference))
        assert_same_bits(narrow, torch.where(narrow == less, less, more))


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_huge_logits(isa, offset, spread):
    """Maxima that rise by any amount in the middle of a row, and logits far from zero."""
    student, teacher = reference.example_inputs(6, classes=3000)
    assert_matches_reference(student * spread + offset, teacher * spread - offset, 4.0)
    rising = torch.linspace(-1, 1, 3000).expand(6, -1)
    assert_matches_reference(student + spread * rising, teacher + spread * rising, 1.0)
    assert_matches_reference(student - spread * rising, teacher + rising, 1.0)


def test_loss_and_gradient_of_the_same_logits_are_exactly_zero(isa):
    for scale in (1.0, 1e4):
        student, _ = reference.example_inputs(4, classes=3001)
        for result in with_gradients(softmax_kl, student * scale, student * scale, 3.0, "none"):
            assert (result == 0).all()


def test_rounding_makes_no_loss_negative(isa):
    _, teacher = reference.example_inputs(200, classes=100)
    student = teacher + 1e-6 * torch.randn_like(teacher)
    assert (softmax_kl(student, teacher, 1.0, "none") >= 0).all()


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_close_logits_lose_no_more_than_in_torch(isa, distance):
    """Where the student has nearly learnt the teacher, p_s - p_t must not cancel.

    A row's error is mostly that of its two sums, and a matter of luck: so of many rows.
    """
    _, teacher = reference.example_inputs(100, classes=5000)
    student = teacher + distance * torch.randn_like(teacher)

    def in_torch(s: Tensor, t: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(s, -1), F.log_softmax(t, -1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    truth = with_gradients(reference.softmax_kl, student.double(), teacher.double())[1]
    ours = (with_gradients(softmax_kl, student, teacher)[1] - truth).norm()
    theirs = (with_gradients(in_torch, student, teacher)[1] - truth).norm()
    assert ours <= theirs


def relative_ulps(actual: Tensor, truth: Tensor) -> Tensor:
    return ((actual.double() - truth) / truth).abs() * 2**23


def test_exp_is_accurate(isa):
    """Rows of two classes, the teacher sure of the first: the second's gradient is p_s = exp(a).

    Rounding a, which is about x, costs half an ulp of it: |x| / 2 ulp of the result.
    """
    x = torch.linspace(-86, 5, 20001)
    student = torch.stack([torch.zeros_like(x), x], 1)
    teacher = torch.tensor([0.0, -INF]).expand_as(student)
    gradient = with_gradients(softmax_kl, student, teacher, 1.0, "sum")[1] / 0.5
    ulps = relative_ulps(gradient[:, 1], torch.softmax(student.double(), 1)[:, 1])
    assert (ulps <= 2 + x.abs() / 2).all()


def test_expm1_is_accurate(isa):
    """Student (-x, 0), teacher (0, -x): log-sums that are equal, a - b = -x and x without error."""
    x = torch.logspace(-30, 1.9, 20001)
    zero = torch.zeros_like(x)
    student, teacher = torch.stack([-x, zero], 1), torch.stack([zero, -x], 1)
    gradient = with_gradients(softmax_kl, student, teacher, 1.0, "sum")[1] / 0.5
    truth = torch.tanh(x.double() / 2)
    assert (relative_ulps(gradient, torch.stack([-truth, truth], 1)) <= 4).all()


def test_directional_derivative(isa):
    """The gradients against central differences of the float64 formula."""
    student, teacher = reference.example_inputs(5, classes=40)
    gradients = torch.cat(with_gradients(softmax_kl, student, teacher, 3.0)[1:]) / 0.5
    step = 1e-5
    for _ in range(5):
        direction = torch.randn_like(gradients, dtype=torch.float64)
        ahead, behind = (
            reference.softmax_kl(student + d[:5], teacher + d[5:], 3.0)
            for d in (step * direction, -step * direction)
        )
        slope = (gradients * direction).sum()
        torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


def test_infinities(isa):
    """In the limits: p_t = 0 contributes 0, p_s = 0 < p_t is infinite, and no 0 * inf on the way.

    The classes are spread over blocks of a long row, so that infinities come before, after and
    between the maxima.
    """
    finite_teacher = torch.tensor([1.0, 2.0, 3.0])
    student = torch.tensor([[0.0, -INF, 1], [0, 1, 2], [0, -INF, 1], [-INF, 0, 1], [0, 1, -INF]])
    teacher = torch.stack(
        [torch.tensor([0.0, -INF, 2]), torch.tensor([0.0, -INF, 1]), *[finite_teacher] * 3]
    )
    for classes, at in (
        (3, [0, 1, 2]),
        (5000, [7, 2000, 4999]),
        (5000, [4000, 4001, 3]),
        (40000, [39999, 20000, 7]),
    ):
        long_student = torch.full((5, classes), -INF)
        long_teacher = torch.full((5, classes), -INF)
        long_student[:, at], long_teacher[:, at] = student, teacher
        loss, gradient, _ = with_gradients(softmax_kl, long_student, long_teacher, 2.0, "none")
        expected = reference.softmax_kl(student, teacher, 2.0, "none")
        assert torch.isposinf(loss[2:]).all()
        torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
        difference = torch.softmax(student / 2, 1) - torch.softmax(teacher / 2, 1)
        weighted = 2 * torch.linspace(0.5, 2, 5)[:, None] * difference
        torch.testing.assert_close(gradient[:, at], weighted, rtol=1e-5, atol=1e-7)
        gradient[:, at] = 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.float32).min])
def test_classes_masked_out_of_both_rows_count_nothing(isa, mask):
    student, teacher = reference.example_inputs(3, classes=20000)
    expected = with_gradients(softmax_kl, student[:, 900:17000], teacher[:, 900:17000], 2.0)
    for logits in (student, teacher):
        logits[:, :900] = logits[:, 17000:] = mask
    loss, *gradients = with_gradients(softmax_kl, student, teacher, 2.0)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    for gradient, inside in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(gradient[:, 900:17000], inside, rtol=1e-5, atol=1e-9)
        gradient[:, 900:17000] = 0
        assert (gradient == 0).all()


def test_infinite_only_where_the_teacher_has_a_probability(isa):
    """A class impossible for the student, under a maximum that is found before or after it."""
    student, teacher = torch.zeros(4, 2050), torch.full((4, 2050), -INF)
    student[:, 0] = -INF
    student[2:] = student[2:].flip(1)
    teacher[:, [0, -1]] = torch.tensor([[0.0, 80], [0, 100], [80, 0], [100, 0]])
    assert softmax_kl(student, teacher, 1.0, "none").isinf().tolist() == [True, False] * 2


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("classes", [5, 3000, 40000])
def test_bad_rows_are_nan_and_no_others(isa, bad, classes):
    student, teacher = reference.example_inputs(5, classes=classes)
    student[0, 3] = bad
    teacher[1, classes - 1] = bad
    student[2] = -INF
    teacher[3] = -INF
    for result in with_gradients(softmax_kl, student, teacher, 2.0, "none"):
        assert result[:4].isnan().all()
        assert result[4].isfinite().all()


def test_rows_masked_out_have_no_gradient_even_if_they_are_nan(isa):
    student, teacher = reference.example_inputs(3, classes=40)
    student[1, 3] = NAN
    student.requires_grad_()
    losses = softmax_kl(student, teacher, 2.0, "none")
    torch.where(losses.isnan(), 0.0, losses).sum().backward()
    assert (student.grad[1] == 0).all()
    assert (student.grad[[0, 2]] != 0).all()


def test_layouts(isa):
    student, teacher = reference.example_inputs(6, classes=50)
    expected = with_gradients(softmax_kl, student, teacher, 2.0)
    for other_student, other_teacher in zip(
        non_contiguous(student), reversed(non_contiguous(teacher)), strict=True
    ):
        for a, b in zip(
            with_gradients(softmax_kl, other_student, other_teacher, 2.0), expected, strict=True
        ):
            assert_same_bits(a, b)
    assert_matches_reference(*reference.example_inputs(2, 3, 4, classes=9), 2.0, "none")
    assert_matches_reference(*reference.example_inputs(classes=9), 2.0, "none")


@pytest.mark.parametrize(("shape", "rows"), [((0, 5), 0), ((2, 0, 5), 0), ((3, 0), 3)])
def test_nothing_to_sum(isa, shape, rows):
    student, teacher = torch.randn(2, *shape)
    for reduction, expected in (
        ("sum", 0.0),
        ("batchmean", 0.0 if rows else NAN),
        ("mean", NAN),
    ):
        loss, *gradients = with_gradients(softmax_kl, student, teacher, 2.0, reduction)
        assert_same_bits(loss, torch.tensor(expected))
        assert all(g.shape == shape for g in gradients)
    assert softmax_kl(student, teacher, 2.0, "none").shape == shape[:-1]


@pytest.mark.parametrize(("rows", "classes"), [(301, 1000), (1, 40000), (5, 16500)])
def test_number_of_threads_changes_nothing(isa, threads, rows, classes):
    inputs = (*reference.example_inputs(rows, classes=classes), 2.0)
    threads(1)
    alone = with_gradients(softmax_kl, *inputs)
    threads(3)
    for a, b in zip(alone, with_gradients(softmax_kl, *inputs), strict=True):
        assert torch.equal(a, b)


def test_backward_twice_through_one_graph():
    student, teacher = reference.example_inputs(4, classes=30)
    student.requires_grad_()
    loss = softmax_kl(student, teacher, 2.0)
    (loss * 1000).backward(retain_graph=True)
    first = student.grad.clone()
    student.grad = None
    (loss * 1000).backward()
    assert torch.equal(student.grad, first)


def test_only_the_gradients_that_are_wanted():
    student, teacher = reference.example_inputs(4, classes=30)
    for wanted, other in ((student, teacher), (teacher, student)):
        wanted.requires_grad_()
        softmax_kl(student, teacher).backward()
        assert wanted.grad is not None
        assert other.grad is None
        wanted.requires_grad_(False)
        wanted.grad = None
    with torch.inference_mode():
        assert not softmax_kl(student, teacher).requires_grad


def test_autocast_changes_nothing():
    student, teacher = reference.example_inputs(4, classes=30)
    for dtype in DTYPES:
        logits = student.to(dtype), teacher.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            inside = softmax_kl(*logits, 2.0)
        assert_same_bits(inside, softmax_kl(*logits, 2.0))


def test_errors():
    s = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="must have the same shape"):
        softmax_kl(s, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="must have the same shape"):
        softmax_kl(s, torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match=r"they have \[2, 3\] and \[2\]"):
        softmax_kl(s, torch.tensor([0, 2]))  # labels
    with pytest.raises(ValueError, match=r"student_logits must be float32.*convert it with \.to"):
        softmax_kl(s.double(), s)
    with pytest.raises(ValueError, match="teacher_logits must be float32"):
        softmax_kl(s, s.int())
    for temperature in (0.0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            softmax_kl(s, s, temperature)
    with pytest.raises(ValueError, match="reduction must be 'batchmean', 'sum', 'mean' or 'none'"):
        softmax_kl(s, s, 1.0, "average")
    with pytest.raises(ValueError, match="at least one dimension"):
        softmax_kl(torch.tensor(1.0), torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(3, 37), (2, 0, 5), (4, 2, 9)])
def test_opcheck(shape):
    student, teacher = torch.randn(2, *shape)
    ops = torch.ops.trine
    for wanted in (False, True):
        args = operator_arguments(student.clone().requires_grad_(wanted), teacher)
        torch.library.opcheck(ops.softmax_kl.default, args)
    soft, hard, saved = ops.softmax_kl(*args)
    for for_teacher in (False, True):
        args = operator_arguments(student, teacher.half())
        args = (torch.rand_like(soft), hard, *args, saved.detach(), for_teacher)
        torch.library.opcheck(ops.softmax_kl_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_backward(dynamic):
    inputs = (*reference.example_inputs(2, 5, classes=33), 2.0, "none")
    compiled = torch.compile(softmax_kl, fullgraph=True, dynamic=dynamic)
    for a, b in zip(
        with_gradients(compiled, *inputs), with_gradients(softmax_kl, *inputs), strict=True
    ):
        assert torch.equal(a, b)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return softmax_kl(student, teacher, 2.0)

    inputs = reference.example_inputs(5, classes=33)
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(Loss(), inputs, dynamic_shapes=(rows, rows))
    other = reference.example_inputs(7, classes=33)
    assert torch.equal(program.module()(*other), softmax_kl(*other, 2.0))
