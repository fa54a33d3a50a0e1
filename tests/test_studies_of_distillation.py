"""The studies in benchmarks/distillation, on a few examples."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset
from trine.distill import Training

from benchmarks.distillation import language, objectives, temperature
from benchmarks.distillation.digits import load
from benchmarks.language import Blocks, Texts, nats, source_files


@pytest.fixture(scope="module")
def digits() -> TensorDataset:
    return TensorDataset(*(tensor[:64] for tensor in load().train.tensors))


# Ten objectives


def test_disturbed_digits_are_the_same_for_everyone(digits):
    first, again, other = (objectives.copies(digits, seed) for seed in (1, 1, 2))
    assert first[0].shape == (64, 1, 32, 32)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", objectives.WAYS)
def test_every_objective_trains_its_student(digits, name):
    """It moves the weights to where the labels alone, or without it, do not."""
    teacher = objectives.ResNet(objectives.TEACHER_BLOCKS, 0).eval()
    trained = []
    for way in (None, objectives.WAYS[name]):
        student = objectives.ResNet(objectives.STUDENT_BLOCKS, 1)
        trained.append(objectives.teach(student, way and teacher, way, digits, 2, seed=0))
    weights = [model.stem[0].weight for model in trained]
    assert all(w.isfinite().all() for w in weights)
    assert not torch.allclose(*weights)
    assert teacher.stem[0].weight.grad is None


def test_the_order_is_compared_with_the_papers():
    names = [n for n, way in objectives.WAYS.items() if isinstance(way.published, float)]
    right = {n: torch.full((3, 40), objectives.WAYS[n].published) for n in names}
    assert objectives.order_against_paper(right, draws=20) == (pytest.approx(1), (1.0, 1.0))
    right = {n: 100 - percent for n, percent in right.items()}
    assert objectives.order_against_paper(right, draws=20)[0] == pytest.approx(-1)


# Language models


TOY = language.Settings(
    train_bytes=20_000,
    test_bytes=4_000,
    vocabulary=300,
    length=40,
    teacher_width=16,
    teacher_layers=2,
    student_width=8,
    student_layers=1,
    teacher_updates=2,
    student_updates=4,
    top_k=4,
    on_policy=1.0,
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Ten modules, of which the eighth is to be tested on."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(10):
        lines = (f"value_{number} = {i} * other  # of {number}\n" for i in range(200))
        (folder / f"module_{number}.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def texts(library) -> Texts:
    return language.load(TOY, library)


def test_held_out_files(library, texts):
    files = source_files(library)
    assert [path.name for path in files["test"]] == ["module_7.py"]
    assert len(files["train"]) == 9
    assert texts.train.ids.shape[1] == texts.test.ids.shape[1] == TOY.length
    again = language.load(TOY, library)
    assert torch.equal(again.train.ids, texts.train.ids)
    with pytest.raises(ValueError, match="the library's train files have"):
        language.load(language.Settings(), library)


def test_perplexity_is_of_the_next_token(texts):
    model = language.make(TOY, "student", 0).eval()
    ids = texts.test.ids[:3]
    with torch.no_grad():
        log_p = model(input_ids=ids).logits.double().log_softmax(-1)
    of_tokens = -log_p[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    actual = nats(model, Blocks(ids))
    torch.testing.assert_close(actual.double(), of_tokens.mean(1), rtol=1e-5, atol=1e-6)


def test_every_way_trains_its_student_and_the_cache_is_counted(texts, tmp_path):
    teacher = language.make(TOY, "teacher", 0).eval()
    size = language.keep_answers(TOY, texts, teacher, tmp_path / "cache")
    tokens = TOY.student_updates * language.BATCH * TOY.length
    assert size > tokens * TOY.top_k * 4
    found = {"teacher": nats(teacher, texts.test)[None]}
    train = language.students_text(TOY, texts)
    for name, way in language.ways(TOY, teacher, tmp_path / "cache").items():
        student = language.make(TOY, "student", 1)
        before = nats(student.eval(), texts.test)
        training = Training(epochs=1, learning_rate=1e-2)
        language.fit(student, blocks=train, training=training, **way)
        found[name] = nats(student, texts.test)[None]
        assert not torch.allclose(found[name], before)
    assert not torch.allclose(found["forward KL"], found["GKD"])  # which learned from its own texts
    rows = language.rows_of(TOY, found, size)
    assert rows[0].value == pytest.approx(math.exp(found["teacher"].double().mean()))
    assert [row.bytes for row in rows][-1] == size


# The temperature and the batch


def test_the_noise_of_a_batch_is_that_of_a_mean():
    of_images = torch.randn(50, 30)
    expected = of_images.double().var(0, correction=0).sum() / 8
    squares = temperature.squared_noise(of_images, 8, draws=4000)
    assert squares.mean().item() == pytest.approx(expected.item(), rel=0.02)


def test_the_rule_is_read_off_where_it_holds():
    """A noise of exactly 1 / (T^2 * sqrt(B)) is kept by the rule, and the interval is around it."""
    settings = temperature.Settings()
    t = torch.tensor(settings.temperatures, dtype=torch.float64)
    b = torch.tensor(settings.batches, dtype=torch.float64)
    draws = 1 + 0.1 * torch.randn(400, dtype=torch.float64)
    squares = (1 / (t**4)[:, None, None] / b[:, None]) * (draws / draws.mean())
    *rows, last = temperature.rows_of(settings, {"plain": squares, "T^2": squares})
    assert len(rows) == len(settings.wanted) * (len(settings.batches) - 1)
    for row in rows:
        assert row.value == pytest.approx(float(row.published.split()[-1]), abs=0.006)
        assert row.interval[0] < row.value < row.interval[1]
    assert last.value == pytest.approx(1 / 100, rel=1e-6)  # from T = 2 to 20, without the factor


def test_gradients_are_of_single_images(digits):
    student, teacher = (objectives.ResNet(1, seed).eval() for seed in (0, 1))
    images = objectives.copies(digits, 1)[0][:3]
    plain, scaled = (
        temperature.gradients(student, teacher, images, 2.0, squared) for squared in (False, True)
    )
    torch.testing.assert_close(scaled, 4 * plain)
    targets, logits = (m(images).div(2).log_softmax(1) for m in (teacher, student))
    loss = (targets.exp() * (targets - logits)).sum(1).mean()
    mean = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])
    torch.testing.assert_close(plain.mean(0), mean, rtol=1e-3, atol=1e-6)
