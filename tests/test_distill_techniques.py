"""The techniques in the README of trine.distill: each row names what there is and its check."""

import re
from pathlib import Path

import pytest
import torch
import trine.distill
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trine.distill import objectives, schedules

README = Path(trine.distill.__file__).with_name("README.md")
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
    public = [*re.findall(r"`(\w+)`", names)]
    assert public
    for name in public:
        assert any(name in room.__all__ for room in (trine.distill, objectives, schedules)), name
    checks = re.findall(r"`(\w+)`", check)
    assert checks
    assert set(checks) <= TESTS


def test_every_objective_is_in_the_table():
    named = set(re.findall(r"`(\w+)`", " ".join(row[1] for row in ROWS)))
    bases = {"Batch", "Objective", "Terms", "View", "every_layer"}
    assert set(objectives.__all__) - bases <= named


class Network(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(6, width)]), nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.layers[0](x).tanh())


BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("last", range(len(BLOCKS)))
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
    if "lightning" in BLOCKS[last]:
        names["lightning"] = pytest.importorskip("lightning")
    if last > 0:  # names of the first are used again
        exec(BLOCKS[0].partition("distiller =")[0], names)
    before = names["small"].head.weight.detach().clone()
    exec(BLOCKS[last], names)
    assert not torch.equal(names["small"].head.weight, before)
