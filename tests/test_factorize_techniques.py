"""The techniques in the README of trine.factorize: each row names what there is and its check."""

import pytest
import torch
import transformers
import trine.factorize
from technique_tables import readme_of
from torch import nn

README = readme_of(trine.factorize)


@pytest.mark.parametrize("technique", README.techniques, ids=lambda t: t.title)
def test_a_technique_has_public_names_and_a_float64_check(technique):
    technique.check(trine.factorize)


def test_every_technique_is_in_the_table():
    named = README.names
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
    for block in README.examples:
        exec(block, names)
    with torch.inference_mode():
        tokens = torch.arange(6)[None]
        torch.testing.assert_close(
            names["dense"].eval()(tokens)[0], names["small"].eval()(tokens)[0]
        )
    assert (tmp_path / "small.trine").exists()
