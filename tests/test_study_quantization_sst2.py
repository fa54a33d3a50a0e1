"""The study of quantised encoders on SST-2, made small itself."""

import json
from dataclasses import replace

import pytest
import torch
from small_sst2 import stand_in
from trine.distill import Training
from trine.nn import Int8Linear, TernaryLinear
from trine.quantize import QatSchedule

from benchmarks import sst2
from benchmarks.quantization import sst2 as quantization
from benchmarks.quantization.sst2 import (
    AFTER_TRAINING,
    ALONE,
    DISTILLED,
    INT8,
    TRAINED,
    Amounts,
    Task,
    after_training,
    best_observer,
    follow_ranges,
    form_of,
    phrases_of,
    rows_of,
    trained,
)
from benchmarks.sst2 import Sst2

AMOUNTS = Amounts(32, 8, few=50, unlabelled=32, int8_updates=3, ternary_updates=2, least=4)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # nothing here is worth sharing


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "TERNARY", {"*encoder.layer.*": "ternary-twn", "*": "int8"})
    return stand_in(monkeypatch, tmp_path, layers=1)


def task_of(rows: Sst2) -> Task:
    dense = sst2.classifier(sst2.load_encoder()).eval()
    return Task(dense, rows.calibration(32), "MinMax")


def kinds(model: torch.nn.Module) -> dict[type, int]:
    found = [type(m) for m in model.modules() if isinstance(m, Int8Linear | TernaryLinear)]
    return {kind: found.count(kind) for kind in found}


def test_each_way_leaves_the_layers_that_its_name_says(data):
    rows = Sst2.load(data, 100)
    task = task_of(rows)
    before = {name: w.clone() for name, w in task.dense.state_dict().items()}
    for name in (*AFTER_TRAINING, *TRAINED):
        if name in TRAINED:
            model = trained(name, task, rows, AMOUNTS, seed=1)
        else:
            model = after_training(name, task)
        if name.startswith("ternary"):
            assert kinds(model) == {TernaryLinear: 6, Int8Linear: 2}, name
        else:
            assert kinds(model) == {Int8Linear: 8}, name
            of_one = model.classifier.input_scale is not None
            assert of_one == ("static" in name) == (form_of(name) == "INT8 static"), name
        assert not model.training
        assert not model.config.output_attentions
        assert sst2.right(model, rows.test).shape == (40,)
    torch.testing.assert_close(task.dense.state_dict(), before, rtol=0, atol=0)


def test_few_labels_are_few_and_the_distilled_see_text_without(data):
    rows = Sst2.load(data, 100)
    alone, distilled = (phrases_of(name, rows, AMOUNTS) for name in (ALONE, DISTILLED))
    assert torch.equal(alone.labels, rows.labelled.labels[:50])
    assert torch.equal(distilled.labels, torch.cat([alone.labels, torch.full((32,), -100)]))
    assert (distilled.lengths[50:] >= 4).all()
    assert (rows.unlabelled.lengths < 4).any()
    assert phrases_of(TRAINED[-1], rows, AMOUNTS) is rows.labelled
    plenty = replace(AMOUNTS, unlabelled=10**9, least=1)
    assert len(phrases_of(DISTILLED, rows, plenty)) == 300  # all of train.tsv


def test_the_observer_chosen_moves_the_logits_least(data):
    rows = Sst2.load(data, 100)
    task = task_of(rows)
    found = best_observer(task.dense, task.calibration, rows.dev)
    moved = {name: found[name] for name in quantization.OBSERVERS}
    assert moved[found["observer"]] == min(moved.values()) > 0
    assert len(set(moved.values())) > 1


def test_ranges_are_followed_and_then_stay(data, monkeypatch):
    steps = []
    monkeypatch.setattr(QatSchedule, "step", lambda self: steps.append(self.freeze_ranges))
    trained("INT8 static, QAT", task_of(rows := Sst2.load(data, 100)), rows, AMOUNTS, seed=0)
    assert steps == [2, 2, 2]
    with pytest.raises(ValueError, match="has no layer"):
        follow_ranges(task_of(rows).dense, 3)


def test_goals_are_met_by_figures_alone():
    names = ("float", *AFTER_TRAINING, *TRAINED)
    results = {
        name: {"right": torch.ones(3, 200, dtype=torch.bool), "cosine": torch.ones(3, 200)}
        for name in names
    }
    results["INT8 dynamic"]["right"][:, 0] = False  # half a point
    results["INT8 GPTQ"]["right"][:, :2] = False
    results["INT8 static"]["cosine"][:, :100] = 0.97
    results["ternary GPTQ"]["cosine"][0, 0] = 0.1
    results[DISTILLED]["right"][:, :7] = False
    results[ALONE]["right"][1, :20] = False
    facts = {form_of(name): {"batch 1": 1.0, "batch 32": 10.0, "bytes": 7} for name in names}
    rows = {(row.name, row.metric): row for row in rows_of(results, facts)}
    missed = {key for key, row in rows.items() if not row.met}
    assert missed == {
        ("INT8 GPTQ", quantization.POINTS),
        ("INT8 static", quantization.MEAN_COSINE),
        (DISTILLED, quantization.POINTS),
        ("ternary QAT, few labels: distilled - alone", "points"),
    }
    with_goal = {name for (name, _), row in rows.items() if row.goal is not None}
    assert with_goal == {*INT8, DISTILLED, "ternary QAT, few labels: distilled - alone"}
    assert rows["INT8 dynamic", quantization.POINTS].value == pytest.approx(-0.5)
    assert rows[DISTILLED, quantization.POINTS].value == pytest.approx(-3.5)
    assert rows["ternary QAT, few labels: distilled - alone", "points"].value == pytest.approx(
        -3.5 + 10 / 3
    )
    assert rows["INT8 static", quantization.MEAN_COSINE].value == pytest.approx(0.985)
    assert rows["ternary GPTQ", quantization.WORST_COSINE].value == pytest.approx(0.1)


def test_the_study_ends_in_rows(data, monkeypatch):
    monkeypatch.setattr(quantization, "amounts_of", lambda arguments: AMOUNTS)
    monkeypatch.setattr(quantization, "SEEDS", (0, 1))
    one = Training(epochs=1, steps=1)
    monkeypatch.setattr(sst2, "scale_of", lambda arguments, seed: sst2.Scale(100, one))
    monkeypatch.setattr("sys.argv", ["sst2", "--quick", "--data", str(data)])
    quantization.main()
    written = json.loads((data / "quantization-sst2.json").read_text())
    assert (data / "quantization-sst2.png").exists()
    scored = {r["name"]: r for r in written["rows"] if r["metric"] == "accuracy, %"}
    assert list(scored) == ["float", *AFTER_TRAINING, *TRAINED]
    assert all(set(row["latency_ms"]) == {"batch 1", "batch 32"} for row in scored.values())
    assert scored["INT8 static"]["bytes"] == scored["INT8 static, QAT"]["bytes"]
    assert scored["INT8 static"]["bytes"] != scored["INT8 dynamic"]["bytes"]
    parts = list((data / "unfinished" / "quantization-sst2-quick").glob("*.pt"))
    assert len(parts) == 2 + 2 * (1 + len(AFTER_TRAINING) + len(TRAINED))
    next(part for part in parts if part.stem == "times-and-sizes").unlink()
    monkeypatch.setattr("sys.argv", ["sst2", "--quick", "--resume", "--data", str(data)])

    def refuse(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(quantization, "judged", refuse)
    quantization.main()
    again = json.loads((data / "quantization-sst2.json").read_text())
    assert [r["value"] for r in again["rows"]] == [r["value"] for r in written["rows"]]
