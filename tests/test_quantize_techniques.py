"""The techniques in the README of trine.quantize: names that exist, checks that exist."""

import re
from pathlib import Path

import pytest
import torch
import trine.quantize
from torch import nn
from trine.quantize import observers

README = Path(trine.quantize.__file__).with_name("README.md")
TESTS = {
    name
    for path in Path(__file__).parent.glob("test_*.py")
    for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(), re.MULTILINE)
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
    assert all(n in trine.quantize.__all__ or hasattr(observers, n) for n in public)
    assert checks
    assert set(checks) <= TESTS


BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body, self.head = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(self.norm(x)).relu())


@pytest.mark.parametrize("block", BLOCKS)
def test_the_examples_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = torch.randn(48, 6)
    names = {
        "torch": torch,
        "model": Network(),
        "data": [x[:24], x[24:]],
        "loader": [(x, (x[:, 0] > 0).long())] * 3,
        "loss_of_weight": lambda weight: (torch.ones(5, 8) @ weight.T).square().mean(),
    }
    exec(block, names)
    if "small" in names:
        expected = names["qat"](x) if "qat" in names else names["model"](x)
        torch.testing.assert_close(names["small"](x), expected, rtol=0.1, atol=0.1)
    else:
        assert (tmp_path / "bias.png").exists()
