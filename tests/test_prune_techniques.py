"""The techniques in the README of trine.prune: names that exist, checks that exist, examples that
run."""

import pytest
import torch
import trine.prune
from technique_tables import readme_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trine.prune import criteria, granularity, schedule, scope

README = readme_of(trine.prune)


@pytest.mark.parametrize("technique", README.techniques, ids=lambda t: t.title)
def test_a_technique_has_public_names_and_a_float64_check(technique):
    technique.check(trine.prune)


def test_every_part_is_in_the_table():
    named = README.names
    bases = {"Criterion", "Event", "Granularity", "Schedule", "Scope", "Weight"}
    for room in (criteria, granularity, schedule, scope):
        assert set(room.__all__) - bases <= named


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 16)])
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        for layer in self.body:
            x = layer(x).relu()
        return self.last(x)


@pytest.mark.parametrize("block", README.examples)
def test_the_examples_run_and_prune(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = torch.randn(160, 8)
    truth = nn.functional.one_hot((x[:, 0] > 0).long(), 4)
    names = {
        "torch": torch,
        "nn": nn,
        "model": Network(),
        "dense": Network(),
        "loader": DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8),
        "example": x[:2],
        "evaluate": lambda model: -(model(x) - truth).square().mean().item(),
    }
    names["optimizer"] = torch.optim.AdamW(names["model"].parameters())
    exec(block, names)
    model = names["model"]
    if "prune_structured" in block:
        assert names["small"].last.in_features == 8
        assert sum(p.numel() for p in names["optimizer"].param_groups[0]["params"]) == 8 * 9 + 108
        return
    if "HardConcrete" not in block:
        assert any((layer.weight == 0).any() for layer in model.body)
    if "small" in names:
        model.eval()
        torch.testing.assert_close(names["small"].eval()(x), model(x))
        assert names["small"].last.in_features == model.last.in_features - len(
            names.get("pruner", names.get("gates")).removed().get("body.1", [])
        )
    if "fast" in names:
        torch.testing.assert_close(names["fast"](x), model.eval()(x))
