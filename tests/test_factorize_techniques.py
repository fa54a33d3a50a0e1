"""The techniques in the README of trine.factorize: each row names what there is and its check."""

import re
from pathlib import Path

import pytest
import torch
import transformers
import trine.factorize
from torch import nn

README = Path(trine.factorize.__file__).with_name("README.md")
TESTS = {
    name
    for path in Path(__file__).parent.glob("test_factorize*.py")
    for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
}
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| technique")
]
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_technique_has_public_names_and_a_float64_check(row):
    _, names, check, further = row
    public, checks = re.findall(r"`(\w+)`", names), re.findall(r"`(\w+)`", check + further)
    assert public
    assert set(public) <= set(trine.factorize.__all__)
    assert re.findall(r"`(\w+)`", check)
    assert set(checks) <= TESTS


def test_every_technique_is_in_the_table():
    named = set(re.findall(r"`(\w+)`", " ".join(row[1] for row in ROWS)))
    about = {"FactorizationReport", "LayerChange", "Method", "Plan", "Ranks"}
    assert set(trine.factorize.__all__) - about == named


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = torch.randn(8, 32)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    names = {
        "trine": trine,
        "model": nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval(),
        "images": nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)),
        "bert": transformers.BertModel(transformers.BertConfig(num_hidden_layers=4, **sizes)),
        "x": x,
        "loader": list(x.split(4)),
    }
    for block in BLOCKS:
        exec(block, names)
    with torch.inference_mode():
        tokens = torch.arange(6)[None]
        torch.testing.assert_close(
            names["dense"].eval()(tokens)[0], names["small"].eval()(tokens)[0]
        )
    assert (tmp_path / "small.trine").exists()
