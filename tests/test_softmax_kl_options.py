"""softmax_kl with labels, partial teachers, caps, padding and masks: any combination against the
reference, and against a computation in float64 written out row by row."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import isas_to_test
from linear_inputs import DTYPES
from test_softmax_kl import operator_arguments
from torch import Tensor
from trine import backends
from trine.ops import softmax_kl
from trine.ops.softmax_kl import reference

INF, NAN = torch.inf, torch.nan
NAMES = sorted(reference.DIVERGENCES)


def divergence_by_hand(name: str, p: Tensor, q: Tensor, beta: float) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a == 0, 0.0, a * (torch.where(a == 0, 1.0, a / b)).log()).sum()

    share = 1 - beta if name == "skewed_reverse_kl" else beta
    m = share * q + (1 - share) * p
    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m),
        "skewed_forward_kl": lambda: kl(q, m),
        "skewed_reverse_kl": lambda: kl(p, m),
        "total_variation": lambda: (p - q).abs().sum() / 2,
    }[name]()


def by_hand(student: Tensor, teacher: Tensor, temperature: float, o: dict) -> Tensor:
    """The sum of a row's loss over rows, by probabilities and loops, in float64."""
    classes, total = o["classes"], 0.0

    def seen(logits: Tensor, i: int) -> Tensor:
        z, cap = logits[:classes].double() * o["logit_scale"][i], o["softcap"][i]
        return z if cap is None else cap * (z / cap).tanh()

    for i in range(student.shape[0]):
        weight, label = o["row_weight"][i].double(), o["labels"][i]
        if weight == 0 or label == -100:
            continue
        z = seen(student[i], 0)
        p = (z / temperature).softmax(0)
        if o["teacher_indices"] is not None:
            at = o["teacher_indices"][i]
            known = [(int(c), teacher[i, j].double().exp()) for j, c in enumerate(at) if c >= 0]
            rest = [c for c in range(classes) if c not in [c for c, _ in known]]
            rest_of_1 = torch.tensor(1.0).double() - sum(q for _, q in known)
            tail = rest_of_1.clamp(min=2.0**-23) if rest else 0 * rest_of_1
            q = torch.stack([*(q for _, q in known), tail])
            p = torch.stack([*(p[c] for c, _ in known), p[rest].sum()])
        elif o["teacher_is_log_probabilities"]:
            q = teacher[i, :classes].double().softmax(0)
        else:
            q = (seen(teacher[i], 1) / temperature).softmax(0)
        soft = temperature**2 * divergence_by_hand(o["divergence"], p, q, o["beta"])
        logs = z - z.exp().sum().log() if z.max() < 600 else z.log_softmax(0)
        of_class = o["class_weight"].double()
        smoothing = o["label_smoothing"]
        hard = -(1 - smoothing) * of_class[label] * logs[label]
        hard = hard - smoothing * (of_class * logs).mean()
        total = total + weight * (o["alpha"] * soft + (1 - o["alpha"]) * hard)
    return total


def log_probabilities(rows: int, k: int, classes: int) -> tuple[Tensor, Tensor]:
    """Those of k of the classes, in any order."""
    whole = torch.log_softmax(2 * torch.randn(rows, classes), -1)
    at = torch.rand(rows, classes).argsort(1)[:, :k]
    return whole.gather(1, at), at


@settings(max_examples=150, deadline=None)
@given(
    isa=st.sampled_from(isas_to_test("softmax_kl")),
    divergence=st.sampled_from(NAMES),
    teacher_kind=st.sampled_from(["logits", "log", "some", "all"]),
    rows=st.integers(1, 4),
    classes=st.sampled_from([2, 5, 16, 33, 100, 515]),
    padding=st.tuples(st.sampled_from([0, 3]), st.sampled_from([0, 5])),
    caps=st.tuples(*2 * [st.sampled_from([None, 3.0, 30.0])]),
    scales=st.tuples(*2 * [st.sampled_from([1.0, 0.5, 3.0])]),
    temperature=st.sampled_from([0.7, 1.0, 2.0, 4.0]),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    dtypes=st.tuples(*2 * [st.sampled_from(DTYPES)]),
    seed=st.integers(0, 1000),
)
def test_any_combination(
    isa,
    divergence,
    teacher_kind,
    rows,
    classes,
    padding,
    caps,
    scales,
    temperature,
    beta,
    alpha,
    smoothing,
    dtypes,
    seed,
):
    torch.manual_seed(seed)
    student = (2 * torch.randn(rows, classes + padding[0])).to(dtypes[0])
    student[:, classes:] = NAN
    indices = None
    if teacher_kind in ("some", "all"):
        k = classes if teacher_kind == "all" else min(classes - 1, 7)
        teacher, indices = log_probabilities(rows, k, classes)
        indices[0, 0] = -1 if teacher_kind == "some" else indices[0, 0]
        indices = indices.int() if seed % 2 else indices
        dtypes = (dtypes[0], torch.float32)
    else:
        teacher = (2 * torch.randn(rows, classes + padding[1])).to(dtypes[1])
        teacher[:, classes:] = NAN
    labels = torch.randint(classes, (rows,))
    weight = torch.rand(rows) + 0.1
    if rows > 2:
        labels[0], weight[1] = -100, 0
        student[:2] = NAN
        teacher[:2] = NAN
    options = dict(
        divergence=divergence,
        beta=beta,
        labels=labels,
        alpha=alpha,
        label_smoothing=smoothing,
        class_weight=torch.rand(classes) + 0.1,
        teacher_indices=indices,
        teacher_is_log_probabilities=teacher_kind == "log",
        classes=classes,
        softcap=caps,
        logit_scale=scales,
        row_weight=weight,
    )

    def with_gradients(function, *logits: Tensor) -> tuple[Tensor, ...]:
        logits = [z.detach().requires_grad_() for z in logits]
        wanted = logits if indices is None else logits[:1]
        loss = function(*logits)
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        return loss.detach(), *gradients

    with backends.cpu_isa(isa):
        actual = with_gradients(
            lambda s, t: softmax_kl(s, t, temperature, "sum", **options), student, teacher
        )
    wide = student.double(), teacher.double()
    truths = (
        with_gradients(
            lambda s, t: reference.softmax_kl(s, t, temperature, "sum", **options), *wide
        ),
        with_gradients(lambda s, t: by_hand(s, t, temperature, options), *wide),
    )
    floor = 1e-6 * temperature**2  # where a divergence is small it is all rounding
    for got, *expected in zip(actual, *truths, strict=True):
        for truth in expected:
            # By hand a NaN of an unread row would show as 0 * NaN.
            truth = truth.nan_to_num() if truth.dim() else truth
            unavoidable = (truth.to(got.dtype).double() - truth).norm()
            error = (got.double() - truth).norm()
            assert error <= 3e-5 * truth.norm() + 1.1 * unavoidable + floor
    gradient = actual[1]
    assert (gradient[:, classes:] == 0).all()
    if rows > 2:
        assert (gradient[:2] == 0).all()


def results_of(student: Tensor, teacher: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    """The loss and its gradient to the student."""
    student = student.detach().requires_grad_()
    loss = softmax_kl(student, teacher, *args, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), student)


def truth_of(student: Tensor, teacher: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    student = student.detach().double().requires_grad_()
    loss = reference.softmax_kl(student, teacher.double(), *args, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), student)


def assert_close(actual: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    assert torch.isfinite(actual).all()
    assert (actual.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("rows", [2, 50])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_rows_of_several_parts(isa, threads, divergence, rows):
    """Few rows are shared by all threads, many are not; nothing depends on which."""
    student, teacher = reference.example_inputs(rows, classes=33000)
    options = dict(
        divergence=divergence,
        labels=torch.randint(33000, (rows,)),
        label_smoothing=0.1,
        class_weight=torch.rand(33000),
        softcap=(20.0, None),
    )
    results = []
    for number in (1, 3):
        threads(number)
        results.append(results_of(student, teacher, 2.0, "none", **options))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    options["labels"] = options["labels"][-2:]
    last = results_of(student[-2:], teacher[-2:], 2.0, "none", **options)
    for a, b in zip(results[0], last, strict=True):
        assert torch.equal(a[-2:], b)
    truth = truth_of(student[-2:], teacher[-2:], 2.0, "none", **options)
    for a, b in zip(last, truth, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("divergence", NAMES)
def test_a_few_classes_of_a_long_row(isa, divergence):
    student, _ = reference.example_inputs(3, classes=33000)
    known, indices = log_probabilities(3, 64, 33000)
    indices[:, 40:50] = -1
    options = dict(divergence=divergence, teacher_indices=indices, beta=0.3)
    for offset in (0.0, 1e4):  # the student's probability of the tail must not suffer
        actual = results_of(student + offset, known, 2.0, **options)
        truth = truth_of(student + offset, known, 2.0, **options)
        for a, b in zip(actual, truth, strict=True):
            assert_close(a, b, 3e-5)  # a tail of nearly 1 is known to 6e-8, such losses are 1e-2


@pytest.mark.parametrize("divergence", NAMES)
def test_identical_rows_and_huge_logits(isa, divergence):
    for dtype in DTYPES:
        student, teacher = reference.example_inputs(4, classes=1500, dtype=dtype)
        options = dict(divergence=divergence, softcap=30.0, logit_scale=0.7)
        for result in results_of(student, student, 3.0, "none", **options):
            assert (result == 0).all()
        student, teacher = student * 3e3, teacher.float().sign() * 1e4
        labels = torch.zeros(4, dtype=torch.int64)
        for result in results_of(student, teacher, 1.0, divergence=divergence, labels=labels):
            assert torch.isfinite(result).all()


@pytest.mark.parametrize("divergence", NAMES)
def test_gradient_in_bf16_of_a_large_vocabulary(divergence):
    student, teacher = (z.bfloat16() for z in torch.randn(2, 2, 128256))
    labels = torch.tensor([5, 128255])
    _, gradient = results_of(student, teacher, divergence=divergence, labels=labels)
    truth = truth_of(student, teacher, divergence=divergence, labels=labels)[1]
    assert_close(gradient, truth, 0.005)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean", 7.0])
def test_reductions_of_both_terms(reduction):
    student, teacher = reference.example_inputs(3, 4, classes=11)
    labels = torch.randint(11, (3, 4))
    labels[1, 2] = labels[0, 0] = 10
    options = dict(labels=labels, ignore_index=10, alpha=0.3, label_smoothing=0.2)
    if reduction == 7.0:
        reduction, options["denominator"] = "batchmean", 7.0
    for weights in ({}, {"class_weight": torch.rand(11)}, {"row_weight": torch.rand(3, 4)}):
        actual = results_of(student, teacher, 2.0, reduction, **options, **weights)
        truth = truth_of(student, teacher, 2.0, reduction, **options, **weights)
        for a, b in zip(actual, truth, strict=True):
            assert a.shape == b.shape
            assert_close(a, b)
    if reduction == "batchmean" and "denominator" not in options:
        hard = softmax_kl(student, teacher, 2.0, **options | {"alpha": 0.0})
        args = (student.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(
            hard, F.cross_entropy(*args, ignore_index=10, label_smoothing=0.2)
        )


def test_terms():
    student, teacher = reference.example_inputs(5, classes=9)
    student.requires_grad_()
    labels = torch.randint(9, (5,))
    for alpha in (0.0, 0.3, 1.0):
        found = softmax_kl(student, teacher, 2.0, labels=labels, alpha=alpha, return_terms=True)
        torch.testing.assert_close(found.loss, alpha * found.soft + (1 - alpha) * found.hard)
        torch.testing.assert_close(found.soft, softmax_kl(student, teacher, 2.0))
        torch.testing.assert_close(found.hard, F.cross_entropy(student, labels))
        assert found.loss.requires_grad
        assert not found.soft.requires_grad
        assert not found.hard.requires_grad
    alone = softmax_kl(student, teacher, 2.0, return_terms=True)
    assert alone.hard is None
    assert torch.equal(alone.loss, alone.soft)


def test_classes_of_no_probability(isa):
    student, teacher = reference.example_inputs(2, classes=600)
    student[:, 100:200] = teacher[:, 100:200] = -INF
    labels = torch.tensor([3, 150])
    wide = student.double().requires_grad_()
    hard = F.cross_entropy(wide, labels, reduction="none")
    _, actual = results_of(student, teacher, labels=labels, alpha=0.0, reduction="none")
    loss = softmax_kl(student, teacher, labels=labels, alpha=0.0, reduction="none")
    torch.testing.assert_close(loss, hard.float())  # of the second infinite
    truth = torch.autograd.grad(hard.sum(), wide)[0]
    torch.testing.assert_close(actual, truth.float(), rtol=1e-5, atol=1e-7)


def test_the_loss_may_be_used_twice():
    student, teacher = reference.example_inputs(4, classes=300)
    student.requires_grad_()
    loss = softmax_kl(student, teacher, labels=torch.arange(4), softcap=5.0)
    (loss * 3 + loss).backward(retain_graph=True)
    first, student.grad = student.grad, None
    (4 * loss).backward()
    torch.testing.assert_close(first, student.grad, rtol=1e-6, atol=0)


def test_a_sum_over_many_rows_does_not_depend_on_threads(threads):
    student, teacher = torch.randn(2, 40000, 3)
    losses = []
    for number in (1, 3):
        threads(number)
        losses.append(softmax_kl(student, teacher, 2.0, labels=torch.zeros(40000).long()))
    assert torch.equal(*losses)


SECOND = {
    "labels": dict(labels=torch.tensor([0, 4]), label_smoothing=0.2, class_weight=torch.rand(5)),
    "seen": dict(softcap=(4.0, 5.0), logit_scale=(0.7, 1.5), classes=4),
    "log": dict(teacher_is_log_probabilities=True),
    "known": dict(teacher_indices=torch.tensor([[4, 1], [2, -1]])),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(name):
    student, teacher = torch.randn(2, 2, 5)
    if name == "known":
        teacher = torch.tensor([[-1.0, -2], [-0.7, 0]])

    def loss(s: Tensor) -> Tensor:
        return softmax_kl(s, teacher, 2.0, divergence="jsd", **SECOND[name])

    student.requires_grad_()
    assert torch.autograd.gradcheck(loss, student, eps=1e-2, atol=2e-3, rtol=1e-2)
    assert torch.autograd.gradgradcheck(loss, student, eps=1e-2, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("name", ["labels", "known"])
def test_opcheck_and_compile(name):
    student, teacher = reference.example_inputs(2, classes=5)
    options = dict(SECOND[name])
    if name == "known":
        teacher = torch.log_softmax(teacher, -1)[:, :2].contiguous()
    mask = torch.tensor([True, False])
    arguments = operator_arguments(
        student.requires_grad_(),
        teacher,
        labels=options.get("labels"),
        class_weight=options.get("class_weight"),
        teacher_indices=options.get("teacher_indices"),
        student_cap=4.0,
        row_mask=mask,
    )
    ops = torch.ops.trine
    torch.library.opcheck(ops.softmax_kl.default, arguments)
    with torch.no_grad():
        soft, hard, saved = ops.softmax_kl(*arguments)
    for for_teacher in (False, True)[: 1 if name == "known" else 2]:
        backward = (torch.ones_like(soft), torch.ones_like(hard), *arguments, saved, for_teacher)
        torch.library.opcheck(ops.softmax_kl_backward.default, backward)

    def function(s: Tensor) -> Tensor:
        return softmax_kl(s, teacher, 2.0, **options)

    gradients = [
        torch.autograd.grad(f(student), student)[0]
        for f in (function, torch.compile(function, fullgraph=True))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_errors():
    s = torch.zeros(2, 3)
    labels = torch.tensor([0, 3])
    with pytest.raises(IndexError, match=r"the label of row 1 is 3; it must lie in \[0, 3\)"):
        softmax_kl(s, s, labels=labels)
    with pytest.raises(ValueError, match=r"labels must be int64 class indices of shape \[2\]"):
        softmax_kl(s, s, labels=labels.int())
    known = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(IndexError, match="a teacher index of row 1 is 3"):
        softmax_kl(s, s[:, :2], teacher_indices=known)
    with pytest.raises(ValueError, match=r"teacher_indices must have the shape .* \[2, 3\]"):
        softmax_kl(s, s, teacher_indices=known)
    with pytest.raises(ValueError, match="teacher_indices must be int64 or int32"):
        softmax_kl(s, s[:, :2], teacher_indices=known.float())
    with pytest.raises(ValueError, match="log-probabilities anyway"):
        softmax_kl(s, s[:, :2], teacher_indices=known, teacher_is_log_probabilities=True)
    with pytest.raises(ValueError, match="`classes` must tell how many"):
        softmax_kl(s, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"classes must lie in \[0, 3\].*it is 4"):
        softmax_kl(s, torch.zeros(2, 4), classes=4)
    for options, words in (
        (dict(alpha=1.5), r"alpha must lie in \[0, 1\]"),
        (dict(label_smoothing=-0.1), r"label_smoothing must lie in \[0, 1\]"),
        (dict(class_weight=torch.ones(2)), "a value for each of the 3 classes"),
        (dict(softcap=-1.0), "the student's soft-cap must be positive"),
        (dict(logit_scale=(1.0, 0.0)), "the teacher's logit scale must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            softmax_kl(s, s, labels=torch.tensor([0, 1]), **options)
    with pytest.raises(ValueError, match="which needs labels"):
        softmax_kl(s, s, label_smoothing=0.1)
