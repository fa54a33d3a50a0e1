"""The READMEs of trine.export and trine.hugging_face: names and checks exist, examples run."""

import re
from pathlib import Path

import pytest
import torch
import transformers
import trine.export
import trine.hugging_face
from bitnet_models import bitnet_model
from torch import nn
from trine.nn import pack_linear

ROOMS = (trine.export, trine.hugging_face)
READMES = {room: Path(room.__file__).with_name("README.md").read_text() for room in ROOMS}
TESTS = {
    name
    for path in Path(__file__).parent.glob("test_*.py")
    for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_in_the_table_with_its_check(room):
    table = READMES[room].partition("| technique")[2]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    assert {n for row in rows for n in re.findall(r"`(\w+)`", row[1])} == set(room.__all__)
    for row in rows:
        checks = re.findall(r"`(\w+)`", row[2])
        assert checks
        assert set(checks) <= TESTS


EXAMPLES = [
    (room, block)
    for room, text in READMES.items()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
]


@pytest.mark.parametrize(("room", "block"), EXAMPLES)
def test_the_examples_run(room, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "Dim": torch.export.Dim}
    if room is trine.export:
        names["model"] = nn.Sequential(pack_linear(nn.Linear(64, 8), "int8")).eval()
        names["ternary_model"] = nn.Sequential(pack_linear(nn.Linear(256, 8), "ternary"))
        names["x"] = torch.randn(2, 64)
    else:
        names["folder"], names["bitnet_folder"] = tmp_path / "float", tmp_path / "bitnet"
        config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(names["folder"])
        bitnet_model("autobitlinear packed").save_pretrained(names["bitnet_folder"])
        names["prompt"] = torch.tensor([[5, 6, 7]])
    exec(block, names)
    if "tokens" in names:
        assert names["tokens"].shape == (1, 11)
    elif "again" in names:
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(names["again"](ids).logits, names["model"](ids).logits)
    else:
        assert [path.stem for path in tmp_path.iterdir()] == ["model"]
