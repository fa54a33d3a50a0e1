"""Teacher caches: what comes back, what a kill leaves, and what is refused."""

import json
import multiprocessing
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trine.distill import CachedTeacher, Frozen, Numbered, cache_teacher
from trine.distill.objectives import SoftTargets

CLASSES = 50


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return 3 * self.head(x)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, CLASSES)

    def forward(self, input_ids, attention_mask):
        return 2 * self.embedding(input_ids).cumsum(1)


class Sentences(torch.utils.data.Dataset):
    """Of 1 to 6 tokens."""

    def __init__(self, count: int) -> None:
        draws = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 7, (count,), generator=draws).tolist()
        self.ids = [torch.randint(30, (n,), generator=draws) for n in lengths]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i]}


def padded(items, side="right"):
    """A batch, with as much padding as it needs."""
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        n = len(item["input_ids"])
        where = slice(0, n) if side == "right" else slice(longest - n, longest)
        ids[row, where], mask[row, where] = item["input_ids"], 1
    index = torch.tensor([item["index"] for item in items])
    return {"input_ids": ids, "attention_mask": mask, "index": index}


@pytest.fixture
def images():
    data = TensorDataset(torch.randn(23, 6), torch.arange(23))
    return Frozen(Images()), Numbered(data)


def cached(images, folder, **options):
    teacher, data = images
    options = {"top_k": 5, "examples_per_shard": 10, **options}
    return cache_teacher(teacher, DataLoader(data, 4), folder, **options)


def first(data, count):
    batch = next(iter(DataLoader(data, count)))
    return batch["inputs"], batch["index"]


def test_answers_come_back_in_any_order(images, tmp_path):
    teacher, data = images
    cache = cached(images, tmp_path, dtype="float32", temperature=2.0)
    assert len(cache) == 23
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "manifest.json",
        *(f"shard-0000{i}.safetensors" for i in range(3)),
    ]
    order = torch.randperm(23)
    inputs = data.dataset.tensors[0][order]
    view = cache({"inputs": inputs, "index": order}, {})
    expected = (teacher.model(inputs) / 2).log_softmax(-1).topk(5)
    assert torch.equal(view["top_indices"], expected.indices)
    torch.testing.assert_close(view["top_log_probabilities"], expected.values)


def test_everything_may_be_kept(images, tmp_path):
    teacher, data = images
    cache = cached(images, tmp_path, top_k=None, dtype="float32")
    x, index = first(data, 23)
    view = cache({"inputs": x, "index": index}, {})
    student = {"logits": torch.randn(23, CLASSES)}
    losses = [
        SoftTargets(3.0)(student, t, {})["soft"] for t in (view, {"logits": teacher.model(x)})
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_any_padding(side, tmp_path):
    teacher, data = Frozen(Text()), Numbered(Sentences(17))
    loader = DataLoader(data, 4, collate_fn=padded)
    cache = cache_teacher(teacher, loader, tmp_path, 3, examples_per_shard=6)
    rows = torch.randperm(17)[:5].tolist()
    batch = padded([data[i] for i in rows], side)
    view = cache(batch, {})
    real = batch["attention_mask"].bool()
    assert (view["top_indices"][~real] == -1).all()
    for row, i in enumerate(rows):
        logits = teacher.model(data[i]["input_ids"][None], None)[0]
        expected = logits.log_softmax(-1).topk(3)
        assert torch.equal(view["top_indices"][row][real[row]], expected.indices)
        torch.testing.assert_close(
            view["top_log_probabilities"][row][real[row]], expected.values, atol=0, rtol=2**-10
        )


@pytest.mark.parametrize("kind", ["texts without padding", "classes of padded texts"])
def test_answers_have_the_shape_of_the_teachers(kind, tmp_path):
    """Rows are tokens where the teacher's are, whether or not the batch says which are real."""

    class Classes(Text):
        def forward(self, input_ids, attention_mask):
            return (super().forward(input_ids, None) * attention_mask[..., None]).sum(1)

    class Whole(Text):
        def forward(self, input_ids):
            return super().forward(input_ids, None)

    if kind == "texts without padding":
        teacher, data = (
            Frozen(Whole()),
            Numbered([{"input_ids": torch.arange(4) + i} for i in range(6)]),
        )
        loader = DataLoader(data, 3)
    else:
        teacher, data = Frozen(Classes()), Numbered(Sentences(6))
        loader = DataLoader(data, 3, collate_fn=padded)
    for top_k in (3, None):
        cache = cache_teacher(teacher, loader, tmp_path / str(top_k), top_k, dtype="float32")
        for batch in loader:
            expected, view = teacher(batch, {})["logits"], cache(batch, {})
            if top_k is None:
                torch.testing.assert_close(view["logits"], expected.log_softmax(-1))
            else:
                assert torch.equal(view["top_indices"], expected.topk(3).indices)


def test_size_is_what_the_numbers_take(tmp_path):
    """4 bytes for each of the top k, 16 for the rest of an example."""
    data = TensorDataset(torch.randn(2000, 6))
    cache = cache_teacher(Frozen(Images()), DataLoader(Numbered(data), 100), tmp_path, 16)
    total = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert total < 2000 * (4 * 16 + 16) + 2000
    assert len(cache) == 2000


class Killed(Exception):
    pass


def test_a_killed_job_goes_on(images, tmp_path):
    """The teacher is not asked again for what is there, and the files are those of one run."""
    teacher, data = images
    calls = []

    class Counting(Frozen):
        def __call__(self, batch, student):
            if len(calls) == 4:
                calls.append(None)
                raise Killed
            calls.append(batch["index"].tolist())
            return super().__call__(batch, student)

    counting = Counting(teacher.model)
    loader = DataLoader(data, 4)
    options = dict(top_k=5, examples_per_shard=10)
    with pytest.raises(Killed):
        cache_teacher(counting, loader, tmp_path / "a", **options)
    with pytest.raises(ValueError, match="not finished"):
        CachedTeacher(tmp_path / "a")
    cache_teacher(counting, loader, tmp_path / "a", **options)
    assert calls[5][0] == 8  # the batch that holds the first example after the shard of ten
    cache_teacher(teacher, loader, tmp_path / "b", **options)
    for path in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()


def test_another_teacher_or_data_set_is_refused(images, tmp_path):
    teacher, data = images
    cached(images, tmp_path)
    assert len(cached(images, tmp_path)) == 23  # again: nothing to do
    other = Frozen(Images())
    with pytest.raises(ValueError, match="another teacher's answers"):
        cached((other, data), tmp_path)
    with pytest.raises(ValueError, match="another teacher's answers"):
        CachedTeacher(tmp_path, other)
    CachedTeacher(tmp_path, teacher)
    with pytest.raises(ValueError, match="top_k = 5"):
        cached(images, tmp_path, top_k=4)
    with pytest.raises(ValueError, match="temperature = 1"):
        cached(images, tmp_path, temperature=2.0)
    x = data.dataset.tensors[0].clone()
    x[7] += 1
    changed = Numbered(TensorDataset(x, torch.arange(23)))
    with pytest.raises(ValueError, match="another data set"):
        cached((teacher, changed), tmp_path)
    shorter = Numbered(TensorDataset(x[:5], torch.arange(5)))
    with pytest.raises(ValueError, match="the loader gave 5"):
        cached((teacher, shorter), tmp_path)


def test_examples_that_changed_are_told(images, tmp_path):
    cache = cached(images, tmp_path)
    x, index = first(images[1], 4)
    x[2] += 1e-3
    with pytest.raises(ValueError, match="example 2 is not what the teacher saw"):
        cache({"inputs": x, "index": index}, {})
    with pytest.raises(ValueError, match="example 23 is not among them"):
        cache({"inputs": x, "index": index + 20}, {})
    with pytest.raises(ValueError, match="the batch needs 'index'"):
        cache({"inputs": x}, {})


def test_damage_is_told(images, tmp_path):
    cached(images, tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=f"is {len(whole) - 8} bytes long, not {len(whole)}"):
        CachedTeacher(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        CachedTeacher(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        CachedTeacher(tmp_path)
    with pytest.raises(ValueError, match="holds no teacher cache"):
        CachedTeacher(tmp_path / "nowhere")


def test_shuffled_loaders_are_refused(images, tmp_path):
    teacher, data = images
    with pytest.raises(ValueError, match="Turn shuffling off"):
        cache_teacher(teacher, DataLoader(data, 4, shuffle=True), tmp_path, 5)


def test_a_loss_at_another_temperature_is_refused(images, tmp_path):
    cache = cached(images, tmp_path, temperature=2.0)
    x, index = first(images[1], 4)
    view = cache({"inputs": x, "index": index}, {})
    with pytest.raises(ValueError, match="cached at temperature 2"):
        SoftTargets(4.0, top_k=True)({"logits": torch.randn(4, CLASSES)}, view, {})


def _read_in_process(cache, batch, answers):
    answers.put(cache(batch, {})["top_indices"].tolist())


def test_several_processes_read_at_once(images, tmp_path):
    cache = cached(images, tmp_path)
    x, index = first(images[1], 23)
    batch = {"inputs": x, "index": index}
    expected = cache(batch, {})["top_indices"].tolist()
    assert pickle.loads(pickle.dumps(cache))(batch, {})["top_indices"].tolist() == expected
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [
        context.Process(target=_read_in_process, args=(cache, batch, answers)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    assert [answers.get(timeout=60) for _ in workers] == [expected] * 2
    for worker in workers:
        worker.join()
