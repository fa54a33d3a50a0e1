"""What the studies on SST-2 share, on a small encoder with random weights and short phrases."""

from argparse import Namespace

import pytest
import torch
from small_sst2 import make_encoder, text_of, tokenize, write_data
from trine.demo.sentences import Encoder
from trine.distill import Frozen, Training

from benchmarks import sst2
from benchmarks.sst2 import Sst2


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # nothing here is worth sharing


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return make_encoder(layers=2)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(sst2, "TEACHERS", tmp_path / "teachers")
    write_data(tmp_path)
    return tmp_path


def test_rows_are_known_with_or_without_label(data, encoder):
    found = Sst2.load(data, 100, encoder)
    assert (len(found.labelled), len(found.unlabelled)) == (100, 200)
    assert (len(found.dev), len(found.test)) == (20, 40)
    assert set(found.labelled.labels.tolist()) == {0, 1}
    assert set(found.unlabelled.labels.tolist()) == {-100}
    again = Sst2.load(data, 100, encoder)
    assert torch.equal(again.labelled.ids, found.labelled.ids)
    lines = (data / "sst2" / "train.tsv").read_text().splitlines()[1:]
    letters = sorted(row.split("\t")[0].replace(" ", "") for row in lines)
    both = found.labelled + found.unlabelled
    seen = [text_of(row["input_ids"]) for row in both]
    assert sorted(seen) == letters


def test_batches_have_every_row_once_and_little_padding(data, encoder):
    rows = Sst2.load(data, 200, encoder).labelled
    torch.manual_seed(1)
    batches = list(rows.loader(8))
    assert len(batches) == len(rows.loader(8)) == 25
    seen = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert torch.equal(seen.sort().values, rows.lengths.sort().values)
    spread = [m["attention_mask"].sum(1).max() - m["attention_mask"].sum(1).min() for m in batches]
    assert max(spread) <= 1
    for batch in batches:
        assert batch["attention_mask"].bool().equal(batch["input_ids"] > 0)
    torch.manual_seed(1)
    assert torch.equal(next(iter(rows.loader(8)))["input_ids"], batches[0]["input_ids"])


def test_a_file_that_is_none(data, encoder):
    path = data / "sst2" / "dev.tsv"
    for text in ("text\tlabel\na \t1\n", "sentence\tlabel\n", "sentence\tlabel\na\t1\t2\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="must have lines"):
            sst2.read(path, encoder)
    path.write_text("sentence\tlabel\na \t2\n")
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        sst2.read(path, encoder)


def test_a_quote_is_a_letter_like_others(data):
    """csv's own rule would join the lines between two quotation marks."""
    path = data / "sst2" / "dev.tsv"
    path.write_text('sentence\tlabel\n" a \t1\nb " \t0\n')
    seen = []
    encoder = Encoder(None, lambda texts: seen.extend(texts) or tokenize(["a", "b"]), {})
    assert sst2.read(path, encoder).labels.tolist() == [1, 0]
    assert seen == ['" a', 'b "']


def test_a_teacher_learns_once(data, encoder, monkeypatch):
    found = Sst2.load(data, 300, encoder)
    training = Training(epochs=4, learning_rate=5e-3, seed=1)
    teacher = found.teacher(training)
    assert not teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert sst2.right(teacher, found.test).double().mean() > 0.9
    words = encoder.model.get_input_embeddings().weight
    assert torch.equal(teacher.get_input_embeddings().weight, words)

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(sst2, "fine_tune", refuse)
    again = found.teacher(training)
    assert not again.training
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, teacher.state_dict()[name])
    for other in (
        lambda: found.teacher(Training(epochs=4, learning_rate=5e-3, seed=2)),
        lambda: Sst2.load(data, 299, encoder).teacher(training),
    ):
        with pytest.raises(AssertionError, match="trained again"):
            other()
    assert [path.suffix for path in sst2.TEACHERS.iterdir()] == [".safetensors"]


def test_judging_keeps_the_order_of_rows(data, encoder):
    rows = Sst2.load(data, 100, encoder).test
    model = sst2.classifier(encoder).eval()
    expected = []
    for row, label in zip(rows, rows.labels, strict=True):
        expected.append(model(input_ids=row["input_ids"][None]).logits.argmax() == label)
    assert sst2.right(model, rows).tolist() == [e.item() for e in expected]


def test_a_teacher_that_remembers_says_what_it_would_say(data, encoder):
    rows = Sst2.load(data, 100, encoder).unlabelled
    model = sst2.classifier(encoder).eval()
    teacher = sst2.Remembering(model, rows)
    model.config.output_hidden_states = True
    for batch in rows.loader(8):
        expected, found = Frozen(model)(batch, {}), teacher(batch, {})
        torch.testing.assert_close(found["logits"], expected["logits"])
        counts = batch["attention_mask"].bool()
        for layer in ("hidden_states.1", "hidden_states.2"):
            states = expected[layer][counts].bfloat16()
            torch.testing.assert_close(found[layer][counts], states, rtol=2**-7, atol=1e-3)


def test_latency_is_of_every_model_at_two_batches(data, encoder):
    rows = Sst2.load(data, 100, encoder).test
    model = sst2.classifier(encoder).eval()
    found = sst2.latency_ms({"a": model, "b": model}, rows)
    assert list(found) == ["a", "b"]
    assert all(list(times) == ["batch 1", "batch 32"] for times in found.values())
    assert all(ms > 0 for times in found.values() for ms in times.values())


def test_scales():
    quick, usual, whole = (
        sst2.scale_of(Namespace(quick=q, whole=w), seed=3)
        for q, w in ((True, False), (False, False), (False, True))
    )
    assert quick.labelled < usual.labelled < whole.labelled
    assert {scale.teacher.seed for scale in (quick, usual, whole)} == {3}
