"""The study of pruned encoders on SST-2, made small itself."""

import json

import pytest
import torch
import trine
from small_sst2 import make_encoder, stand_in
from trine.distill import Training

from benchmarks import sst2
from benchmarks.pruning import sst2 as pruning
from benchmarks.pruning.sst2 import (
    ONE_SHOT,
    TRAINED,
    Amounts,
    form_of,
    pruner_of,
    rows_of,
    shape_of,
    speed_of,
    task_of,
    training_of,
)
from benchmarks.sst2 import Sst2


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # nothing here is worth sharing


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "LAYERS_LEFT", {2.0: 1, 1.5: 1})
    monkeypatch.setattr(pruning, "CALIBRATION", 64)
    return stand_in(monkeypatch, tmp_path, layers=2)


def test_each_way_leaves_what_its_name_says(data):
    dense = sst2.classifier(sst2.load_encoder()).eval()
    task = task_of(Sst2.load(data, 200), Amounts(2, 64, least=1), dense, {1.5: 0.5, 2.0: 0.5})
    before = {name: w.clone() for name, w in dense.state_dict().items()}
    for name in ("2:4 magnitude", "2:4 Wanda", "2:4 SparseGPT"):
        sparse = shape_of(name, task).bert.encoder.modules()
        assert sum(isinstance(m, trine.nn.Sparse24Linear) for m in sparse) == 12
    heads = shape_of("heads and neurons 2x, distilled", task).bert.encoder.layer[0]
    assert heads.attention.self.query.weight.shape == (8, 16)
    assert heads.intermediate.dense.weight.shape == (16, 16)
    assert len(shape_of("layers 2x, distilled", task).bert.encoder.layer) == 1
    assert shape_of("movement 10%, distilled", task) is not dense
    torch.testing.assert_close(dense.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["magnitude 50%, distilled", "movement 10%, distilled"])
@pytest.mark.parametrize("updates", [4, 32, 5700])
def test_single_weights_are_pruned_to_the_share_in_the_name(name, updates):
    model = sst2.classifier(make_encoder(layers=1))
    pruner = pruner_of(name, model, updates)
    assert pruner.schedule.last <= updates
    share = int(name.split("%")[0].split()[1]) / 100
    ratio = pruner.schedule.at(pruner.schedule.last).ratio(pruner.scope.ratio)
    assert ratio == pytest.approx(1 - share)
    assert all("encoder" in layer for layer in pruner.layers)


def test_what_one_would_serve_has_more_updates():
    amounts = Amounts(10, 64, least=1)
    updates = {name: training_of(name, amounts, 0).steps for name in TRAINED}
    assert {n: u for n, u in updates.items() if u != 10} == {
        "2:4 SparseGPT and SR-STE, distilled": 30,
        "heads and neurons 2x, distilled": 50,
        "layers 2x, distilled": 50,
    }


def test_names_say_how_fast_and_of_what_form():
    assert speed_of("heads and neurons 1.5x, distilled") == 1.5
    assert {form_of(n) for n in ONE_SHOT} == {"2:4 magnitude", "SVD"}
    assert form_of("movement 10%, distilled") == "dense"
    assert form_of("layers 2x, distilled") == "layers 2x, distilled"


def test_goals_are_met_by_figures_alone():
    names = ("dense", *ONE_SHOT, *TRAINED)
    right = {name: torch.ones(3, 100, dtype=torch.bool) for name in names}
    right["2:4 SR-STE, distilled"][:, :2] = False
    right["layers 2x, distilled"][:, :2] = False
    right["magnitude 10%, distilled"][:, :50] = False
    facts = {form_of(n): {"batch 1": 1.0, "batch 32": 10.0, "bytes": 7} for n in names}
    facts["layers 2x, distilled"]["batch 32"] = 5.0
    rows = {(row.name, row.metric): row for row in rows_of(right, facts)}
    missed = {name for (name, _), row in rows.items() if not row.met}
    assert missed == {
        "2:4 SR-STE, distilled",
        *(f"heads and neurons {x}x, distilled" for x in (1.5, 2)),
        "layers 1.5x, distilled",
    }
    assert rows["2:4 SR-STE, distilled", pruning.POINTS].value == pytest.approx(-2)
    assert rows["movement - magnitude, 10% left", "points"].value == pytest.approx(50)


def test_the_study_ends_in_rows(data, monkeypatch):
    monkeypatch.setattr(pruning, "amounts_of", lambda arguments: Amounts(2, 64, least=1))
    monkeypatch.setattr(pruning, "SEEDS", (0,))
    monkeypatch.setattr(pruning, "RATIOS", (0.5,))
    monkeypatch.setattr(pruning, "SHARES", (10,))
    monkeypatch.setattr(pruning, "TRAINED", TRAINED[:5])
    one = Training(epochs=1, steps=1)
    monkeypatch.setattr(sst2, "scale_of", lambda arguments, seed: sst2.Scale(100, one))
    monkeypatch.setattr("sys.argv", ["sst2", "--quick", "--data", str(data)])
    pruning.main()
    written = json.loads((data / "pruning-sst2.json").read_text())
    assert (data / "pruning-sst2.png").exists()
    scored = [row for row in written["rows"] if row["metric"] == "accuracy, %"]
    assert [row["name"] for row in scored] == ["dense", *ONE_SHOT, *TRAINED[:5]]
    assert all(set(row["latency_ms"]) == {"batch 1", "batch 32"} for row in scored)
