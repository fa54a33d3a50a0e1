"""The main job, end to end with tiny settings, and its parts."""

import json
import math
from io import StringIO

import pytest
import torch
import trine
from rich.console import Console
from torch import nn
from trine.demo import job, rows, tasks
from trine.demo.classifiers import compare_ends
from trine.demo.digits import Mlp, Rows, jitter, load_digits
from trine.demo.sentences import Encoder, embed, empty_encoder, load_sentences
from trine.demo.serve import outputs, same_bits
from trine.demo.settings import Settings
from trine.demo.stages import Stages
from trine.demo.training import Schedule, train, warmup_then_cosine

TINY = Settings(
    teacher_width=32,
    student_width=16,
    teacher_epochs=2,
    student_epochs=1,
    qat_epochs=1,
    sentences=40,
)
ROW_KEYS = {"name", "technique", "bytes", "accuracy", "accuracy_ci", "latency_ms", "speedup"} | {
    "bit_exact_convert",
    "bit_exact_reload",
    "cosine_mean",
    "cosine_min",
}


def tiny_encoder() -> Encoder:
    """A BERT of random weights, and one token for each word by its length."""
    config = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 50,
    }

    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor([min(len(word), 49) for word in text.split()]) for text in texts]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return {"input_ids": padded, "attention_mask": (padded > 0).long()}

    return Encoder(empty_encoder(config), tokenize, config)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The job with the tiny encoder; returns the results and what it printed."""
    monkeypatch.setattr(tasks, "load_encoder", tiny_encoder)

    def run(**options):
        console = Console(file=StringIO(), width=80)
        results = job.run(TINY, tmp_path, console=console, **options)
        return results, console.file.getvalue()

    return run


def serve_here(path, architecture, inputs) -> torch.Tensor:
    """What serving gives, without the seconds that a new process takes."""
    return outputs(trine.load(path, like=architecture.build), inputs)


def test_job_end_to_end(run, tmp_path, monkeypatch):
    results, printed = run()
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(results))
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {"processor", "threads", "torch", "trine"} <= results.keys()
    assert len(results["rows"]) == 8
    assert len({row["name"] for row in results["rows"]}) == 8
    for row in results["rows"]:
        assert row.keys() >= ROW_KEYS
        assert row["latency_ms"].keys() == row["speedup"].keys() == {"1", "32"}
        assert min(row["latency_ms"].values()) > 0
        assert (row["accuracy"] is None) == (row["task"] == "sentences")
        assert (row["cosine_min"] is None) == (row["task"] == "digits")
        compressed = "QAT" in row["technique"] or "int8" in row["technique"]
        assert row["bit_exact_convert"] is row["bit_exact_reload"] is (True if compressed else None)
        assert (row["packed_layers"] > 0) == compressed
        if not compressed:
            assert row["speedup"] == {"1": 1.0, "32": 1.0}
    by_name = {row["name"]: row for row in results["rows"]}
    teacher, ternary = by_name["Teacher 2x32"], by_name["Student 2x16 ternary"]
    assert teacher["agreement"] == 1
    low, high = teacher["accuracy_ci"]
    assert low <= teacher["accuracy"] <= high
    assert ternary["bytes"] == (tmp_path / "models/student-2x16-ternary.trine").stat().st_size
    encoder = by_name["MiniLM-L6 int8"]
    assert encoder["packed_layers"] == len(results["encoder"]["compression"]["layers"]) == 7
    assert 0.9 < encoder["cosine_min"] <= encoder["cosine_mean"] <= 1
    assert "Teacher 2x32" in printed.replace("\n", " ")

    # Again in the same folder: nothing is trained, and every answer is the same.
    def no_training(*_args, **_kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("trine.demo.classifiers.train", no_training)
    monkeypatch.setattr(rows, "serve_in_fresh_process", serve_here)
    again, _ = run()
    for before, after in zip(results["rows"], again["rows"], strict=True):
        if before["task"] == "digits":
            for key in ("name", "bytes", "accuracy", "accuracy_ci", "agreement"):
                assert before[key] == after[key]
    with pytest.raises(AssertionError, match="trained again"):
        run(fresh=True)


def test_job_fails_loudly_where_reloading_changes_the_bits(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        rows, "serve_in_fresh_process", lambda *saved: serve_here(*saved).nextafter(torch.ones(1))
    )
    with pytest.raises(
        rows.BrokenPromise, match="ternary gives other bits after saving"
    ) as failure:
        run()
    assert "\n" not in str(failure.value)
    assert '"bit_exact_reload": false' in (tmp_path / "report.json").read_text()


def test_a_model_that_serves_other_bits_than_it_trained_breaks_the_promise():
    known = {"latency_ms": {}, "speedup": {}, "bit_exact_reload": True}
    good = rows.Row("good", "t", "digits", 1, packed_layers=1, bit_exact_convert=True, **known)
    rows.check_promises([good])
    other = rows.Row("other", "t", "digits", 1, packed_layers=1, bit_exact_convert=False, **known)
    empty = rows.Row("empty", "t", "digits", 1, packed_layers=0, bit_exact_convert=True, **known)
    with pytest.raises(rows.BrokenPromise, match="other gives other bits than"):
        rows.check_promises([good, other])
    with pytest.raises(rows.BrokenPromise, match="empty has no layer"):
        rows.check_promises([good, empty])


def test_same_bits_tells_zeros_apart():
    zero = torch.zeros(2, 3)
    assert same_bits(zero, zero.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.half())
    assert same_bits(zero / 0, zero / 0)


def test_digits_are_split_without_overlap():
    digits = load_digits()
    sizes = [len(part.labels) for part in (digits.train, digits.validation, digits.test)]
    assert sum(sizes) == 1797
    again = load_digits()
    assert torch.equal(digits.test.images, again.test.images)
    for part in (digits.train, digits.validation, digits.test):
        assert 0 <= part.images.min() <= part.images.max() <= 1
        shares = part.labels.bincount(minlength=10) / len(part.labels)
        assert (shares - 0.1).abs().max() < 0.02


def test_jitter_moves_by_a_pixel_at_most():
    image = torch.zeros(1, 64)
    image[0, 8 * 4 + 4] = 1
    draws = torch.Generator().manual_seed(0)
    moved = torch.cat([jitter(image, draws) for _ in range(200)]).reshape(-1, 8, 8)
    assert moved.sum((1, 2)).sub(1).abs().max() < 1e-5
    place = torch.arange(8.0)
    offsets = torch.stack([(moved.sum(2) * place).sum(1), (moved.sum(1) * place).sum(1)]) - 4
    assert 0.9 < offsets.abs().max() < 1 + 1e-5


def test_learning_rate_rises_then_falls_to_zero():
    rates = [warmup_then_cosine(step, 100, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_training_depends_on_its_seed_alone():
    images, labels = torch.rand(40, 64), torch.randint(10, (40,))

    def trained(seed: int) -> torch.Tensor:
        model = Mlp(8, dropout=0.5)
        loss = lambda logits, _images, labels: nn.functional.cross_entropy(logits, labels)  # noqa: E731
        train(model, images, labels, loss, Schedule(2, batch=16, seed=seed), augment=jitter)
        assert not model.training
        return model.hidden.weight.detach()

    before = torch.random.get_rng_state()
    first = trained(3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(5)
    assert torch.equal(first, trained(3))
    assert not torch.equal(first, trained(4))


def test_stage_is_used_only_for_the_same_settings(tmp_path):
    def fill(value):
        return lambda model: nn.init.constant_(model.weight, value)

    def stage(settings, value, **options):
        model = nn.Linear(2, 2)
        kept = Stages(tmp_path, settings, **options).trained("m", model, fill(value))
        return kept, model.weight[0, 0].item()

    assert stage({"seed": 0}, 1.0) == (False, 1.0)
    assert stage({"seed": 0}, 2.0) == (True, 1.0)
    assert stage({"seed": 1}, 3.0) == (False, 3.0)
    assert stage({"seed": 1}, 4.0, fresh=True) == (False, 4.0)
    (tmp_path / "m.safetensors").write_bytes(b"cut off")
    assert stage({"seed": 1}, 5.0) == (False, 5.0)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(("right", "compress"), [(100, True), (52, False), (20, False)])
def test_ends_are_compressed_only_where_that_is_better_beyond_chance(right, compress):
    labels = torch.ones(100, dtype=torch.int64)

    def model(correct: int) -> nn.Module:
        fixed = nn.Linear(1, 2)
        fixed.forward = lambda _: nn.functional.one_hot((torch.arange(100) < correct).long(), 2)
        return fixed

    trial = compare_ends("int8", model(50), model(right), Rows(torch.zeros(100, 1), labels))
    assert trial.compress_ends is compress
    assert trial.accuracy_all_compressed == right / 100


def test_sentences_are_distinct_prose():
    sentences = load_sentences(300)
    assert len(set(sentences)) == 300
    assert all(s[0].isupper() and s.endswith(".") and len(s.split()) > 5 for s in sentences)
    with pytest.raises(ValueError, match="asked for"):
        load_sentences(10**6)


def test_embedding_is_the_mean_over_real_tokens():
    encoder = tiny_encoder()
    short, long = "one two three", "a sentence of some more words than that"
    alone = embed(encoder.model, encoder.tokenize([short]))
    padded = embed(encoder.model, encoder.tokenize([short, long]))
    assert torch.allclose(alone[0], padded[0], atol=1e-5)
    assert math.isclose(alone.norm(), 1, abs_tol=1e-5)
