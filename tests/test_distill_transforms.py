"""What batches become before they are learned from: augmented, written by models, made of noise."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trine.distill import (
    CropAndFlip,
    DataFree,
    Distiller,
    Fixed,
    Frozen,
    Mixup,
    OnPolicy,
    ReplaceTokens,
    Several,
    Training,
    sequence_targets,
    student_from_teacher,
    succession,
    written_by,
)
from trine.distill.objectives import Labels, SoftTargets
from trine.distill.schedules import piecewise

NOBODY = nn.Identity()


def test_tokens_are_replaced():
    ids = torch.randint(10, 100, (200, 50))
    ids[:, 0] = 1
    mask = torch.ones_like(ids)
    mask[:, 40:] = 0
    corpus = torch.tensor([500, 501, 501, 501])
    batch = {"input_ids": ids, "attention_mask": mask}
    made = ReplaceTokens(corpus, 0.3, keep=(1,))(batch, NOBODY)["input_ids"]
    assert torch.equal(made[:, 0], ids[:, 0])
    assert torch.equal(made[:, 40:], ids[:, 40:])
    replaced = made != ids
    assert replaced[:, 1:40].float().mean() == pytest.approx(0.3, abs=0.03)
    assert (made[replaced] == 501).float().mean() == pytest.approx(0.75, abs=0.05)
    with pytest.raises(ValueError, match="a probability in"):
        ReplaceTokens(corpus, 1.5)


def test_images_are_shifted_and_mirrored():
    images = torch.arange(1.0, 2 * 3 * 5 * 6 + 1).reshape(2, 3, 5, 6).repeat(50, 1, 1, 1)
    made = CropAndFlip(2)({"inputs": images}, NOBODY)["inputs"]
    padded = nn.functional.pad(images, (2, 2, 2, 2))

    def cut(image, i, j, flip):
        part = image[:, i : i + 5, j : j + 6]
        return part.flip(-1) if flip else part

    seen = set()
    for before, after in zip(padded, made, strict=True):
        places = [
            (i, j, flip)
            for i in range(5)
            for j in range(5)
            for flip in (False, True)
            if torch.equal(after, cut(before, i, j, flip))
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 30
    plain = CropAndFlip(0, flip=False)({"inputs": images}, NOBODY)["inputs"]
    assert torch.equal(plain, images)


def test_mixed_inputs_have_mixed_labels():
    x, y = torch.randn(6, 4), torch.arange(6)
    made = Mixup(1.0)({"inputs": x, "labels": y}, NOBODY)
    share, others = made["share"], made["other_labels"]
    assert 0 < share < 1
    torch.testing.assert_close(made["inputs"], share * x + (1 - share) * x[others])
    logits = torch.randn(6, 6)
    log_p = logits.double().log_softmax(1)
    rows = range(6)
    expected = -(share * log_p[rows, y] + (1 - share) * log_p[rows, others]).mean()
    actual = Labels()({"logits": logits}, {}, made)["hard"]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)


def test_several_transforms_in_their_order():
    first = lambda batch, student: {**batch, "inputs": batch["inputs"] + 1}  # noqa: E731
    second = lambda batch, student: {**batch, "inputs": batch["inputs"] * 2}  # noqa: E731
    assert Several(first, second)({"inputs": 3}, NOBODY) == {"inputs": 8}


# Texts


@pytest.fixture(scope="module")
def language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40,
        n_positions=32,
        n_embd=16,
        n_layer=4,
        n_head=2,
        eos_token_id=7,
        bos_token_id=7,
    )
    return transformers.GPT2LMHeadModel(config)


def prompts():
    """Two and four tokens, padded on the left."""
    ids = torch.tensor([[0, 0, 11, 12], [13, 14, 15, 16]])
    return {"prompt_ids": ids, "prompt_mask": (ids > 0).long()}


def test_what_a_model_writes(language_model):
    language_model.train()
    made = written_by(language_model, prompts(), max_new_tokens=6, pad_token_id=0)
    assert language_model.training
    assert torch.equal(made["input_ids"][:, :4], prompts()["prompt_ids"])
    assert (made["labels"][:, :4] == -100).all()
    for row, prompt in ((0, [11, 12]), (1, [13, 14, 15, 16])):  # token by token, without padding
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(made["input_ids"].shape[1] - 4):
                logits = language_model.eval()(torch.tensor([ids])).logits[0, -1]
                ids.append(logits.argmax().item())
                if ids[-1] == 7:
                    break
        real = made["attention_mask"][row].bool()
        assert made["input_ids"][row][real].tolist() == ids
        assert made["labels"][row][real][len(prompt) :].tolist() == ids[len(prompt) :]


def test_nothing_counts_after_the_end():
    class Writer(nn.Module):
        generation_config = None

        def generate(self, input_ids, attention_mask, eos_token_id, **options):
            new = torch.tensor([[5, 7, 0, 7], [5, 6, 8, 9]])
            return torch.cat([input_ids, new], 1)

    made = written_by(Writer(), prompts(), eos_token_id=7)
    assert made["labels"][:, 4:].tolist() == [[5, 7, -100, -100], [5, 6, 8, 9]]
    examples = sequence_targets(Writer(), [prompts()] * 2, eos_token_id=7)
    assert [e["input_ids"].tolist() for e in examples] == 2 * [
        [11, 12, 5, 7],
        [13, 14, 15, 16, 5, 6, 8, 9],
    ]


def test_on_policy_batches_are_the_students(language_model):
    batch = {**prompts(), "input_ids": torch.ones(2, 8).long(), "labels": torch.ones(2, 8).long()}
    never, always = (OnPolicy(s, max_new_tokens=4, pad_token_id=0) for s in (0.0, 1.0))
    assert never(batch, language_model) is batch
    later = OnPolicy(piecewise([0.0, 1.0], [5]), max_new_tokens=4, pad_token_id=0)
    assert later({**batch, "step": 4}, language_model)["input_ids"] is batch["input_ids"]
    assert later({**batch, "step": 5}, language_model)["input_ids"] is not batch["input_ids"]
    made = always(batch, language_model)
    assert torch.equal(made["input_ids"][:, :4], batch["prompt_ids"])
    assert not torch.equal(made["labels"][:, 4:], batch["labels"][:, 4:])
    with pytest.raises(ValueError, match="has no 'prompt_ids'"):
        always({"input_ids": batch["input_ids"]}, language_model)
    right = {"prompt_ids": batch["prompt_ids"].flip(1), "prompt_mask": batch["prompt_mask"].flip(1)}
    with pytest.raises(ValueError, match="padded on the left"):
        always(right, language_model)


def test_a_student_learns_from_what_it_writes(language_model):
    student = student_from_teacher(language_model, [0, 3])
    loader = DataLoader([{k: v[i] for k, v in prompts().items()} for i in (0, 1)] * 4, 4)
    distiller = Distiller(
        student,
        Frozen(language_model),
        SoftTargets(1.0, labels="labels", shift=True, divergence="jsd"),
        Fixed({"soft": 1.0}),
        transform=OnPolicy(1.0, max_new_tokens=4, pad_token_id=0),
        training=Training(epochs=10, learning_rate=3e-3),
    )
    distiller.fit(loader)
    losses = [row["loss"] for row in distiller.history]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


# Students of teachers


def test_a_student_with_some_of_the_teachers_layers(language_model):
    student = student_from_teacher(language_model, [1, 3])
    blocks = language_model.transformer.h
    for kept, layer in zip(student.transformer.h, (1, 3), strict=True):
        assert torch.equal(kept.mlp.c_fc.weight, blocks[layer].mlp.c_fc.weight)
    assert student.config.n_layer == 2
    assert len(blocks) == language_model.config.n_layer == 4
    assert [block.attn.layer_idx for block in student.transformer.h] == [0, 1]
    ids = torch.randint(40, (2, 5))
    hidden = language_model.transformer.wte(ids) + language_model.transformer.wpe.weight[:5]
    with torch.no_grad():
        language_model.eval()
        for layer in (1, 3):
            hidden = blocks[layer](hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        expected = language_model.lm_head(language_model.transformer.ln_f(hidden))
        torch.testing.assert_close(student.eval()(ids).logits, expected)
    assert student.generate(ids, max_new_tokens=3, pad_token_id=0).shape == (2, 8)


@pytest.mark.parametrize(
    ("layers", "path", "message"),
    [
        ([0, 9], "h", "has layers 0 to 1; asked for"),
        ([0], "other", "no list of layers at 'other'"),
        ([0], None, "give path=, the list of layers; the teacher has 'h' of 2, 'g' of 2"),
    ],
)
def test_layers_that_there_are_not(layers, path, message):
    teacher = nn.Module()
    teacher.h = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    teacher.g = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    with pytest.raises(ValueError, match=message):
        student_from_teacher(teacher, layers, path)


def test_each_learns_from_the_one_before():
    models = [nn.Linear(1, 1) for _ in range(4)]
    pairs = []

    def teach(student, teacher):
        pairs.append((student, teacher))
        return student

    assert list(succession(models[0], models[1:], teach)) == models[1:]
    assert pairs == [(models[i], models[i - 1]) for i in (1, 2, 3)]


# Without data


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 5))

    def forward(self, noise):
        return self.layers(noise)


def test_one_step_of_a_generator():
    teacher = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    generator, noise = Generator(), torch.randn(6, 3)
    made = DataFree(teacher, generator, "1", learning_rate=0.01)
    x = generator(noise)
    rows = teacher.double()(x.double())
    features = teacher[1](teacher[0](x.double()))
    p = rows.softmax(1)
    one_hot = -sum(p[i].max().log() for i in range(6)) / 6
    mean = p.mean(0)
    loss = one_hot - 0.1 * features.abs().mean() + 5 * (mean * mean.log()).sum()
    gradient = torch.autograd.grad(loss, generator.layers[0].weight)[0]
    teacher.float()
    before = generator.layers[0].weight.detach().clone()
    batch = made({"inputs": noise}, NOBODY)
    torch.testing.assert_close(batch["inputs"], x)
    assert not batch["inputs"].requires_grad
    assert made.terms["one_hot"] == pytest.approx(one_hot.item(), rel=1e-4)
    # The first step of Adam goes 0.01 against the sign of the gradient.
    step = generator.layers[0].weight - before
    torch.testing.assert_close(step, -0.01 * gradient.sign().float(), rtol=1e-3, atol=1e-5)


def test_a_student_of_noise(tmp_path):
    """It comes to agree with a teacher whose data nobody has; a checkpoint holds the generator."""
    teacher = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    student, generator = nn.Linear(5, 4), Generator()
    transform = DataFree(teacher, generator, "1")
    distiller = Distiller(
        student,
        Frozen(teacher),
        SoftTargets(2.0),
        Fixed({"soft": 1.0}),
        transform=transform,
        training=Training(epochs=20, learning_rate=0.02),
        folder=tmp_path,
    )
    distiller.fit(DataLoader(TensorDataset(torch.randn(128, 3)), 32))
    losses = [row["loss"] for row in distiller.history]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["transform"]
    assert torch.equal(saved["generator"]["layers.0.weight"], generator.layers[0].weight)
