"""The study of small students on SST-2, made small itself."""

import json

import pytest
import torch
from small_sst2 import stand_in

from benchmarks import sst2
from benchmarks.distillation import sst2 as distillation
from benchmarks.distillation.sst2 import STUDENTS, Amounts, BiLstm, new_student, transfer_set
from benchmarks.sst2 import Sst2


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # nothing here is worth sharing


@pytest.fixture
def data(tmp_path, monkeypatch):
    return stand_in(monkeypatch, tmp_path, layers=6)


def test_a_students_ways_begin_alike(data):
    teacher = sst2.classifier(sst2.load_encoder()).eval()
    for name in STUDENTS:
        first, again = (new_student(name, teacher, seed=1) for _ in range(2))
        for weight, same in zip(first.parameters(), again.parameters(), strict=True):
            assert torch.equal(weight, same)
    layers = teacher.bert.encoder.layer
    for name, kept in (("3 layers", [1, 3, 5]), ("2 layers", [2, 5])):
        student = new_student(name, teacher, seed=0)
        for own, number in zip(student.bert.encoder.layer, kept, strict=True):
            expected = layers[number].attention.self.query.weight
            assert torch.equal(own.attention.self.query.weight, expected)


def test_padding_does_not_count_in_the_lstm():
    model = BiLstm(torch.randn(40, 16), hidden=8).eval()
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    both = model(ids, (ids > 0).long())
    alone = model(ids[:1, :3], torch.ones(1, 3, dtype=torch.long))
    torch.testing.assert_close(both[:1], alone)


def test_the_transfer_set_has_phrases_without_labels(data):
    rows = transfer_set(Sst2.load(data, 200), Amounts(30, 80, 1, 1, least=1))
    assert len(rows) == 110
    assert (rows.labels == -100).sum() == 80
    assert torch.equal(rows.lengths, rows.lengths.sort().values)


def test_the_study_ends_in_rows_with_goals(data, monkeypatch):
    monkeypatch.setattr(
        distillation, "amounts_of", lambda arguments: Amounts(64, 64, 2, 2, least=1)
    )
    monkeypatch.setattr(distillation, "SEEDS", (0,))
    monkeypatch.setattr("sys.argv", ["sst2", "--quick", "--data", str(data)])
    distillation.main()
    written = json.loads((data / "distillation-sst2.json").read_text())
    rows = {(row["name"], row["metric"]): row for row in written["rows"]}
    assert len(rows) == len(written["rows"])
    scored = [name for name, metric in rows if metric == "accuracy, %"]
    assert len(scored) == 1 + 4 + 4 + 2
    gains = [row for (_, metric), row in rows.items() if "gain" in metric]
    assert len(gains) == 3 + 3 + 1
    for row in gains:
        alone = rows[row["name"].split(",")[0] + ", alone", "accuracy, %"]["value"]
        of_student = rows[row["name"], "accuracy, %"]["value"]
        assert row["value"] == pytest.approx(of_student - alone, abs=1e-6)
        assert row["met"] == (row["value"] > 0)
        assert row["goal"] == 0
    teacher = rows["teacher", "accuracy, %"]["value"]
    shares = [row for (_, metric), row in rows.items() if "share" in metric]
    for row in shares:
        of_student = rows[row["name"], "accuracy, %"]["value"]
        assert row["value"] == pytest.approx(100 * of_student / teacher)
        assert row["met"] == (row["goal"] is None or row["value"] >= 97)
    monkeypatch.setattr("sys.argv", ["sst2", "--quick", "--resume", "--data", str(data)])
    monkeypatch.setattr(distillation, "teach", None)  # everything is there already
    distillation.main()
    again = json.loads((data / "distillation-sst2.json").read_text())
    assert [r["value"] for r in again["rows"]] == [r["value"] for r in written["rows"]]
