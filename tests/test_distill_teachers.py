"""Who teaches: frozen models, ensembles, averages, cohorts and exits, by hand in float64."""

import pytest
import torch
from torch import nn
from trine.distill import Average, Cohort, Ensemble, Exits, Frozen, LearnTogether
from trine.distill.calls import as_batch, call
from trine.distill.capture import Capture


def log_softmax(row):
    return row - row.exp().sum().log()


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


class Net(nn.Module):
    def __init__(self, classes=5) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.drop(self.body(x).relu()))


def test_frozen_is_in_eval_mode_without_gradients():
    net = Net()
    teacher = Frozen(net, {"h": "body"})
    net.train()  # by somebody who means another
    x = torch.randn(3, 4)
    view = teacher({"inputs": x, "labels": torch.zeros(3)}, {})
    assert view.keys() == {"logits", "h"}
    assert torch.equal(view["logits"], teacher({"inputs": x}, {})["logits"])  # no dropout
    assert not view["logits"].requires_grad
    assert not any(p.requires_grad for p in net.parameters())


def test_frozen_in_a_lower_precision():
    net = Net()
    x = torch.randn(3, 4)
    expected = net.eval()(x)
    view = Frozen(net, dtype=torch.bfloat16, device="cpu")({"inputs": x}, {"logits": x})
    assert view["logits"].dtype == torch.bfloat16
    torch.testing.assert_close(view["logits"].float(), expected, atol=0.02, rtol=0.02)


def constant(*rows):
    logits = torch.tensor(rows)
    return lambda batch, student: {"logits": logits, "h": logits + 1}


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0], "confidence"])
def test_ensembles(mean, weights):
    rows = [torch.randn(2, 5), torch.randn(2, 5)]
    teachers = [constant(*z.tolist()) for z in rows]
    view = Ensemble(teachers, weights, mean=mean)({}, {})
    assert torch.equal(view["h"], rows[0] + 1)
    for r in range(2):
        z = [rows[i][r].double() for i in range(2)]
        p = [log_softmax(row).exp() for row in z]
        if weights == "confidence":
            sure = [(a * a.log()).sum().exp() for a in p]  # exp(-entropy)
            shares = [s / sum(sure) for s in sure]
        else:
            shares = [w / sum(weights or [1, 1]) for w in weights or [1, 1]]
        if mean == "geometric":
            expected = log_softmax(shares[0] * z[0] + shares[1] * z[1])
        else:
            expected = (shares[0] * p[0] + shares[1] * p[1]).log()
        torch.testing.assert_close(log_softmax(view["logits"][r].double()), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "weights must be 2 numbers"),
        ({"weights": "equal"}, "or 'confidence', not 'equal'"),
        ({"mean": "harmonic"}, "it is 'harmonic'"),
    ],
)
def test_ensembles_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Ensemble([constant([1.0]), constant([2.0])], **options)


def test_average_follows_the_student():
    student = Net()
    teacher = Average(student, 0.9)
    before = teacher.model.body.weight.clone()
    with torch.no_grad():
        student.body.weight += 1
    teacher.update(student)
    torch.testing.assert_close(teacher.model.body.weight, before + 0.1)
    assert teacher.model.body.weight.data_ptr() != student.body.weight.data_ptr()


def test_mutual_learning():
    cohort, x = Cohort([Net().eval(), Net().eval(), Net().eval()]), torch.randn(4, 4)
    labels = torch.tensor([0, 3, -100, 1])
    _, view = Capture(cohort)(x)
    terms = LearnTogether(temperature=2.0)(view, {}, {"labels": labels})
    rows = view["logits"].double()
    hard = sum(-log_softmax(rows[i, r])[labels[r]] / 3 for i in range(3) for r in (0, 1, 3))
    soft = sum(
        4 * kl(log_softmax(rows[j, r].detach() / 2), log_softmax(rows[i, r] / 2)) / 4 / 2
        for i in range(3)
        for j in range(3)
        if i != j
        for r in range(4)
    )
    torch.testing.assert_close(terms["hard"].double(), hard, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms["soft"].double(), soft, rtol=1e-5, atol=1e-7)
    weight = cohort.models[1].head.weight
    actual, expected = (
        torch.autograd.grad(t, weight, retain_graph=True)[0] for t in (terms["soft"], soft)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_an_online_teacher_learns_from_labels_only():
    cohort, x = Cohort([Net().eval(), Net().eval()]), torch.randn(4, 4)
    _, view = Capture(cohort)(x)
    batch = {"labels": torch.tensor([0, 3, 2, 1])}
    terms = LearnTogether([[], [0]])(view, {}, batch)
    terms["soft"].backward(retain_graph=True)
    assert cohort.models[0].head.weight.grad is None or not cohort.models[0].head.weight.grad.any()
    assert cohort.models[1].head.weight.grad.any()
    with pytest.raises(ValueError, match="nobody learns"):
        LearnTogether([[], []])(view, {}, batch)
    with pytest.raises(ValueError, match="which others it learns from"):
        LearnTogether([[0], [0]])(view, {}, batch)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.out = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, h):
        features = self.features(h)
        return self.out(features), features


def test_exits():
    student = {
        "logits": torch.randn(3, 5).requires_grad_(),
        "h1": torch.randn(3, 6).requires_grad_(),
        "h2": torch.randn(3, 6).requires_grad_(),
        "last": torch.randn(3, 5).requires_grad_(),
    }
    labels = torch.tensor([4, -100, 0])
    exits = Exits({"h1": Head(), "h2": Head()}, deepest="last", temperature=2.0)
    terms = exits(student, {}, {"labels": labels})
    hard = soft = hint = 0
    for layer in ("h1", "h2"):
        logits, features = exits.heads[layer](student[layer])
        for r in range(3):
            z, deep = logits[r].double(), student["logits"][r].double().detach()
            if labels[r] >= 0:
                hard = hard - log_softmax(z)[labels[r]] / 4
            soft = soft + 4 * kl(log_softmax(deep / 2), log_softmax(z / 2)) / 6
        hint = hint + ((features.double() - student["last"].double()) ** 2).mean() / 2
    torch.testing.assert_close(terms["exit_hard"].double(), hard, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms["exit_soft"].double(), soft, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms["exit_hint"].double(), hint, rtol=1e-5, atol=1e-7)
    (terms["exit_soft"] + terms["exit_hint"]).backward()
    assert student["logits"].grad is None
    assert student["last"].grad is None
    assert student["h1"].grad.any()
    plain = Exits({"h1": nn.Linear(6, 5)}, deepest="last")
    with pytest.raises(ValueError, match=r"must return \(logits, features\)"):
        plain(student, {}, {"labels": labels})


def test_calls_take_what_forward_names():
    class Named(nn.Module):
        def forward(self, ids, mask=None):
            return ids * mask

    batch = {"ids": torch.ones(2), "mask": torch.ones(2), "labels": None, "extra": 3}
    assert call(Capture(Named()), batch)[1]["logits"].shape == (2,)
    with pytest.raises(ValueError, match=r"nothing that Named.forward takes \(ids, mask\)"):
        call(Capture(Named()), {"labels": None, "pixels": 1})


def test_batches_of_loaders():
    x, y = torch.randn(2, 4), torch.zeros(2)
    assert as_batch((x, y)).keys() == {"inputs", "labels"}
    assert as_batch(x).keys() == {"inputs"}
    assert as_batch({"a": x}) == {"a": x}
    with pytest.raises(ValueError, match="a tuple of 3"):
        as_batch((x, y, y))
