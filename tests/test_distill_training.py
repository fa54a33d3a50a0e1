"""The Distiller: against a loop written out here, after a kill, and on several processes."""

import json
import signal
from pathlib import Path

import pytest
import torch
from launch import launch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trine.distill import Distiller, Fixed, Frozen, Training
from trine.distill.objectives import Hint, Labels, SoftTargets, Together

SCRIPT = Path(__file__).with_name("run_distiller.py")
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(5))
Y = (X[:, 0] > 0).long()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def distiller(student, teacher=None, **options) -> Distiller:
    training = Training(**{"epochs": 2, "learning_rate": 0.05, **options.pop("training", {})})
    return Distiller(
        student,
        Frozen(teacher or network()),
        Together(SoftTargets(2.0), Labels()),
        Fixed({"soft": 0.6, "hard": 0.4}),
        training=training,
        **options,
    )


def loader(batch=8, **options) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch, **options)


def loss_by_hand(student, teacher, x, y):
    s, t = student(x), teacher(x)
    soft = nn.functional.kl_div(
        (s / 2).log_softmax(1), (t / 2).log_softmax(1), log_target=True, reduction="batchmean"
    )
    return 0.6 * 4 * soft + 0.4 * nn.functional.cross_entropy(s, y)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_adam_is_fused_except_under_a_scaler(precision):
    """A scaler would leave the unscaling to a fused one, after a pruner has seen the gradients."""
    made = Training(precision=precision).make_optimizer(network().parameters(), [])
    assert made.defaults["fused"] == (precision != "fp16")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_is_the_loop_that_one_would_write(optimizer):
    student, teacher = network(), network()
    own = network()
    own.load_state_dict(student.state_dict())
    average = {name: p.detach().clone() for name, p in own.named_parameters()}
    settings = dict(optimizer=optimizer, accumulate=2, ema=0.5, decay="linear", clip=0.1)
    distiller(student, teacher, training=settings).fit(loader())

    matrices = [p for p in own.parameters() if p.dim() > 1]
    vectors = [p for p in own.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    make = {
        "adamw": torch.optim.AdamW,
        "sgd": lambda g: torch.optim.SGD(g, 0.1, momentum=0.9, nesterov=True),
    }
    update = make[optimizer](groups)
    # Three batches make two updates an epoch, the second of one batch.
    for step, rows in enumerate([slice(0, 16), slice(16, 24)] * 2):
        # 4 updates: a warm-up of round(0.4) = 0, then straight down to 0.
        for group in update.param_groups:
            group["lr"] = 0.05 * (1 - step / 4)
        update.zero_grad()
        loss_by_hand(own, teacher, X[rows], Y[rows]).backward()
        nn.utils.clip_grad_norm_(own.parameters(), 0.1)
        update.step()
        for name, p in own.named_parameters():
            average[name] = 0.5 * average[name] + 0.5 * p.detach()
    for name, p in student.named_parameters():
        torch.testing.assert_close(p, average[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
        ("restarts", [0.5, 1, 1, 0.5, 1, 0.5]),
    ],
)
def test_learning_rates(decay, expected):
    training = Training(warmup=1 / 3, decay=decay, restarts=2)
    assert [training.rate_at(step, 6) for step in range(6)] == pytest.approx(expected)


def test_the_best_weights_are_kept_and_training_ends_early(tmp_path):
    student = network()
    scores, seen = iter([1.0, 3.0, 2.0, 2.5, 9.0]), []

    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append({name: w.clone() for name, w in model.state_dict().items()})
        return next(scores)

    made = distiller(student, training={"epochs": 5, "patience": 2}, folder=tmp_path)
    assert made.fit(loader(), evaluate) is student
    assert len(seen) == 4
    assert [row["score"] for row in made.history if "score" in row] == [1, 3, 2, 2.5]
    saved = load_file(tmp_path / "student.safetensors")
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, seen[1][name])
        assert torch.equal(weight, saved[name])
    again = distiller(network(), training={"epochs": 5, "patience": 2}, folder=tmp_path)
    again.fit(loader(), evaluate)  # there is nothing left to do
    assert len(seen) == 4
    assert torch.equal(again.student[0].weight, student[0].weight)


def test_what_is_written(tmp_path):
    made = distiller(network(), folder=tmp_path, tensorboard=True)
    made.fit(loader(), lambda model: 0.5)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == made.history
    assert rows[0].keys() == {"step", "epoch", "loss", "soft", "hard", "learning_rate"}
    assert rows[0]["loss"] == pytest.approx(0.6 * rows[0]["soft"] + 0.4 * rows[0]["hard"])
    assert len([row for row in rows if "loss" in row]) == 6
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())
    assert not list(tmp_path.glob("*.part"))


def test_another_training_is_not_continued(tmp_path):
    distiller(network(), folder=tmp_path).fit(loader())
    with pytest.raises(ValueError, match=r"another training \(it differs in: ema, seed\)"):
        distiller(network(), folder=tmp_path, training={"seed": 1, "ema": 0.9}).fit(loader())


def test_progress_names_terms_and_throughput(capsys):
    distiller(network(), progress=True).fit(loader())
    err = capsys.readouterr().err
    assert "step 6/6" in err
    assert "examples/s" in err
    assert "soft" in err
    # No terminal: lines, not one that overwrites itself, and no more than the first and the last.
    assert [line.split()[1] for line in err.splitlines()] == ["1/6", "6/6"]
    assert not {"\r", "\033"} & set(err)


def test_adapters_are_trained_at_their_own_rate():
    student, adapter = network(), nn.Linear(8, 5)
    before = adapter.weight.detach().clone(), student[0].weight.detach().clone()
    teacher = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    made = Distiller(
        student,
        Frozen(teacher, {"h": "0"}),
        Hint("h", "h", adapter),
        Fixed({"hint": 1.0}),
        paths={"h": "0"},
        training=Training(
            steps=1, learning_rate=1e-3, adapter_rate=10, optimizer="sgd", clip=None,
            weight_decay=0, warmup=0, momentum=0,
        ),
    )  # fmt: skip
    own = Hint("h", "h", nn.Linear(8, 5))
    own.adapter.load_state_dict(adapter.state_dict())
    h = student[0](X[:8])
    own({"h": h}, {"h": teacher[0](X[:8])}, {})["hint"].backward()
    expected = before[0] - 1e-2 * own.adapter.weight.grad, before[1] - 1e-3 * student[0].weight.grad
    student.zero_grad()
    made.fit(loader())
    torch.testing.assert_close(adapter.weight, expected[0])
    torch.testing.assert_close(student[0].weight, expected[1])


def test_automatic_mixed_precision():
    dtypes = []
    student = network()
    student[0].register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    distiller(student, training={"precision": "bf16"}).fit(loader())
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in student.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"processes": 2}, "asks for 2 processes and there are 1; start it with torchrun"),
        ({"parallel": "ddp"}, "asks for 'ddp' and there is one process"),
        ({"parallel": "fsdp"}, "asks for 'fsdp' and there is one process"),
        ({"optimizer": "lion"}, "optimizer must be one of 'adamw', 'sgd'; it is 'lion'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\)"),
    ],
)
def test_what_can_not_run(settings, message):
    with pytest.raises(ValueError, match=message):
        distiller(network(), training=settings)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device for fp16")
def test_fp16_needs_a_device():
    with pytest.raises(ValueError, match="fp16 training needs a GPU"):
        distiller(network(), training={"precision": "fp16"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "runs plain copies; start with torchrun"),
        ("ACCELERATE_USE_CPU", "True", "starts one process, whatever --num_processes says"),
        ("WORLD_SIZE", "2", "2 processes were launched and accelerate runs as 1"),
    ],
)
def test_launches_that_would_run_something_else(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distiller(network())


def test_a_loss_that_is_not_finite():
    student = network()
    with torch.no_grad():
        student[2].bias[0] = torch.inf
    with pytest.raises(ValueError, match="the loss became nan at step 1"):
        distiller(student).fit(loader())


# Killed, and on several processes


def run(folder: Path, *arguments: str, processes: int | None = None, check=True):
    done = launch(str(SCRIPT), str(folder), *arguments, processes=processes)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, "--random", "--save-every", "2")
    return folder


@pytest.mark.parametrize("call", [9, 20])  # of 24
def test_a_killed_job_ends_with_the_same_bits(uninterrupted, tmp_path, call):
    """With shuffling, workers that draw, dropout, averages, a balance and a teacher that learns."""
    arguments = ("--random", "--save-every", "2")
    killed = run(tmp_path, *arguments, "--die-at", str(call), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "student.safetensors").exists()
    run(tmp_path, *arguments)
    for name in ("student.safetensors", "history.jsonl"):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run(folder, "--parallel", "fsdp", "--save-every", "2", processes=2)
    return folder


def test_several_processes_give_the_result_of_one(sharded, tmp_path):
    """Two batches of 8 are one of 16; a copy in each process, and shards."""
    one, copies = tmp_path / "one", tmp_path / "copies"
    run(one, "--batch", "16", "--parallel", "none")
    run(copies, "--parallel", "ddp", processes=2)
    expected = load_file(one / "student.safetensors")
    whole = json.loads((one / "report-0.json").read_text())
    assert whole["processes"] == 1
    for folder, times in ((copies, 2), (sharded, 1)):
        reports = [json.loads((folder / f"report-{i}.json").read_text()) for i in range(2)]
        assert [report["processes"] for report in reports] == [2, 2]
        assert sum(report["held"] for report in reports) == times * whole["held"]
        actual = load_file(folder / "student.safetensors")
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_banks_hold_what_every_process_saw(tmp_path, parallel):
    run(tmp_path, "--contrast", "--parallel", parallel, processes=2)
    first, second = (torch.load(tmp_path / f"banks-{rank}.pt") for rank in range(2))
    for name, bank in first["ended"].items():
        assert torch.equal(bank, second["ended"][name])
        assert (bank != first["begun"][name]).reshape(len(bank), -1).any(1).all(), name


def test_killed_shards_go_on(sharded, tmp_path):
    arguments = ("--parallel", "fsdp", "--save-every", "2")
    killed = run(tmp_path, *arguments, "--die-at", "7", processes=2, check=False)
    assert killed.returncode != 0
    assert not (tmp_path / "student.safetensors").exists()
    run(tmp_path, *arguments, processes=2)
    names = [folder / "student.safetensors" for folder in (sharded, tmp_path)]
    assert names[0].read_bytes() == names[1].read_bytes()
