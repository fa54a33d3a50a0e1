"""linear_softmax_kl against the loss written in float64, in chunks of every size."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from devices import all_moved, devices_to_test
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trine.ops import linear_softmax_kl
from trine.ops.linear_softmax_kl import chunks, heads, operator, reference

NAN = float("nan")
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
)
DEVICES = ("cpu", *devices_to_test("softmax_kl"))
LIMITS = (None, 20000, 3000)  # bytes: all rows at once, a few, one row


def results_of(function, tensors, dtype=torch.float32, device="cpu", **options) -> list[Tensor]:
    """The loss, and its gradients of the student's hidden states, weight and bias."""
    tensors = [None if t is None else t.detach().to(device, dtype) for t in tensors]
    options = all_moved(options, device)
    h, w, b, *teacher = tensors
    trained = [t.requires_grad_() for t in (h, w, b) if t is not None]
    biases = {"student_bias": b, "teacher_bias": teacher[2]}
    with refusing_to_wait(device):
        loss = function(h, w, *teacher[:2], **biases, **options)
        scalar = loss if loss.dim() == 0 else (loss * upstream_of(loss)).sum()
        gradients = torch.autograd.grad(scalar, trained)
    return [t.cpu() for t in (loss.detach(), *gradients)]


@contextmanager
def refusing_to_wait(device: str) -> Iterator[None]:
    """What would make the CPU wait for a GPU is an error."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def upstream_of(losses: Tensor) -> Tensor:
    upstream = torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype, device=losses.device)
    return upstream.reshape(losses.shape)


def truth_of(tensors, **options) -> list[Tensor]:
    options.pop("memory_limit", None)
    return results_of(reference.linear_softmax_kl, tensors, torch.float64, **options)


def models(*leading: int, classes: int = 37, dtype=torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, weight and bias of a student, and of a teacher."""
    h, w, th, tw = reference.example_inputs(*leading, classes=classes)
    biases = torch.randn(2, classes)
    return tuple(t.to(dtype) for t in (h, w, biases[0], th, tw, biases[1]))


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a.isnan(), e.isnan())
        a, e = a.double().nan_to_num(), e.nan_to_num()
        assert (a - e).norm() <= tolerance * e.norm() + 1e-7


@st.composite
def options(draw) -> dict:
    rows, classes = draw(st.integers(1, 9)), draw(st.integers(2, 40))
    chosen = {
        "temperature": draw(st.sampled_from([0.7, 1.0, 3.0])),
        "reduction": draw(st.sampled_from(["batchmean", "sum", "mean", "none"])),
        "divergence": draw(st.sampled_from(DIVERGENCES)),
        "beta": draw(st.sampled_from([0.1, 0.5])),
        "scale_by_t_squared": draw(st.booleans()),
        "logit_scale": draw(st.sampled_from([(1.0, 1.0), (0.5, 2.0)])),
        "softcap": draw(st.sampled_from([(None, None), (4.0, None), (5.0, 9.0)])),
        "memory_limit": draw(st.sampled_from([None, 3000, 500, 1])),
    }
    if chosen["reduction"] == "batchmean" and draw(st.booleans()):
        chosen["denominator"] = 5.0
    if draw(st.booleans()):
        chosen["row_weight"] = torch.tensor(
            draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=rows, max_size=rows))
        )
    if draw(st.booleans()):
        ignored = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
        labels = torch.arange(rows) * 7 % classes
        chosen["labels"] = torch.where(torch.tensor(ignored), -100, labels)
        chosen["alpha"] = draw(st.sampled_from([0.0, 0.3, 1.0]))
        chosen["label_smoothing"] = draw(st.sampled_from([0.0, 0.1]))
        if draw(st.booleans()):
            chosen["class_weight"] = torch.linspace(0.5, 2, classes)
    chosen["rows"], chosen["classes"] = rows, classes
    chosen["padding"] = draw(st.sampled_from([(0, 0), (3, 0), (1, 4)]))
    chosen["biases"] = draw(st.tuples(st.booleans(), st.booleans()))
    chosen["teacher"] = draw(st.sampled_from(["hidden", "logits", "log", "some"]))
    return chosen


@given(options())
@settings(max_examples=60, deadline=None)
def test_every_option_agrees_with_the_reference(chosen):
    rows, classes = chosen.pop("rows"), chosen["classes"]
    of_student, of_teacher = chosen.pop("padding")
    torch.manual_seed(rows * 41 + classes)
    h, w, b, th, tw, tb = models(rows, classes=classes + max(of_student, of_teacher))
    w, b = w[: classes + of_student], b[: classes + of_student]
    tw, tb = tw[: classes + of_teacher], tb[: classes + of_teacher]
    with_bias, with_teacher_bias = chosen.pop("biases")
    b, tb = b if with_bias else None, tb if with_teacher_bias else None
    kind = chosen.pop("teacher")
    if kind != "hidden":
        th, tw, tb = reference.logits(th, tw, tb).float(), None, None
    if kind in ("log", "some"):
        th = torch.log_softmax(th[:, :classes], -1)
        chosen["teacher_is_log_probabilities"] = kind == "log"
    if kind == "some":
        th, chosen["teacher_indices"] = th.topk(max(1, classes // 3), -1)
    tensors = (h, w, b, th, tw, tb)
    assert_close(results_of(linear_softmax_kl, tensors, **chosen), truth_of(tensors, **chosen))


@pytest.fixture(params=["16-bit products", "products in fp32"])
def in_fp32(request, monkeypatch) -> bool:
    """Whether 16-bit weights are multiplied in fp32 on the CPU, whatever this processor has."""
    wide = request.param == "products in fp32"
    dtypes = frozenset({torch.bfloat16, torch.float16} if wide else ())
    monkeypatch.setattr(heads, "FASTER_IN_FP32", dtypes)
    return wide


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_16_bits_lose_no_more_than_eager(in_fp32, device, dtype, with_labels, limit):
    """Sums of the weight's gradient beside it, in one chunk, and by classes afterwards."""
    tensors = models(60, classes=301, dtype=dtype)
    labels = torch.arange(60) if with_labels else None
    options = {"labels": labels, "label_smoothing": 0.1} if with_labels else {}

    def eager(h, w, th, tw, student_bias, teacher_bias, **_):
        s, t = F.linear(h, w, student_bias), F.linear(th, tw, teacher_bias)
        soft = F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")
        if not with_labels:
            return soft
        return (soft + F.cross_entropy(s, labels.to(s.device), label_smoothing=0.1)) / 2

    truth = truth_of(tensors, **options)
    ours = results_of(linear_softmax_kl, tensors, dtype, device, memory_limit=limit, **options)
    assert abs(ours[0] - truth[0]) <= 2e-3 * truth[0]
    eager_ones = results_of(eager, tensors, dtype, device, **options)
    for actual, theirs, expected in zip(ours[1:], eager_ones[1:], truth[1:], strict=True):
        assert actual.dtype == dtype
        assert error(actual, expected) <= error(theirs, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("device", DEVICES)
def test_sums_by_classes_equal_those_by_rows(in_fp32, device, divergence):
    """Of bf16 weights; every option that a block of classes treats apart."""
    tensors = models(40, classes=301, dtype=torch.bfloat16)
    labels = torch.arange(40) * 7
    labels[3] = -100
    options = dict(
        temperature=2.0,
        divergence=divergence,
        labels=labels,
        class_weight=torch.rand(301) + 0.5,
        label_smoothing=0.2,
        softcap=(6.0, 9.0),
        logit_scale=(0.8, 1.2),
        row_weight=torch.rand(40),
    )
    call = partial(results_of, linear_softmax_kl, tensors, torch.bfloat16, device, **options)
    at_once = call()
    for limit in (30000, 3000):
        later = call(memory_limit=limit)
        for a, e in zip(later, at_once, strict=True):
            assert error(a, e.double()) < 6e-3


class Allocations(TorchDispatchMode):
    """The most bytes that tensors made inside the operator held at a time, and how often what was
    called."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.alive, self.most, self.calls = set(), [], 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is operator.op:
            tensors = [t for t in args if isinstance(t, Tensor)]
            self.given = {t.untyped_storage().data_ptr() for t in tensors}
            with self:
                return operator._compute(*args)
        result = function(*args, **(kwargs or {}))
        self.calls[function] = self.calls.get(function, 0) + 1
        for t in result if isinstance(result, tuple) else (result,):
            if isinstance(t, Tensor):
                self.alive.append(weakref.ref(t))
        tensors = [t for ref in self.alive if (t := ref()) is not None]
        self.alive = [weakref.ref(t) for t in tensors]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        bytes_ = sum(size for at, size in storages.items() if at not in self.given)
        self.most = max(self.most, bytes_)
        return result


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "products"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "cast")]
)
@pytest.mark.parametrize("limit", [1 << 20, 600_000, 1 << 18])
def test_the_memory_limit_is_kept(in_fp32, limit, dtype, products, masked):
    classes, width = 4001, 16
    h, w, th, tw = reference.example_inputs(40, classes=classes, widths=(width, 16), dtype=dtype)
    h.requires_grad_(), w.requires_grad_()
    labels = torch.arange(40)
    labels[::9] = -100 if masked else 0
    weight_bytes = w.numel() * w.element_size()
    with Allocations() as allocations, torch.autocast("cpu", enabled=products is not None):
        loss = linear_softmax_kl(h, w, th, tw, labels=labels, memory_limit=limit)
    rows = 40 * (4 * 10 + 8 * 4)  # vectors, and what is saved of each
    allowed = limit + weight_bytes + h.numel() * h.element_size() + rows
    assert weight_bytes < allocations.most <= allowed + 4096
    loss.backward()
    assert w.grad.isfinite().all()


def test_without_gradients_only_the_loss_is_computed():
    h, w, b, *teacher = models(9)
    backward = torch.ops.trine.softmax_kl_backward.default
    for trains, calls in (((), 0), ((h,), 1), ((w,), 1), ((b,), 1)):
        for t in (h, w, b):
            t.requires_grad_(any(t is one for one in trains))
        biases = {"student_bias": b, "teacher_bias": teacher[2]}
        with Allocations() as allocations:
            loss = linear_softmax_kl(h, w, *teacher[:2], **biases, memory_limit=10**6)
            with torch.no_grad():
                linear_softmax_kl(h, w, *teacher[:2], **biases)
        pieces = 9 if calls else 0  # few rows: a piece is one
        assert allocations.calls.get(backward, 0) == pieces
        assert loss.requires_grad == bool(trains)
        if trains:
            (gradient,) = torch.autograd.grad(loss, trains)
            assert gradient.shape == trains[0].shape


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", LIMITS)
def test_rows_that_do_not_count_are_not_read(in_fp32, monkeypatch, limit, dtype, on_gpu):
    """They are gathered on the CPU; `on_gpu` takes the way without knowing their number."""
    if on_gpu:

        class Masked(heads.Rows):
            def __init__(self, rows, mask):
                self.index, self.mask, self.count = None, mask, rows

        monkeypatch.setattr(chunks, "Rows", Masked)
        monkeypatch.setattr(chunks, "_PIECES", 1)
    h, w, b, th, tw, tb = models(3, 4, classes=301, dtype=dtype)
    labels = torch.arange(12).reshape(3, 4)
    labels[0, 1] = labels[2, 3] = -100
    counted = labels.flatten() >= 0
    bad_h, bad_th = h.clone(), th.clone()
    bad_h[labels < 0], bad_th[labels < 0] = NAN, NAN
    bad = (bad_h, w, b, bad_th, tw, tb)
    ours = results_of(linear_softmax_kl, bad, dtype, labels=labels, memory_limit=limit)
    kept = [t.flatten(0, 1)[counted] for t in (h, th)]
    truth = truth_of((kept[0], w, b, kept[1], tw, tb), labels=labels.flatten()[counted])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    of_hidden = ours[1].flatten(0, 1)
    assert (of_hidden[~counted] == 0).all()
    assert_close([ours[0], of_hidden[counted], *ours[2:]], truth, tolerance)


def test_no_rows_and_no_rows_that_count():
    for rows, options in ((0, {}), (3, {"row_weight": torch.zeros(3)})):
        tensors = models(rows)
        for reduction, is_zero in (("sum", True), ("batchmean", False), ("mean", False)):
            loss, *gradients = results_of(
                linear_softmax_kl, tensors, reduction=reduction, **options
            )
            assert loss == 0 if is_zero else loss.isnan()
            assert all((g == 0).all() for g in gradients)


def test_the_loss_may_be_used_twice_and_its_graph_again():
    h, w, _, *teacher = models(20)
    h.requires_grad_(), w.requires_grad_()
    loss = linear_softmax_kl(h, w, *teacher[:2], memory_limit=4000)
    (loss * 3 + loss).backward(retain_graph=True)
    first = h.grad.clone(), w.grad.clone()
    (4 * loss).backward(retain_graph=True)  # adds, in place, what backward gave before
    (4 * loss).backward()
    for actual, expected in zip((h.grad, w.grad), first, strict=True):
        torch.testing.assert_close(actual, 3 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_second_derivatives(reduction):
    h, w, b, *teacher = models(3, classes=5)
    h[2] = NAN
    labels = torch.tensor([1, 4, -100])

    def penalty(function, dtype):
        trained = [t.to(dtype).requires_grad_() for t in (h, w, b)]
        loss = function(
            *trained[:2], *teacher[:2], 2.0, reduction, student_bias=trained[2], labels=labels
        )
        first = torch.autograd.grad((loss**2).sum(), trained, create_graph=True)
        return torch.autograd.grad(sum((g[:2] ** 2).sum() for g in first), trained)

    clean = h.nan_to_num()
    ours = penalty(linear_softmax_kl, torch.float32)
    h = clean
    assert_close(ours, penalty(reference.linear_softmax_kl, torch.float64), 1e-4)


def test_autocast_is_that_of_linear(in_fp32):
    """fp32 weights keep an fp32 gradient, which no 16-bit number has been on the way to."""
    h, w, b, th, tw, tb = models(60, classes=301)
    biases = {"student_bias": b, "teacher_bias": tb}

    def eager(h, w, th, tw, student_bias, teacher_bias):
        s, t = F.linear(h, w, student_bias), F.linear(th, tw, teacher_bias)
        return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean")

    truth = truth_of((h, w, b, th, tw, tb))
    for limit in LIMITS:
        errors = []
        for function, options in ((linear_softmax_kl, {"memory_limit": limit}), (eager, {})):
            trained = [t.clone().requires_grad_() for t in (h, w)]
            with torch.autocast("cpu", torch.bfloat16):
                loss = function(*trained, th, tw, **biases, **options)
            gradients = torch.autograd.grad(loss, trained)
            assert all(g.dtype == torch.float32 for g in gradients)
            errors.append([error(g, e) for g, e in zip(gradients, truth[1:3], strict=True)])
        for ours, theirs in zip(*errors, strict=True):
            # A product of a few classes is rounded to 16 bits before it is added, on the CPU.
            if in_fp32:
                assert ours < 1e-5
                continue
            assert 1e-4 < ours <= (1 if limit is None else 1.05) * theirs


def test_threads_change_nothing(threads):
    tensors = models(70, classes=2000)
    results = []
    for number in (1, 3):
        threads(number)
        results.append(results_of(linear_softmax_kl, tensors, memory_limit=1 << 18))
    for a, b in zip(*results, strict=True):  # torch's products are nearly, not quite, the same
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_teacher_is_a_constant():
    h, w, _, th, tw, _ = models(4)
    w.requires_grad_(), th.requires_grad_()
    loss = linear_softmax_kl(h, w, 2 * h, w)  # the student's own head, too
    (gradient,) = torch.autograd.grad(loss, w)
    expected = truth_of((h, w, None, 2 * h, w, None))
    torch.testing.assert_close(gradient.double(), expected[2], rtol=1e-4, atol=1e-6)
    assert not linear_softmax_kl(h, w.detach(), th, tw).requires_grad


def test_terms():
    h, w, _, th, tw, _ = models(6)
    h.requires_grad_()
    labels = torch.arange(6)
    terms = linear_softmax_kl(h, w, th, tw, labels=labels, alpha=0.3, return_terms=True)
    torch.testing.assert_close(terms.loss, 0.3 * terms.soft + 0.7 * terms.hard)
    assert terms.loss.requires_grad
    assert not terms.soft.requires_grad
    assert not terms.hard.requires_grad
    plain = linear_softmax_kl(h, w, th, tw, return_terms=True)
    assert plain.hard is None
    torch.testing.assert_close(plain.loss, plain.soft)


def test_opcheck_and_compile():
    h, w, b, th, tw, _ = models(6)
    labels = torch.arange(6)
    for t in (h, w, b):
        t.requires_grad_()
    arguments = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is operator.op:
                arguments.append(args)
            return function(*args, **(kwargs or {}))

    def function(h: Tensor, w: Tensor) -> Tensor:
        return linear_softmax_kl(
            h, w, th, tw, 2.0, student_bias=b, labels=labels, memory_limit=3000
        )

    with Recorded():
        function(h, w)
    torch.library.opcheck(operator.op, (h, w, b, *arguments[0][3:]))
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        loss = call(h, w)
        results.append([loss, *torch.autograd.grad(2 * loss, (h, w, b))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-7)


def test_errors():
    h, w, b, th, tw, tb = models(4)
    cases = [
        ((h, w, th[:2], tw), {}, "same leading dimensions"),
        ((h, w[:, :3], th, tw), {}, r"student_weight must be \[classes, 12\]"),
        ((h, w, th, tw[:5]), {}, "same number of classes, or `classes`"),
        ((h, w, th, tw), {"classes": 38}, r"classes must lie in \[1, 37\]"),
        ((h, w, th, tw), {"student_bias": b[:3]}, r"student_bias must be \[37\]"),
        ((h, w.bfloat16(), th, tw), {}, "a model's tensors must have one dtype"),
        ((h.double(), w.double(), th, tw), {}, "must be float32, bfloat16 or float16"),
        ((h, w, th, tw), {"memory_limit": 0}, "memory_limit must be positive"),
        ((h, w, th, tw), {"reduction": "max"}, "reduction must be"),
        ((h, w, th, tw), {"teacher_is_log_probabilities": True}, "without a teacher_weight"),
        ((h, w, th), {"teacher_bias": tb}, "teacher_bias needs a teacher_weight"),
        ((h, w, th, tw), {"divergence": "kl"}, "divergence must be one of"),
        ((h, w, th, tw), {"row_weight": torch.ones(3)}, "row_weight must have"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_softmax_kl(*args, **options)
    with pytest.raises(IndexError, match="the label of row"):
        linear_softmax_kl(h, w, th, tw, labels=torch.tensor([0, 1, 37, 2]))
