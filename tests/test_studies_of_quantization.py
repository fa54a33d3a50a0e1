"""The studies of language models and of a ResNet in benchmarks/quantization, on a few examples."""

import json
import math

import pytest
import torch
import trine
from torch.utils.data import TensorDataset
from trine.nn import Int8Conv2d, Int8Linear, TernaryLinear, TwoScaleTernaryLinear

from benchmarks import study
from benchmarks.distillation.digits import Split
from benchmarks.language import Blocks, Texts, nats
from benchmarks.quantization import language, resnet


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, threads):
    threads(1)  # nothing here is worth sharing
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "UNFINISHED", tmp_path / "unfinished")


# Language models

TOY = language.Settings(vocabulary=40, length=24, width=64, layers=1, batch=4, updates=3)


@pytest.fixture
def texts() -> Texts:
    ids = torch.arange(20 * 24).reshape(20, 24) * 7 % 40
    return Texts(Blocks(ids[:16]), Blocks(ids[16:]))


KINDS = {
    "INT8, after training": Int8Linear,
    "TWN": TernaryLinear,
    "TTQ": TwoScaleTernaryLinear,
    "BitNet b1.58": TernaryLinear,
}


@pytest.mark.parametrize("name", language.TRAINED)
def test_each_way_is_trained_and_served_packed(texts, name):
    model = language.taught(TOY, name, texts, 0)
    assert sum(type(m) is KINDS[name] for m in model.modules()) == 7
    assert type(model.lm_head) is torch.nn.Linear
    before = trine.convert(language.make(TOY, name, 0).eval())
    assert not torch.allclose(nats(model, texts.test), nats(before, texts.test))


def test_the_gap_is_paired_and_of_perplexities():
    of_blocks = torch.rand(3, 50) + 4
    facts = {name: {"1 tokens": 1.0, "bytes": 10} for name in ("float", "BitNet b1.58")}
    found = {"float": of_blocks, "BitNet b1.58": of_blocks + 0.05}
    *_, gap = rows = language.rows_of(found, facts)
    assert gap.value == pytest.approx(math.exp(0.05), rel=1e-4)
    assert gap.interval == pytest.approx((gap.value, gap.value), rel=1e-4)
    assert gap.published == 1.044
    assert rows[0].value == pytest.approx(math.exp(of_blocks.double().mean()))


def test_the_study_of_language_ends_in_rows(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "QUICK", TOY)
    monkeypatch.setattr(language, "SEEDS", (0,))
    monkeypatch.setattr(language, "load", lambda settings: texts)
    monkeypatch.setattr("sys.argv", ["language", "--quick"])
    language.main()
    written = json.loads((tmp_path / "quantization-language.json").read_text())
    assert (tmp_path / "quantization-language.png").stat().st_size > 5_000
    size = {row["name"]: row["bytes"] for row in written["rows"] if row["bytes"]}
    assert list(size) == ["float", *KINDS]
    assert size["BitNet b1.58"] < size["INT8, after training"] < size["float"]


# ResNet


@pytest.fixture
def split() -> Split:
    images, labels = torch.rand(96, 64), torch.arange(96) % 10
    return Split(*(TensorDataset(images[r::3], labels[r::3]) for r in range(3)))


@pytest.mark.parametrize("scales", resnet.CHOICES)
def test_every_convolution_is_packed(split, scales):
    dense = resnet.resnet(0).eval()
    models = (
        resnet.after_training(dense, scales, split),
        resnet.in_training(dense, scales, split, 0, 2),
    )
    for model in models:
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
        layers = [m for m in model.modules() if isinstance(m, Int8Conv2d)]
        assert len(layers) == 9
        assert all((m.input_scale is not None) == (scales == "static") for m in layers)
    first, trained = (model.get_submodule("0").weight for model in models)
    assert not torch.equal(first, trained)


def test_goals_of_the_resnet_are_met_by_figures_alone():
    names = ("float", *(f"{how}, {s}" for s in resnet.CHOICES for how in ("PTQ", "QAT")))
    correct_of = {name: torch.full((3, 200), 100.0) for name in names}
    correct_of["float"][:, :10] = 0
    correct_of["PTQ, static"][:, :40] = 0
    forms = (resnet.FLOAT, resnet.INT8, "INT8, static")
    facts = {name: {"batch 1": 2.0, "batch 32": 9.0, "bytes": 5} for name in forms}
    facts[resnet.INT8] = {"batch 1": 3.0, "batch 32": 3.0, "bytes": 2}
    rows = resnet.rows_of(correct_of, facts)
    assert {(row.name, row.metric) for row in rows if not row.met} == {
        ("INT8 PTQ, static", "test accuracy, %"),
        (resnet.INT8, "times as fast, batch 1"),
    }
    found = {(row.name, row.metric): row.value for row in rows}
    assert found[resnet.INT8, "times as fast, batch 32"] == 3.0
    assert found["INT8 PTQ, static", "points more than float"] == -15.0


def test_both_layouts_of_memory_are_timed(monkeypatch):
    def once(calls, **how):
        for (_, batch), call in calls.items():
            last = call().is_contiguous(memory_format=torch.channels_last)
            assert last == batch.endswith("channels_last")
        return dict.fromkeys(calls, 1e-3)

    monkeypatch.setattr(resnet, "alternate", once)
    conv = torch.nn.Conv2d(1, 8, 3)
    found = resnet.latencies({"float": conv, "INT8": Int8Conv2d.from_conv(conv)})
    batches = [f"batch {size}{layout}" for size in (1, 32) for layout in ("", ", channels_last")]
    assert found == {name: dict.fromkeys(batches, 1.0) for name in ("float", "INT8")}
