"""Each criterion of pruning against its formula, written out in float64."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from trine.prune import Change, Magnitude, Random, prunable_layers


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
    with pytest.raises(ValueError, match="norm must be 1 or 2, it is 3"):
        Magnitude(3)
