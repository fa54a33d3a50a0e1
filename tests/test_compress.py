"""Recipes, and what compress does to a model: which layers, why, and what stays as it was."""

import contextlib
import copy
import json
import math
import pickle
from collections import OrderedDict, UserDict
from unittest import mock

import pytest
import torch
import trine
from fake_timers import says
from torch import nn
from torch.nn.utils import parametrizations, prune
from trine import Recipe
from trine.compress.layers import obstacles


def test_one_choice_holds_for_every_layer():
    assert Recipe().choice("encoder.0.query") == "int8"
    assert Recipe(linear="ternary").choice("") == "ternary"


def test_the_first_matching_pattern_decides_and_no_match_is_float():
    recipe = Recipe(linear={"*.query": "float", "encoder.*": "sparse24", "Head": "ternary"})
    assert recipe.choice("encoder.0.query") == "float"
    assert recipe.choice("encoder.0.key") == "sparse24"
    assert recipe.choice("Head") == "ternary"
    assert recipe.choice("head") == "float"
    assert recipe.choice("my.encoder.0") == "float"


def test_a_recipe_keeps_its_own_copy_of_the_patterns():
    patterns = {"a": "int8"}
    recipe = Recipe(linear=patterns)
    patterns["a"] = "ternary"
    recipe.to_dict()["linear"]["a"] = "ternary"
    assert recipe.choice("a") == "int8"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe("sparse24-int8", "size"),
        Recipe({"z*": "float", "*": "int8", "a": "ternary"}),
    ],
)
def test_a_recipe_survives_json_with_the_order_of_its_patterns(recipe):
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert json.dumps(again.to_dict()) == json.dumps(recipe.to_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"linear": "int4"}, "linear is 'int4'; it must be one of"),
        ({"linear": {"a": "int8", "b": None}}, r"linear\['b'\] is None; it must be one of"),
        ({"linear": {"": "int8"}}, "'' is no pattern"),
        ({"linear": {3: "int8"}}, "3 is no pattern"),
        ({"linear": ["int8"]}, "or a mapping from patterns"),
        ({"prefer": "accuracy"}, "prefer is 'accuracy'; it must be one of"),
    ],
)
def test_a_wrong_recipe_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


def test_a_description_with_other_keys_is_refused():
    with pytest.raises(
        ValueError, match="expected a mapping with keys linear, conv, embedding and prefer"
    ):
        Recipe.from_dict({"linear": "int8", "bits": 4})


# ---- compress ----


def state_of(model: nn.Module) -> dict:
    """All that compress must leave as it is in the model that it is given."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": [id(t) for t in (*model.parameters(), *model.buffers(), *model.modules())],
        "attributes": [(type(m), sorted(vars(m)), m.training) for m in model.modules()],
        "hooks": [
            [list(getattr(m, name).values()) for name in vars(m) if name.endswith("_hooks")]
            for m in model.modules()
        ],
        "grads": [p.requires_grad for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def assert_same_state(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    torch.testing.assert_close(after["tensors"], before["tensors"], rtol=0, atol=0)
    assert torch.equal(before["random"], after["random"])
    for key in before.keys() - {"tensors", "random"}:
        assert before[key] == after[key], key


def mlp() -> nn.Module:
    layers = {"first": nn.Linear(12, 20), "relu": nn.ReLU(), "last": nn.Linear(20, 5, bias=False)}
    return nn.Sequential(OrderedDict(layers))


def test_faster_layers_are_swapped_and_the_output_is_close():
    model, x = mlp(), torch.randn(7, 12)
    small = trine.compress(model, Recipe(), x, timer=says(2))
    assert isinstance(small.first, trine.nn.Int8Linear)
    assert isinstance(small.last, trine.nn.Int8Linear)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=0.02)
    assert [(row.name, row.swapped, row.ratio) for row in small.report.layers] == [
        ("first", True, 2.0),
        ("last", True, 2.0),
    ]
    assert small.report.swapped == 2
    assert small.report.speedup == 2.0


def test_slower_layers_are_kept_and_the_model_is_bit_equal():
    model, x = mlp(), torch.randn(7, 12)
    small = trine.compress(model, Recipe(), x, timer=says(0.5))
    assert type(small.first) is nn.Linear
    assert torch.equal(small(x), model(x))
    assert [row.reason for row in small.report.layers] == [
        "measured 0.50 times as fast as float"
    ] * 2
    assert small.report.speedup == 1.0
    assert small.report.model_bytes_after == small.report.model_bytes_before == 4 * 360


def test_equally_fast_is_not_faster():
    assert trine.compress(mlp(), Recipe(), torch.randn(2, 12), timer=says(1)).report.swapped == 0


def test_prefer_size_swaps_what_is_smaller_and_still_reports_the_speed():
    recipe = Recipe(prefer="size")
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 1))  # int8 pads K = 8 to 16, adds a scale
    small = trine.compress(model.bfloat16(), recipe, torch.randn(2, 64).bfloat16(), timer=says(0.5))
    shrunk, grown = small.report.layers
    assert (shrunk.swapped, shrunk.ratio, shrunk.bytes_after) == (True, 0.5, 64 * 8 + 8 * 4 + 8 * 2)
    assert shrunk.reason == "smaller; measured 0.50 times as fast as float"
    assert (grown.swapped, grown.ratio, grown.bytes_after) == (False, 0.5, grown.bytes_before)
    assert grown.reason == "not smaller; measured 0.50 times as fast as float"


def test_the_total_over_the_observed_rows_decides():
    """Slower by 5 at one row, faster by 1 at eight: the number of calls decides."""
    model = nn.Linear(8, 8)

    def timer(calls):
        rows = []
        with mock.patch.object(nn.functional, "linear", lambda x, *_: rows.append(x.shape[0])):
            calls["float"]()
        return {"float": 10.0, "int8": 15.0 if rows == [1] else 9.0}

    def compressed(eights: int) -> nn.Module:
        samples = [torch.randn(1, 8)] + [torch.randn(2, 4, 8)] * eights
        return trine.compress(model, Recipe(), samples, timer=timer)

    assert compressed(6).report.swapped == 1
    kept = compressed(5)
    assert kept.report.swapped == 0
    timings = kept.report.layers[0].timings
    assert [(t.rows, t.calls, t.float_seconds, t.compressed_seconds) for t in timings] == [
        (1, 1, 10.0, 15.0),
        (8, 5, 10.0, 9.0),
    ]


def test_each_distinct_case_is_measured_once():
    cases = []

    def timer(calls):
        cases.append(set(calls))
        return {name: 1.0 for name in calls}

    same = [nn.Linear(8, 8) for _ in range(3)]
    other = [nn.Linear(8, 8, bias=False), nn.Linear(8, 8)]
    model = nn.Sequential(*same, *other)
    samples = [torch.randn(1, 8), torch.randn(2, 8), torch.randn(2, 8)]
    trine.compress(model, Recipe({"4": "float", "*": "int8"}), samples, timer=timer)
    # two row counts for the three equal layers together, two for the one without bias
    assert cases == [{"float", "int8"}] * 4


def test_the_measured_data_has_the_observed_shape_and_dtype():
    seen = []
    model = nn.Linear(6, 4).bfloat16()

    def timer(calls):
        seen.append(calls["int8"]())
        return {name: 1.0 for name in calls}

    trine.compress(model, Recipe(), torch.randn(2, 3, 6).bfloat16(), timer=timer)
    assert [(tuple(y.shape), y.dtype) for y in seen] == [((6, 4), torch.bfloat16)]


class Everything(nn.Module):
    """One of each kind of layer that must be left alone, and one that need not."""

    def __init__(self):
        super().__init__()

        class Scaled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        class Called(nn.Linear):
            def __call__(self, x):
                return 2 * super().__call__(x)

        self.plain = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.embedding = nn.Embedding(8, 8)
        self.tied.weight = self.embedding.weight
        self.viewed = nn.Linear(4, 8)
        self.viewed.weight = nn.Parameter(self.embedding.weight.detach()[:, :4])
        self.scaled = Scaled(8, 8)
        self.called = Called(8, 8)
        self.register_buffer("adjacency", torch.eye(8).to_sparse())
        self.stateful = nn.Linear(8, 8)
        self.stateful.register_buffer("gain", torch.tensor(0.5))
        self.patched = nn.Linear(8, 8)
        self.patched.forward = torch.relu
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", amount=0.5)
        self.attention = nn.MultiheadAttention(8, 2)
        self.never = nn.Linear(8, 8)
        self.empty = nn.Linear(8, 0)
        self.wide = nn.Linear(8, 8).double()
        self.asked = nn.Linear(8, 8)

    def forward(self, x):
        x = self.tied(self.plain(x)) + self.viewed(x[..., :4])
        x = self.stateful(self.called(x)) * self.stateful.gain
        x = self.asked(self.pruned(self.normed(self.patched(self.scaled(x)))))
        return self.attention(x, x, x)[0] + self.wide(x.double()).float()


def test_layers_that_must_be_left_alone_are_reported_with_the_reason():
    model, x = Everything(), torch.randn(3, 8)
    # A pruned weight is no leaf until the next forward pass, and only leaves can be copied.
    with torch.no_grad():
        expected = model(x)
    small = trine.compress(model, Recipe({"asked": "float", "*": "int8"}), x, timer=says(2))
    reasons = {row.name: row.reason for row in small.report.layers if not row.swapped}
    assert reasons == {
        "tied": "its weight or bias is shared with another module",
        "viewed": "its weight or bias is shared with another module",
        "scaled": "Scaled has a forward of its own",
        "called": "Called has a forward of its own",
        "stateful": "it holds more than weight and bias",
        "patched": "Linear has a forward of its own",
        "normed": "it has parametrizations",
        "pruned": "its weight is not a plain parameter",
        "attention.out_proj": (
            "nn.MultiheadAttention reads its weight; trine.prune.separate_attention helps"
        ),
        "never": "no sample reached it",
        "empty": "its weight is empty",
        "wide": "its weight is float64",
        "asked": "the recipe leaves it float",
    }
    assert [row.name for row in small.report.layers if row.swapped] == ["plain"]
    assert small.tied.weight is small.embedding.weight
    torch.testing.assert_close(small(x), expected, rtol=0, atol=0.05)


def test_a_sparse_weight_is_left_alone():
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.eye(8).to_sparse())
    assert obstacles(linear) == {"": "its weight is not a plain parameter"}


def test_a_layer_used_several_times_counts_all_its_calls_under_its_first_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(8, 8)

        def forward(self, x):
            return self.b(input=self.a(x)[0])

    model, x = Twice(), torch.randn(2, 8)
    small = trine.compress(model, Recipe(), x, timer=says(2))
    (row,) = small.report.layers
    assert (row.name, [(t.rows, t.calls) for t in row.timings]) == ("a", [(2, 1), (1, 1)])
    assert small.a is small.b
    assert isinstance(small.b, trine.nn.Int8Linear)


def test_a_model_that_is_itself_a_linear_layer():
    model, x = nn.Linear(8, 8), torch.randn(2, 8)
    small = trine.compress(model, Recipe(), x, timer=says(2))
    assert isinstance(small, trine.nn.Int8Linear)
    assert small.report.layers[0].name == ""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_users_model_stays_as_it_is(training, fails):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8)
            )
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            y = self.net(x + torch.rand_like(x))
            if fails:
                raise KeyError("broken")
            return y

    model = Noisy().train(training)
    model.net[1].eval()
    model.net[0].weight.requires_grad_(False)
    model.net[3].register_forward_hook(lambda *_: None)
    x = torch.randn(4, 8)
    before = state_of(model)
    raises = pytest.raises(KeyError, match="broken") if fails else contextlib.nullcontext()
    with raises:
        small = trine.compress(model, Recipe(), x, timer=says(2))
    assert_same_state(before, state_of(model))
    if not fails:
        assert not any(module.training for module in small.modules())
        assert small.calls == 0


def test_the_samples_are_run_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    x = torch.randn(1, 8)  # training mode refuses to normalise over one row
    assert trine.compress(model, Recipe(), x, timer=says(2)).report.swapped == 1


def test_an_error_of_the_timer_leaves_the_model_as_it_is():
    def broken(calls):
        raise OSError("no clock")

    model, x = mlp(), torch.randn(4, 12)
    before = state_of(model)
    with pytest.raises(OSError, match="no clock"):
        trine.compress(model, Recipe(), x, timer=broken)
    assert_same_state(before, state_of(model))


def test_hooks_of_a_swapped_layer_act_on_the_copy_and_see_only_the_users_data():
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []
            self.linear = nn.Linear(8, 8)
            self.linear.register_forward_hook(self.record)
            self.linear.register_forward_pre_hook(self.double, with_kwargs=True)

        def record(self, module, args, output):
            self.seen.append(type(module).__name__)

        def double(self, module, args, kwargs):
            return (2 * args[0],), kwargs

        def forward(self, x):
            return self.linear(x)

    model, x = Recorder(), torch.randn(2, 8)
    small = trine.compress(model, Recipe(), x, timer=says(2))
    assert model.seen == small.seen == []
    y = small(x)
    assert (model.seen, small.seen) == ([], ["Int8Linear"])
    assert torch.equal(y, small.linear.forward(2 * x))


@pytest.mark.parametrize("number", [1, 2])
def test_the_result_does_not_depend_on_threads(threads, number):
    x = torch.randn(9, 12)
    model = mlp()
    threads(1)
    expected = trine.compress(model, Recipe(), x, timer=says(2))(x)
    threads(number)
    assert torch.equal(trine.compress(model, Recipe(), x, timer=says(2))(x), expected)
    assert torch.get_num_threads() == number


def test_it_works_with_the_real_timer():
    small = trine.compress(mlp(), Recipe(), torch.randn(4, 12))
    for row in small.report.layers:
        assert row.swapped == (row.ratio > 1)


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_transformer_encoder_calls_its_packed_layers(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1:, 3:] = True
    samples = {"src": x, "src_key_padding_mask": padding}
    recipe = Recipe({"layers.1.*": "int8"})
    small = trine.compress(model, recipe, samples, timer=says(2))
    assert {row.name for row in small.report.layers if row.swapped} == {
        "layers.1.linear1",
        "layers.1.linear2",
    }
    note = "; torch's fused encoder path, which this closes, was not measured"
    assert all(row.reason.endswith(note) == row.swapped for row in small.report.layers)
    unread = property(lambda self: pytest.fail("the packed weight was unpacked"))
    with torch.inference_mode(), mock.patch.object(trine.nn.PackedLinear, "weight", unread):
        y = small(**samples)
        alone = small(x)
    with torch.no_grad():
        torch.testing.assert_close(y[~padding], model(**samples)[~padding], rtol=0, atol=0.1)
        torch.testing.assert_close(alone, model(x), rtol=0, atol=0.1)
    assert torch.backends.mha.get_fastpath_enabled()


def test_autocast_holds_for_run_and_measurement():
    dtypes = []

    def timer(calls):
        dtypes.extend(call().dtype for call in calls.values())
        return {"float": 2.0, "int8": 1.0}

    with torch.autocast("cpu", torch.bfloat16):
        small = trine.compress(nn.Linear(8, 8), Recipe(), torch.randn(2, 8), timer=timer)
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert small.report.swapped == 1


def test_autocast_inside_the_model_holds_for_the_measurement():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.linear(x)
            return self.linear(x) + y

    dtypes = []

    def timer(calls):
        dtypes.extend(call().dtype for call in calls.values())
        return {"float": 2.0, "int8": 1.0}

    small = trine.compress(Mixed(), Recipe(), torch.randn(2, 8), timer=timer)
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert [t.dtype for t in small.report.layers[0].timings] == ["bfloat16", "float32"]


# ---- sample inputs ----


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, y=0.0, *, z=0.0):
        return self.linear(x + y + z)


@pytest.mark.parametrize(
    ("samples", "rows"),
    [
        (torch.ones(2, 8), {2: 1}),
        ((torch.ones(2, 8), torch.ones(8)), {2: 1}),
        ({"x": torch.ones(3, 8), "z": torch.ones(8)}, {3: 1}),
        (UserDict(x=torch.ones(3, 8)), {3: 1}),
        ([torch.ones(2, 8), (torch.ones(2, 8),), {"x": torch.ones(8)}], {2: 2, 1: 1}),
        ([torch.ones(2, 8), torch.ones(0, 8)], {2: 1}),
    ],
)
def test_forms_of_sample_inputs(samples, rows):
    small = trine.compress(Sum(), Recipe(), samples, timer=says(2))
    assert {t.rows: t.calls for t in small.report.layers[0].timings} == rows


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "sample_inputs is an empty list"),
        ("text", "got str"),
        ([torch.ones(2, 8), 3], "got int"),
        (None, "got NoneType"),
    ],
)
def test_other_sample_inputs_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        trine.compress(Sum(), Recipe(), samples, timer=says(2))


# ---- what is refused ----


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="holds no linear layer"):
        trine.compress(nn.Sequential(nn.ReLU()), Recipe(), torch.ones(1), timer=says(2))


def test_a_model_with_an_attribute_report_is_refused():
    model, x = mlp(), torch.randn(2, 12)
    small = trine.compress(model, Recipe(), x, timer=says(2))
    with pytest.raises(ValueError, match="attribute 'report', which the model already has"):
        trine.compress(small, Recipe(), x, timer=says(2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name_unless_it_stays_float(value):
    model, x = mlp(), torch.randn(2, 12)
    with torch.no_grad():
        model.last.weight[2, 3] = value
    with pytest.raises(ValueError, match="weight of layer 'last' holds NaN or infinity"):
        trine.compress(model, Recipe(), x, timer=says(2))
    assert trine.compress(model, Recipe({"first": "int8"}), x, timer=says(2)).report.swapped == 1


def test_parameters_made_in_inference_mode_are_compressed():
    with torch.inference_mode():
        model = mlp()
    assert trine.compress(model, Recipe(), torch.randn(2, 12), timer=says(2)).report.swapped == 2


def test_a_model_in_training_under_quantisation_is_refused():
    qat = trine.quantize.prepare_qat(mlp(), Recipe())
    with pytest.raises(ValueError, match=r"trained under quantisation; trine.convert"):
        trine.compress(qat, Recipe(), torch.randn(2, 12), timer=says(2))


@pytest.mark.parametrize("choice", ["ternary", "sparse24", "sparse24-int8", "ternary24"])
def test_every_choice_is_packed_as_from_linear_does(choice):
    model, x = mlp(), torch.randn(7, 12)
    small = trine.compress(model, Recipe({"first": choice}), x, timer=says(2))
    expected = trine.nn.pack_linear(model.first, choice)
    assert torch.equal(small.first(x), expected(x))


def test_a_weight_on_the_meta_device_is_refused():
    with pytest.raises(ValueError, match="layer '' is on the meta device"):
        trine.compress(nn.Linear(2, 2, device="meta"), Recipe(), torch.randn(1, 2), timer=says(2))


def test_a_model_that_cannot_be_copied_is_refused():
    model = mlp()
    model.derived = model.first.weight * 2
    with pytest.raises(
        ValueError, match="trine works on a copy of the model, but it cannot be copied"
    ):
        trine.compress(model, Recipe(), torch.randn(2, 12), timer=says(2))


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        (lambda x: x, Recipe(), "takes a torch.nn.Module; got function"),
        (nn.Linear(2, 2), "int8", "takes a trine.Recipe; got str"),
        (torch.compile(nn.Linear(2, 2)), Recipe(), "compress the model first"),
    ],
)
def test_other_arguments_are_refused(model, recipe, message):
    with pytest.raises(ValueError, match=message):
        trine.compress(model, recipe, torch.randn(1, 2), timer=says(2))


# ---- the report ----


def test_the_report_survives_copies_and_json_and_stays_out_of_the_state():
    model, x = mlp(), torch.randn(2, 12)
    small = trine.compress(model, Recipe({"first": "int8"}), x, timer=says(3))
    assert copy.deepcopy(small).report == small.report
    assert pickle.loads(pickle.dumps(small)).report == small.report
    assert not any("report" in key for key in small.state_dict())
    data = json.loads(json.dumps(small.report.to_dict()))
    assert data["layers"][0]["ratio"] == pytest.approx(3)
    assert trine.compress.__module__ == "trine.compress.compress"
    assert type(small.report).from_dict(data) == small.report


def test_the_report_prints_as_a_table():
    small = trine.compress(mlp(), Recipe({"first": "int8"}), torch.randn(2, 12), timer=says(3))
    header, first, last, total = str(small.report).splitlines()
    assert header.split() == ["layer", "choice", "result", "speed", "KB", "reason"]
    assert first.split()[:4] == ["first", "int8", "swapped", "3.00x"]
    assert last.split()[:3] == ["last", "float", "kept"]
    assert last.endswith("the recipe leaves it float")
    assert total.startswith("1 of 2 layers swapped, model 0.00 -> 0.00 MB, layers 3.00x")
