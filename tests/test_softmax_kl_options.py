"""softmax_kl with labels, partial teachers, caps, padding and masks: any combination against the
reference, and against a computation in float64 written out row by row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import isas_to_test
from linear_inputs import DTYPES
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
