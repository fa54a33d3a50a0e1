"""The techniques in the README of trine.prune: names that exist, checks that exist, examples that
run."""

import re
from pathlib import Path

import pytest
import torch
import trine.prune
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trine.prune import criteria, granularity, schedule, scope

README = Path(trine.prune.__file__).with_name("README.md")
TESTS = {
    name
    for path in Path(__file__).parent.glob("test_*.py")
    for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
}
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| technique")
]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_technique_has_public_names_and_a_float64_check(row):
    _, names, check, _ = row
    public, checks = re.findall(r"`(\w+)`", names), re.findall(r"`(\w+)`", check)
    assert public
    assert set(public) <= set(trine.prune.__all__)
    assert checks
    assert set(checks) <= TESTS


def test_every_part_is_in_the_table():
    named = set(re.findall(r"`(\w+)`", " ".join(row[1] for row in ROWS)))
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


BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
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
