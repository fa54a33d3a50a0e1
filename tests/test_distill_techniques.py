"""The techniques in the README of trine.distill: each row names what there is and its check."""

import pytest
import torch
import trine.distill
from technique_tables import readme_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trine.distill import objectives, schedules

README = readme_of(trine.distill)


@pytest.mark.parametrize("technique", README.techniques, ids=lambda t: t.title)
def test_a_technique_has_public_names_and_a_float64_check(technique):
    technique.check(trine.distill, objectives, schedules)


def test_every_objective_is_in_the_table():
    named = README.names
    bases = {"Batch", "Objective", "Terms", "View", "every_layer"}
    assert set(objectives.__all__) - bases <= named


class Network(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(6, width)]), nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.layers[0](x).tanh())


@pytest.mark.parametrize("last", range(len(README.examples)))
def test_the_examples_run_and_train(last, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = torch.randn(64, 6)
    names = {
        "torch": torch,
        "nn": nn,
        "large": Network(32),
        "small": Network(8),
        "loader": DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 16),
        "evaluate": lambda model: 0.0,
    }
    if "lightning" in README.examples[last]:
        names["lightning"] = pytest.importorskip("lightning")
    if last > 0:  # names of the first are used again
        exec(README.examples[0].partition("distiller =")[0], names)
    before = names["small"].head.weight.detach().clone()
    exec(README.examples[last], names)
    assert not torch.equal(names["small"].head.weight, before)
