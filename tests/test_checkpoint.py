"""Checkpoints: the same bits after loading, nothing but whole files, and nothing half-loaded."""

import builtins
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import run_checkpoints
import safetensors.torch
import torch
import trine
from fake_timers import says
from torch import nn
from trine import Recipe
from trine.compress.rebuild import build, describe
from trine.compress.trees import MODULES

TESTS = Path(__file__).parent


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 20),
        nn.ReLU(),
        nn.LayerNorm(20),
        nn.Linear(20, 20, bias=False),
        nn.Linear(20, 5),
    ).to(dtype)


def compressed(
    model: nn.Module, recipe: Recipe | None = None, x: torch.Tensor | None = None
) -> nn.Module:
    recipe = recipe or Recipe({"0": "int8", "3": "ternary", "4": "sparse24"})
    x = torch.randn(3, 12, dtype=next(model.parameters()).dtype) if x is None else x
    return trine.compress(model, recipe, x, timer=says(2))


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "model.trine"
    trine.save(compressed(mlp()), path)
    return path


def assert_equal_models(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    assert [(n, type(m)) for n, m in a.named_modules()] == [
        (n, type(m)) for n, m in b.named_modules()
    ]


# ---- there and back ----

PACKED_CHOICES = ("int8", "int8-weight", "ternary", "sparse24", "sparse24-int8", "ternary24")


@pytest.mark.parametrize("choice", PACKED_CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factory", [True, False])
def test_the_same_bits_after_loading(tmp_path, choice, dtype, factory):
    small = compressed(mlp(dtype), Recipe(choice))
    assert small.report.swapped == 3
    trine.save(small, tmp_path / "a.trine")
    again = trine.load(tmp_path / "a.trine", like=(lambda: mlp(dtype)) if factory else None)
    assert_equal_models(small, again)
    assert again.report == small.report
    x = torch.randn(7, 12, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(again(x), small(x))
    assert again[0].weight.dtype == again[2].weight.dtype == dtype
    assert not any(module.training for module in again.modules())


def test_the_same_bits_in_a_fresh_process_under_any_number_of_threads(tmp_path):
    expected = {}
    for choice in PACKED_CHOICES:
        small, inputs = compressed(mlp(), Recipe(choice)), {"input": torch.randn(9, 12)}
        trine.save(small, tmp_path / f"{choice}.trine")
        torch.save(inputs, tmp_path / f"{choice}.inputs")
        expected[choice] = run_checkpoints.run(small, inputs)
    run = [sys.executable, TESTS / "run_checkpoints.py", tmp_path, "1", "2"]
    subprocess.run(run, check=True, env=environment())
    for choice, outputs in expected.items():
        for threads in (1, 2):
            again = torch.load(tmp_path / f"{choice}.outputs{threads}")
            assert all(map(torch.equal, again, outputs))


def environment() -> dict[str, str]:
    """A child process finds the package and the modules beside this file as this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_a_model_trained_under_quantisation_is_saved_after_converting(tmp_path):
    qat = trine.quantize.prepare_qat(mlp(), Recipe("ternary"))
    with pytest.raises(ValueError, match=r"layer '0' is still in training.*trine\.convert"):
        trine.save(qat, tmp_path / "a.trine")
    assert list(tmp_path.iterdir()) == []
    converted = trine.convert(qat)
    trine.save(converted, tmp_path / "a.trine")
    again, x = trine.load(tmp_path / "a.trine"), torch.randn(3, 12)
    assert torch.equal(again(x), qat.eval()(x))
    assert not hasattr(again, "report")


class Tied(nn.Module):
    """Ties, a layer under two names, buffers of every sort, a scalar, and an empty tensor."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layer = self.again = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.part = nn.Parameter(self.embedding.weight.detach()[2:4])
        self.register_buffer("counter", torch.tensor(3))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("rotation", torch.randn(8), persistent=False)
        self.register_buffer("columns", torch.randn(8, 6).T)

    def forward(self, tokens):
        x = self.again(torch.relu(self.layer(self.embedding(tokens))) * self.rotation)
        return self.head(x).sum() + self.columns.sum() + self.part.sum() + self.counter


def test_ties_shared_layers_and_buffers_outside_of_the_state(tmp_path):
    tokens = torch.arange(5)
    small = trine.compress(Tied(), Recipe(), tokens, timer=says(2))
    small.columns[0, 0] = small.rotation[0] = 7.0
    trine.save(small, tmp_path / "a.trine")
    again = trine.load(tmp_path / "a.trine", like=Tied)
    assert_equal_models(small, again)
    assert again.head.weight is again.embedding.weight
    assert again.layer is again.again
    assert torch.equal(again.rotation, small.rotation)
    assert torch.equal(again(tokens), small(tokens))
    # the same again, from what was loaded
    trine.save(again, tmp_path / "b.trine")
    assert (tmp_path / "a.trine").read_bytes() == (tmp_path / "b.trine").read_bytes()


def test_a_tree_with_shared_modules_and_named_children_needs_no_factory(tmp_path):
    relu, block = nn.ReLU(inplace=True), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3))
    layers = nn.Sequential()
    for name, layer in {"a": block, "r": relu, "b": block, "s": relu}.items():
        layers.add_module(name, layer)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=(1, 0)), nn.BatchNorm2d(2), nn.Flatten(2), layers
    )
    x = torch.randn(2, 1, 4, 4)
    model(x)
    small = trine.compress(model, Recipe(), x, timer=says(2))
    trine.save(small, tmp_path / "a.trine")
    state = torch.get_rng_state()
    again = trine.load(tmp_path / "a.trine")
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal_models(small, again)
    assert again[3].a is again[3].b
    assert torch.equal(again(x), small(x))
    assert (again[0].padding, again[3].a[1].p, again[3].r.inplace) == ((1, 0), 0.3, True)


def test_every_module_that_can_be_rebuilt_is_rebuilt_as_it_was():
    modules = [
        nn.AdaptiveAvgPool1d(3),
        nn.AdaptiveAvgPool2d((None, 2)),
        nn.AvgPool2d((2, 3), 1, 1, True, False, 4),
        nn.BatchNorm1d(3, 1e-4, None, False, False),
        nn.BatchNorm2d(3, 1e-4, 0.2),
        nn.Conv1d(4, 6, 3, 2, 1, 2, 2, False, "circular"),
        nn.Conv2d(4, 6, (3, 1), (2, 1), "valid", (2, 1), 2, True, "zeros"),
        nn.Dropout(0.1, True),
        nn.Dropout2d(0.2),
        nn.ELU(0.3),
        nn.Embedding(5, 4, 2, 1.5, 3.0, True),
        nn.Flatten(0, 1),
        nn.GELU("tanh"),
        nn.GroupNorm(2, 4, 1e-3, False),
        nn.Hardswish(True),
        nn.Identity(),
        nn.LayerNorm((3, 4), 1e-3, True, False),
        nn.LeakyReLU(0.2),
        nn.Linear(3, 4, False),
        nn.LogSoftmax(1),
        nn.MaxPool2d(2, 1, 1, 2, True, True),
        nn.RMSNorm((3,), 1e-3, False),
        nn.ReLU(True),
        nn.ReLU6(),
        nn.SiLU(),
        nn.Sigmoid(),
        nn.Softmax(-1),
        nn.Tanh(),
        nn.Unflatten(1, (2, 3)),
        trine.nn.ClusteredEmbedding(5, 6, 3, 2, 1),
        trine.nn.ClusteredLinear(6, 4, 2, 3, False),
        trine.nn.LowRankEmbedding(5, 4, 2, 1),
        trine.nn.LowRankLinear(4, 6, 2, False, residual=True),
        trine.nn.QuantizingLayerNorm(6, 1e-6, True, False),
        trine.nn.QuantizingRMSNorm(6, None, False),
        trine.nn.SeparateAttention(8, 3, 4, 6, None, 0.1, False, True),
    ]
    assert {type(module) for module in modules} == set(MODULES)
    for module in modules:
        description = json.loads(json.dumps(describe(nn.ModuleList([module]))))
        (again,) = build(description)
        assert str(again) == str(module)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[1], "forward", torch.sigmoid),
        lambda m: setattr(m, "1", nn.Bilinear(2, 2, 2)),
        lambda m: m.register_buffer("more", torch.zeros(1)),
        lambda m: m[1].register_parameter("slope", nn.Parameter(torch.zeros(1))),
        lambda m: setattr(m[1], "slope", 3),
        lambda m: nn.utils.parametrizations.weight_norm(m[3]),
    ],
)
def test_what_the_manifest_cannot_describe_needs_a_factory(tmp_path, change):
    model = mlp()
    change(model)
    trine.save(model, tmp_path / "a.trine")
    with pytest.raises(ValueError, match="pass like=a function that returns the float model"):
        trine.load(tmp_path / "a.trine")


def test_saving_leaves_the_model_and_the_random_state_as_they_are(tmp_path):
    small = compressed(mlp())
    small.train()
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    state = torch.get_rng_state()
    trine.save(small, tmp_path / "a.trine")
    torch.testing.assert_close(dict(small.state_dict()), before, rtol=0, atol=0)
    assert small.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_model_does_not_depend_on_its_file(saved):
    model = trine.load(saved)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved.write_bytes(bytes(saved.stat().st_size))  # the same file with other bytes in it
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


# ---- files that are no whole checkpoint ----


class Untouched:
    """A factory whose model must be as it was, whatever goes wrong in loading."""

    def __init__(self, factory=mlp):
        self.model = factory()
        self.modules = list(self.model.named_modules())
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def __call__(self) -> nn.Module:
        return self.model

    def check(self) -> None:
        assert list(self.model.named_modules()) == self.modules
        torch.testing.assert_close(dict(self.model.state_dict()), self.state, rtol=0, atol=0)
        assert self.model.training


def refused(path: Path, message: str, factory=mlp) -> None:
    """Loading fails with that message, with the factory's model untouched."""
    like = Untouched(factory)
    with pytest.raises(ValueError, match=message) as error:
        trine.load(path, like=like)
    assert str(error.value).startswith(f"cannot load {str(path)!r}: ")
    like.check()


def rewrite(path: Path, change) -> None:
    """Write the file again, whole and with a right hash, after `change(manifest, tensors)`."""
    with safetensors.safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["trine"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    del manifest["sha256"]
    change(manifest, tensors)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    safetensors.torch.save_file(tensors, path, {"trine": json.dumps(manifest)})


def test_rewriting_alone_changes_nothing(saved):
    before = saved.read_bytes()
    rewrite(saved, lambda manifest, tensors: None)
    assert saved.read_bytes() == before


def test_another_format_version_is_refused(saved):
    rewrite(saved, lambda manifest, tensors: manifest.update(format_version=2))
    version = r"trine \d+\.\d+\.\d+"
    refused(saved, rf"format version 2, written by {version}; this is {version}, which reads")


def test_a_truncated_file_is_refused_wherever_it_ends(saved):
    data = saved.read_bytes()
    for length in [*range(0, 12), *range(12, len(data), 97), len(data) - 1]:
        saved.write_bytes(data[:length])
        refused(saved, "it is incomplete or no safetensors file")


def test_a_longer_file_is_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    refused(saved, "it is incomplete or no safetensors file")


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = tmp_path / "a.trine"
    small = compressed(nn.Sequential(nn.Linear(4, 2)), Recipe(), torch.randn(1, 4))
    trine.save(small, path)
    data = path.read_bytes()
    for position in range(
        0, len(data), 5
    ):  # every bit of a byte comes up, since 5 and 8 are coprime
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            again = trine.load(path)
        except ValueError:
            continue
        assert_equal_models(again, small)  # white space in the header
        assert again.report == small.report


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"sha256": "0"}'])
def test_a_damaged_manifest_is_refused(saved, text):
    safetensors.torch.save_file({"a": torch.ones(1)}, saved, {"trine": text})
    refused(saved, "its manifest is damaged")


def test_a_damaged_tensor_is_named(saved):
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    refused(saved, "tensor '.*' is damaged")


def test_a_tensor_that_is_missing_or_too_much_is_named(saved):
    rewrite(saved, lambda manifest, tensors: tensors.pop("2.weight"))
    refused(saved, "file and manifest list different tensors: 2.weight")
    rewrite(
        saved,
        lambda manifest, tensors: tensors.update({"2.weight": torch.ones(20), "x": torch.ones(1)}),
    )
    refused(saved, "file and manifest list different tensors: x")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("layers"),
        lambda manifest: manifest.update(layers=["0"]),
        lambda manifest: manifest.update(aliases=None),
        lambda manifest: manifest.update(aliases={"0.bias": "none"}),
        lambda manifest: manifest.update(aliases={"0.bias": ["4.bias"]}),
        lambda manifest: manifest["layers"]["0"]["config"].update(
            in_features=10**14, out_features=10**14
        ),
        lambda manifest: manifest["layers"]["0"]["config"].update(out_features=-1),
        lambda manifest: manifest["layers"]["0"].pop("kind"),
        lambda manifest: manifest["layers"]["0"]["config"].update(colour="red"),
        lambda manifest: manifest["report"]["layers"][0].pop("choice"),
        lambda manifest: manifest["report"].update(recipe={"linear": "int3"}),
    ],
)
def test_a_malformed_manifest_is_refused(saved, change):
    rewrite(saved, lambda manifest, tensors: change(manifest))
    refused(saved, "its manifest is malformed")


def test_an_unknown_kind_of_layer_is_named(saved):
    rewrite(saved, lambda manifest, tensors: manifest["layers"]["0"].update(kind="int3"))
    refused(saved, "its manifest is malformed .*'int3' is no kind of layer here; known are")


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "a.trine"
    path.write_text("hello, this is text and no checkpoint")
    refused(path, "it is incomplete or no safetensors file")
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    refused(path, "not saved by trine.save")
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"format": "pt"})
    refused(path, "not saved by trine.save")


def test_a_missing_file_and_a_folder_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        trine.load(tmp_path / "none.trine")
    with pytest.raises(OSError):  # noqa: PT011 (which one depends on the system)
        trine.load(tmp_path)


# ---- models that do not fit ----


def other(index: int, layer: nn.Module):
    def factory() -> nn.Module:
        model = mlp()
        model[index] = layer
        return model

    return factory


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            other(0, nn.Linear(12, 21)),
            "layer '0' has out_features = 21 in the model, 20 in the file",
        ),
        (
            other(0, nn.Linear(12, 20, bias=False)),
            "layer '0' has bias = False in the model, True in the file",
        ),
        (other(0, nn.Identity()), "the model has no linear layer '0', but the saved one has"),
        (
            other(2, nn.LayerNorm(21)),
            r"'2.weight' has shape \[21\] in the model, \[20\] in the file",
        ),
        (other(2, nn.Identity()), "'2.bias' is missing in the model"),
        (other(1, nn.PReLU()), "'1.weight' is missing in the file"),
        (
            lambda: mlp().bfloat16(),
            "'2.weight' has dtype bfloat16 in the model, float32 in the file",
        ),
        (lambda: mlp()[:4], "the model has no linear layer '4'"),
        (lambda: mlp().to("meta"), "like must return the model on the CPU"),
    ],
)
def test_a_factory_of_another_model_is_refused(saved, factory, message):
    if "meta" in message or "CPU" in message:
        with pytest.raises(ValueError, match=message):
            trine.load(saved, like=factory)
    else:
        refused(saved, message, factory)


def test_a_factory_that_ties_otherwise_is_refused(tmp_path):
    def untied() -> nn.Module:
        model = Tied()
        model.head.weight = nn.Parameter(model.head.weight.clone())
        return model

    for saved, loaded in ((Tied, untied), (untied, Tied)):
        trine.save(saved(), tmp_path / "a.trine")
        refused(tmp_path / "a.trine", "'head.weight' is tied to another tensor", loaded)


def test_a_factory_that_returns_no_module_is_refused(saved):
    with pytest.raises(ValueError, match="like returned dict; expected a"):
        trine.load(saved, like=lambda: {})
    with pytest.raises(ValueError, match="like must be a function"):
        trine.load(saved, like=mlp())


# ---- a hostile manifest runs nothing ----


@pytest.mark.parametrize(
    "model",
    [
        {"class": "Bilinear", "arguments": {"in1_features": 1}},
        {"class": "os.system", "arguments": {"command": "true"}},
        {"class": "Linear", "arguments": {"in_features": 12, "nothing": 3}},
        {"class": "Sequential"},
        {"class": "Linear", "arguments": {"in_features": -3, "out_features": 5}},
        {"class": "GroupNorm", "arguments": {"num_groups": 0, "num_channels": 5}},
        {"transformers": "BertModel", "config": {"hidden_size": "a"}, "attention": None},
        {"transformers": "PreTrainedConfig", "config": {}, "attention": None},
        {"transformers": "pipeline", "config": {}, "attention": None},
        {"transformers": "BertModel", "config": {}, "attention": "someone/kernel"},
        {"same_as": "x"},
        ["Linear"],
        3,
    ],
)
def test_a_description_that_save_would_not_write_is_refused(saved, model):
    rewrite(saved, lambda manifest, tensors: manifest.update(model=model))
    with pytest.raises(ValueError, match="cannot load"):
        trine.load(saved)


def test_a_description_takes_no_memory_beyond_what_the_file_holds(saved):
    layer = {"class": "Linear", "arguments": {"in_features": 10**6, "out_features": 10**7}}
    rewrite(saved, lambda manifest, tensors: manifest.update(model=layer))
    with pytest.raises(ValueError, match="the model has no linear layer '0'"):
        trine.load(saved)


@pytest.mark.parametrize("depth", [300, 100_000])
def test_endless_nesting_is_refused(saved, depth):
    def nest(manifest, tensors):
        manifest["model"] = "MODEL"

    rewrite(saved, nest)
    nested = '{"class": "Sequential", "children": {"0": ' * depth + "1" + "}}" * depth
    with safetensors.safe_open(saved, "pt") as file:
        text = file.metadata()["trine"]
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    body = text[: text.index(', "sha256"')].replace('"MODEL"', nested) + "}"
    digest = hashlib.sha256(body.encode()).hexdigest()
    text = f'{body[:-1]}, "sha256": "{digest}"}}'
    safetensors.torch.save_file(tensors, saved, {"trine": text})
    with pytest.raises(ValueError, match=r"(manifest is damaged|malformed).*Error"):
        trine.load(saved)


# ---- saving ----


@pytest.mark.parametrize("model", [3, {"weight": torch.ones(1)}])
def test_what_is_no_module_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"save takes a torch.nn.Module; got (int|dict)"):
        trine.save(model, tmp_path / "a.trine")


def test_a_failed_save_leaves_the_old_file_and_nothing_beside_it(saved, monkeypatch):
    before = saved.read_bytes()

    def fails(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        trine.save(compressed(mlp()), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_full_disk_is_an_os_error(saved, monkeypatch):
    def fails(tensors, path, metadata):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match=r"cannot write '.*model\.trine': No space left on device"):
        trine.save(mlp(), saved)
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")], ids=str
)
def test_tensors_that_are_not_plain_are_refused_by_name(tmp_path, tensor):
    model = mlp()
    model.register_buffer("odd", tensor)
    with pytest.raises(ValueError, match="'odd' is sparse, quantised by torch or on the meta"):
        trine.save(model, tmp_path / "a.trine")
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ValueError, match="'_extra_state', which is no parameter or buffer"):
        trine.save(Extra(2, 2), tmp_path / "a.trine")


def test_the_file_has_the_mode_of_any_new_file_and_links_stay(saved, tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
    link = tmp_path / "link.trine"
    link.symlink_to(saved)
    trine.save(mlp(), link)
    assert link.is_symlink()
    assert not hasattr(trine.load(saved), "report")  # it is the new one


def test_without_safetensors_it_is_said_what_to_install(saved, monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: trine.save(mlp(), saved), lambda: trine.load(saved)):
        with pytest.raises(ValueError, match=r"pip install 'trine\[checkpoint\]'"):
            call()


def test_killed_in_the_middle_of_saving_the_file_is_one_of_the_two_versions(tmp_path):
    run = [sys.executable, TESTS / "killed_while_saving.py", tmp_path / "a.trine", "50"]
    done = subprocess.run(run, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no kill met a save"
