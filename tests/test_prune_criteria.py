"""Each criterion of pruning against its formula, written out in float64."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from trine.prune import (
    SNIP,
    Change,
    Fisher,
    GraSP,
    Magnitude,
    Movement,
    PerLayer,
    Pruner,
    Random,
    Taylor,
    Threshold,
    prunable_layers,
)
from trine.prune.schedule import Cubic


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    return model.append(nn.Tanh()).append(Conv1D(2, 4)).double()


def close(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", [1, 2])
def test_magnitude(norm):
    model = network()
    layers = prunable_layers(model)
    by_hand = {n: p.detach().abs() ** norm for n, p in model.named_parameters() if p.dim() > 1}
    close(Magnitude(norm).scores(model, layers), {n[:-7]: s for n, s in by_hand.items()})


def test_change_from_the_start():
    model = network()
    layers = prunable_layers(model)
    start = {name: layer.weight.tolist() for name, layer in layers.items()}
    criterion = Change()
    criterion.start(layers)
    for layer in layers.values():
        nn.init.normal_(layer.weight)
    scores = criterion.scores(model, layers)
    close(
        scores, {n: (torch.tensor(start[n]).double() - m.weight).abs() for n, m in layers.items()}
    )
    again = Change()
    again.start(layers)
    again.load_state_dict(criterion.state_dict())
    close(again.scores(model, layers), scores)


def test_random_draws_are_new_uniform_and_kept():
    model = nn.Linear(100, 100)
    layers = {"": model}
    criterion, twin, again = Random(3), Random(3), Random(4)
    first = criterion.scores(model, layers)[""]
    assert torch.equal(first, twin.scores(model, layers)[""])
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 0.5) < 0.01
    again.load_state_dict(criterion.state_dict())
    second = criterion.scores(model, layers)[""]
    assert not torch.equal(first, second)
    assert torch.equal(second, again.scores(model, layers)[""])


# Those that look at gradients

BATCHES = [
    (
        torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(i)).double(),
        torch.arange(5) % 2,
    )
    for i in range(3)
]


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def gradients_by_hand(model, x, y):
    """Of the cross entropy's mean by the weights, with backward()."""
    model.zero_grad()
    (-model(x).log_softmax(1)[torch.arange(len(y)), y]).mean().backward()
    return {name: model.get_submodule(name).weight.grad.clone() for name in prunable_layers(model)}


@pytest.fixture(params=["calibrated", "in training"])
def scores_of(request):
    """A function of a model and a kind of criterion: its scores, from data or as one collects."""

    def calibrated(model, kind):
        return kind(loss_of, BATCHES).scores(model, prunable_layers(model))

    def collected(model, kind):
        criterion, layers = kind(), prunable_layers(model)
        for old in (True, False):  # what was collected before scores were asked for is over
            for x, y in BATCHES[:1] if old else BATCHES:
                gradients_by_hand(model, x, y)
                criterion.collect(layers)
            scores = criterion.scores(model, layers)
        again = kind()
        again.load_state_dict(criterion.state_dict())
        close(again.scores(model, layers), scores)
        return scores

    return calibrated if request.param == "calibrated" else collected


def test_snip(scores_of):
    model = network()
    grads = [gradients_by_hand(model, x, y) for x, y in BATCHES]
    expected = {
        name: (layer.weight.detach() * sum(g[name] for g in grads) / 3).abs()
        for name, layer in prunable_layers(model).items()
    }
    close(scores_of(model, SNIP), expected)


def test_taylor(scores_of):
    model = network()
    grads = [gradients_by_hand(model, x, y) for x, y in BATCHES]
    expected = {
        name: sum((layer.weight.detach() * g[name]) ** 2 for g in grads) / 3
        for name, layer in prunable_layers(model).items()
    }
    close(scores_of(model, Taylor), expected)


def test_fisher_of_examples():
    model = network()
    rows = [(x[i : i + 1], y[i : i + 1]) for x, y in BATCHES for i in range(5)]
    grads = [gradients_by_hand(model, x, y) for x, y in rows]
    expected = {
        name: 0.5 * layer.weight.detach() ** 2 * sum(g[name] ** 2 for g in grads) / 15
        for name, layer in prunable_layers(model).items()
    }
    close(Fisher(loss_of, BATCHES).scores(model, prunable_layers(model)), expected)


def test_fisher_is_the_loss_of_removing_a_weight_near_a_minimum():
    """Of y = w * x + noise with unit variance, fitted: the Fisher information is the Hessian, and
    removing w costs w^2 / 2 * mean(x^2)."""
    x = torch.randn(4000, 1, dtype=torch.float64)
    y = 0.3 * x + torch.randn(4000, 1, dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_((x * y).sum() / (x * x).sum())

    def loss(model, batch):
        return 0.5 * (model(batch[0]) - batch[1]).square().mean()

    score = Fisher(loss, [(x[:1000], y[:1000])]).scores(model, {"": model})[""].item()
    with torch.no_grad():
        cost = 0.5 * (y.square().mean() - (y - model(x)).square().mean()).item()
    assert score == pytest.approx(cost, rel=0.15)


def test_grasp_by_the_whole_hessian():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), Conv1D(2, 2)).double()
    batches = [(x[:, 0, 0, :3], y) for x, y in BATCHES]
    layers = prunable_layers(model)
    flat = torch.cat([layer.weight.detach().flatten() for layer in layers.values()])

    def mean_loss(w):
        weights = {"0.weight": w[:6].reshape(2, 3), "2.weight": w[6:].reshape(2, 2)}
        logits = [torch.func.functional_call(model, weights, x).log_softmax(1) for x, _ in batches]
        return (
            sum(-z[torch.arange(5), y].mean() for z, (_, y) in zip(logits, batches, strict=True))
            / 3
        )

    gradient = torch.func.grad(mean_loss)(flat)
    hessian = torch.autograd.functional.hessian(mean_loss, flat)
    expected = flat * (hessian @ gradient)
    scores = GraSP(loss_of, batches).scores(model, layers)
    close(scores, {"0": expected[:6].reshape(2, 3), "2": expected[6:].reshape(2, 2)})
    step = 1e-6  # and H g by differences of gradients
    ahead, behind = (torch.func.grad(mean_loss)(flat + s * gradient) for s in (step, -step))
    torch.testing.assert_close(flat * (ahead - behind) / (2 * step), expected, rtol=1e-5, atol=1e-9)


def test_grasp_removes_what_keeps_the_gradient():
    """To first order in t, scaling a weight by (1 - t) changes |g|^2 by -2 t score: a low score is
    one whose removal lets the gradient's norm grow."""
    model = network()
    layers = prunable_layers(model)
    scores = GraSP(loss_of, BATCHES[:1]).scores(model, layers)

    def norm():
        return sum((g**2).sum() for g in gradients_by_hand(model, *BATCHES[0]).values())

    before, weight = norm(), layers["3"].weight
    with torch.no_grad():
        weight[1, 2] *= 1 - 1e-6
    change = (norm() - before) / 1e-6
    torch.testing.assert_close(change, -2 * scores["3"][1, 2], rtol=1e-3, atol=1e-9)


def test_calibration_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    state = torch.get_rng_state()
    for criterion in (SNIP(loss_of, batches), Taylor(loss_of, batches), GraSP(loss_of, batches)):
        criterion.scores(model, prunable_layers(model))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


class _StraightThrough(torch.autograd.Function):
    """Forward the mask of the scores, backward the identity."""

    @staticmethod
    def forward(ctx, scores, keep):
        return keep.to(scores.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("initial", [0.0, 0.02], ids=["from 0", "from magnitudes"])
def test_movement_by_straight_through_masks(soft, adam, initial):
    """Weights and scores as parameters, masks in the forward pass, as Sanh et al. write it."""
    x, y = BATCHES[0][0].flatten(1), BATCHES[0][1]
    model = nn.Linear(32, 2, bias=False).double()
    weight = model.weight.detach().clone().requires_grad_()
    size = weight.detach().abs()
    scores = (initial * size / size.mean()).requires_grad_()
    penalty, limit = (0.01, initial - 0.004) if soft else (0.0, None)

    def optimizer_of(parameters):
        make = torch.optim.Adam if adam else torch.optim.SGD
        return make(parameters, 0.1)

    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    pruner = Pruner(
        model,
        Movement(optimizer=optimizer_of, penalty=penalty, initial=initial),
        scope=Threshold(limit) if soft else PerLayer(0.6),
        schedule=Cubic(0, 12),
        optimizer=optimizer,
    )
    own, of_scores = torch.optim.SGD([weight], 0.5), optimizer_of([scores])
    keep, revived = torch.ones_like(weight, dtype=torch.bool), 0
    for step in range(1, 13):
        logits = x @ (weight * _StraightThrough.apply(scores, keep)).T
        loss = nn.functional.cross_entropy(logits, y) + penalty * scores.sigmoid().sum()
        own.zero_grad(), of_scores.zero_grad()
        loss.backward()
        own.step(), of_scores.step()
        before = keep
        if soft:
            keep = scores > limit
        else:
            ratio = 0.6 * (1 - (1 - step / 12) ** 3)
            order = scores.flatten().argsort(descending=True, stable=True)
            keep = torch.ones(64, dtype=torch.bool)
            keep[order[64 - round(ratio * 64) :]] = False
            keep = keep.reshape(2, 32)
        revived += (keep & ~before).sum().item()

        optimizer.zero_grad()
        loss_of(model, (x, y)).backward()
        optimizer.step()
        pruner.step()
        torch.testing.assert_close(model.weight.detach(), (weight * keep).detach())
    assert 0 < (~keep).sum() < 64
    assert revived or soft


def test_movement_adds_up_what_the_paper_says():
    """S = -sum of w * dL/dw with a rate of 1: positive for weights that leave 0."""
    model = network()
    layers = prunable_layers(model)
    criterion, expected = Movement(), {name: 0.0 for name in layers}
    criterion.start(layers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in BATCHES:
        for name, grad in gradients_by_hand(model, x, y).items():
            expected[name] = expected[name] - layers[name].weight.detach() * grad
        criterion.collect(layers)
        optimizer.step()
    close(criterion.scores(model, layers), expected)


@pytest.mark.parametrize("kind", [SNIP, Taylor, Fisher, GraSP])
def test_data_that_say_nothing(kind):
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    layers = prunable_layers(model)
    batch = (torch.randn(3, 2), torch.tensor([0, 1, 1]))

    def loss(model, batch):
        return nn.functional.cross_entropy(model["used"](batch[0]), batch[1])

    with pytest.raises(ValueError, match="loss of a batch does not depend on layer 'unused'"):
        kind(loss, [batch]).scores(model, layers)
    with pytest.raises(ValueError, match="there was no batch"):
        kind(loss, []).scores(model, layers)
    with pytest.raises(ValueError, match="must return one number that depends on the weights"):
        kind(lambda model, batch: 0.5, [batch]).scores(model, layers)
    layers["used"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="the weight of layer 'used' is frozen"):
        kind(loss, [batch]).scores(model, layers)


@pytest.mark.parametrize("kind", [SNIP, Taylor, Fisher, Movement])
def test_gradients_that_never_arrived(kind):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no gradient has reached layer 'only'"):
        Pruner(nn.ModuleDict({"only": model}), kind(), scope=PerLayer(0.5))
    assert model.weight.all()


# Which layers there are


def test_layers_by_pattern():
    model = network()
    assert list(prunable_layers(model)) == ["0", "3", "5"]
    assert list(prunable_layers(model, ["3", "5"], skip="5")) == ["3"]


def test_layers_that_cannot_be_pruned():
    tied = nn.ModuleDict({"words": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    tied["head"].weight = tied["words"].weight
    with pytest.raises(
        ValueError, match="layer 'head' cannot be pruned: its weight is shared with "
    ):
        prunable_layers(tied)
    with pytest.raises(ValueError, match="no layer whose weights can be pruned is named 'words'"):
        prunable_layers(tied, "words")
    with pytest.raises(ValueError, match="no layer is left to prune"):
        prunable_layers(tied, skip="head")
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="layer '0' cannot be pruned: it has parametrizations"):
        prunable_layers(normed)
    with pytest.raises(ValueError, match=r"takes a torch\.nn\.Module; got dict"):
        prunable_layers({})


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="norm must be 1 or 2, it is 3"):
        Magnitude(3)
    for wrong in ({"learning_rate": 0.0}, {"penalty": -1.0}, {"initial": -1.0}):
        with pytest.raises(ValueError, match="must be positive, penalty and initial not negative"):
            Movement(**wrong)
    with pytest.raises(ValueError, match="loss and batches belong together"):
        SNIP(loss_of)
    with pytest.raises(ValueError, match=r"one size of the first dimension, they have \[2, 3\]"):
        Fisher(loss_of, [(torch.zeros(2, 1), torch.zeros(3))]).scores(nn.Linear(1, 1), {})
