"""The techniques in the README of trine.quantize: names that exist, checks that exist."""

import pytest
import torch
import trine.quantize
from technique_tables import readme_of
from torch import nn
from trine.quantize import observers

README = readme_of(trine.quantize)


@pytest.mark.parametrize("technique", README.techniques, ids=lambda t: t.title)
def test_a_technique_has_public_names_and_a_float64_check(technique):
    technique.check(trine.quantize, observers, trine.ops, trine)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body, self.head = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 2)
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.head(self.activation(self.body(self.norm(x))))


@pytest.mark.parametrize("block", README.examples)
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
