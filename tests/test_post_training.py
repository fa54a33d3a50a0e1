"""Quantising without training: each step against its formula in float64, written out here."""

import copy

import numpy as np
import pytest
import torch
import trine
from linear_inputs import assert_same_bits
from torch import nn
from trine import Recipe
from trine.nn import Int8Conv2d, Int8Linear, PackedLinear, TernaryLinear
from trine.quantize import gptq, int8_absmax, observers, post_training, smooth, ternary_absmean
from trine.quantize.rounding import nearest


def correlated(rows: int, k: int) -> torch.Tensor:
    """Rows whose columns go together, as activations do."""
    return torch.randn(rows, max(1, k // 3)) @ torch.randn(max(1, k // 3), k) + 0.1 * torch.randn(
        rows, k
    )


def obq(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, largest: int) -> np.ndarray:
    """Codes by Optimal Brain Quantisation in a fixed order, a fresh inverse for every column."""
    n, k = weight.shape
    order = np.argsort(-np.diag(gram), kind="stable")
    w, h = weight[:, order].copy(), gram[np.ix_(order, order)].copy()
    h += 0.01 * np.mean(np.diag(h)) * np.eye(k)
    codes = np.zeros((n, k))
    for j in range(k):
        inverse = np.linalg.inv(h[j:, j:])
        codes[:, j] = np.clip(np.round(w[:, j] / scale), -largest, largest)
        error = (w[:, j] - codes[:, j] * scale) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    found = np.zeros((n, k))
    found[:, order] = codes
    return found


class TestGptq:
    @pytest.mark.parametrize(("choice", "largest"), [("int8", 127), ("ternary", 1)])
    def test_against_inverses_taken_anew(self, choice, largest):
        weight, x = torch.randn(7, 24), correlated(200, 24).double()
        gram = x.T @ x
        codes, scale = gptq(choice, weight, gram)
        expected = obq(
            weight.double().numpy(), gram.numpy(), scale.double().expand(7).numpy(), largest
        )
        assert (codes.double().numpy() == expected).mean() > 0.99  # a tie may fall either way
        error, plain = (
            ((c * s.reshape(-1, 1) - weight).double() @ x.T).norm()
            for c, s in ((codes, scale), nearest(choice, weight))
        )
        assert error < 0.8 * plain

    def test_uncorrelated_columns_are_rounded_to_the_nearest(self):
        weight = torch.randn(5, 16)
        codes, scale = gptq("int8", weight, torch.diag(torch.rand(16) + 0.5))
        assert torch.equal(codes, int8_absmax(weight)[0])
        assert_same_bits(scale, int8_absmax(weight)[1])

    def test_rows_of_zeros(self):
        weight = torch.randn(3, 8)
        weight[1] = 0
        codes, _ = gptq("int8", weight, torch.eye(8))
        assert (codes[1] == 0).all()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16, bias=False), nn.Linear(16, 4)
    )


class TestPostTraining:
    def test_dynamic_int8_is_what_packing_gives(self):
        model, x = network(), correlated(64, 24)
        small = post_training(model, Recipe("int8"), x)
        for layer, packed in ((model[i], small[i]) for i in (0, 2, 3)):
            inputs = torch.randn(5, layer.in_features)
            assert_same_bits(packed(inputs), Int8Linear.from_linear(layer)(inputs))
        assert type(model[0]) is nn.Linear

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_static_activations_have_the_range_observed(self, symmetric):
        model, x = network(), correlated(64, 24)
        small = post_training(model, Recipe("int8-static"), [x[:32], x[32:]], symmetric=symmetric)
        inputs = model[1](model[0](x)).detach()
        scale, zero_point = observers.grid(inputs.min(), inputs.max(), symmetric=symmetric)
        assert_same_bits(small[2].input_scale, scale)
        assert torch.equal(small[2].input_zero_point, zero_point)
        expected = trine.ops.int8_linear(
            inputs,
            small[2].packed_weight,
            small[2].weight_scale,
            input_scale=scale,
            input_zero_point=zero_point,
        )
        assert_same_bits(small[2](inputs), expected)
        assert (small(x) - model(x)).norm() < 0.05 * model(x).norm()

    def test_an_observer_that_leaves_outliers_out(self):
        model, x = network(), correlated(200, 24)
        x[0, 0] = 1e4
        loose, tight = (
            post_training(model, Recipe({"0": "int8-static"}), x, observer=observer)
            for observer in (observers.MinMax, lambda: observers.Percentile(0.999))
        )
        errors = [(m(x[1:]) - model(x[1:])).norm() for m in (loose, tight)]
        assert errors[1] < 0.1 * errors[0]

    def test_gptq_sees_what_the_layers_before_give(self):
        model, x = network(), correlated(400, 24)
        small = post_training(model, Recipe("ternary"), x, rounding="gptq")
        # The second layer's input is that of the first one after rounding.
        codes, scale = gptq("ternary", model[0].weight.detach(), x.T @ x)
        first = x @ (codes * scale).T + model[0].bias.detach()
        inputs = first.relu()
        expected, _ = gptq("ternary", model[2].weight.detach(), inputs.T @ inputs)
        found = trine.ops.unpack_ternary(small[2].packed_weight, 32)
        assert (found == expected).float().mean() > 0.99
        plain = post_training(model, Recipe("ternary"), x)
        errors = [(m(x) - model(x)).norm() for m in (small, plain)]
        assert errors[0] < errors[1]

    def test_bias_correction(self):
        model, x = network(), correlated(400, 24) + 1.0
        small = post_training(model, Recipe("ternary"), x, correct_bias=True)
        codes, scale = ternary_absmean(model[0].weight)
        lost = (model[0].weight.double() - codes.double() * scale.double()) @ x.double().mean(0)
        torch.testing.assert_close(
            small[0].bias, (model[0].bias.double() + lost).float().detach(), rtol=1e-5, atol=1e-6
        )
        assert small[2].bias is not None
        # Then the mean output is that of the float layer; only activations still round.
        mean = [m(x).mean(0) for m in (small[:1], model[:1])]
        torch.testing.assert_close(*mean, rtol=1e-2, atol=1e-2)

    def test_saved_and_loaded(self, tmp_path):
        model, x = network(), correlated(64, 24)
        small = post_training(
            model, Recipe({"3": "float", "*": "int8-static"}), x, rounding="gptq", correct_bias=True
        )
        trine.save(small, tmp_path / "small.safetensors")
        assert_same_bits(trine.load(tmp_path / "small.safetensors")(x), small(x).detach())

    def test_conv1d_of_transformers(self):
        from transformers.pytorch_utils import Conv1D

        model, x = nn.Sequential(Conv1D(8, 24), nn.Linear(8, 3)), correlated(100, 24)
        small = post_training(model, Recipe("int8"), x, rounding="gptq", correct_bias=True)
        assert all(isinstance(layer, PackedLinear) for layer in small)
        assert (small(x) - model(x)).norm() < 0.03 * model(x).norm()

    @pytest.mark.parametrize("rounding", ["nearest", "gptq"])
    def test_convolutions(self, rounding):
        model = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, bias=False)),
            *(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 4, 5)),
        )
        x = correlated(96, 3 * 36).reshape(96, 3, 6, 6)
        recipe = Recipe("int8", conv={"0": "int8", "*": "int8-static"})
        small = post_training(model, recipe, x, rounding=rounding, correct_bias=True)
        assert [type(m).__name__ for m in small] == [
            *("Int8Conv2d", "ReLU", "Int8Conv2d", "Int8Conv2d", "Flatten", "Int8Linear")
        ]
        assert (small(x) - model(x)).norm() < 0.05 * model(x).norm()
        # Of the first layer, whose input is x itself: the mean output is kept.
        float_mean, mean = (m[0](x).mean((0, 2, 3)) for m in (model, small))
        torch.testing.assert_close(mean, float_mean, rtol=2e-2, atol=2e-2)
        if rounding == "gptq":
            columns = nn.functional.unfold(x, 3, padding=1).mT.flatten(0, 1)
            weight = model[0].weight.detach().flatten(1)
            codes, scale = gptq("int8", weight, columns.T @ columns)
            expected = (codes * scale[:, None]).reshape(8, 3, 3, 3)
            torch.testing.assert_close(small[0].weight, expected)
            errors = [
                ((w.flatten(1) - weight) @ columns.T).norm()
                for w in (expected, Int8Conv2d.from_conv(model[0]).weight)
            ]
            assert errors[0] < errors[1]

    def test_progress_and_random_state(self):
        seen: list[int] = []
        state = torch.get_rng_state()
        data = iter([torch.randn(8, 24), torch.randn(8, 24)])
        before = torch.get_rng_state()
        post_training(network(), Recipe("int8"), data, rounding="gptq", progress=seen.append)
        assert seen == [1, 2, 3]
        assert not torch.equal(state, before)

    def test_errors(self):
        model, x = network(), torch.randn(8, 24)
        before = copy.deepcopy(model.state_dict())
        for match, how in (
            ("rounding is 'up'", {"rounding": "up"}),
            ("layer '0' is to be 'sparse24'", {"recipe": Recipe("sparse24")}),
            ("leave no linear layer, conv", {"recipe": Recipe("float")}),
            ("takes a trine.Recipe; got str", {"recipe": "int8"}),
            ("there is no data", {"data": []}),
            ("NaN or infinity", {"data": x * torch.nan}),
        ):
            with pytest.raises(ValueError, match=match):
                post_training(model, **{"recipe": Recipe("int8"), "data": x, **how})
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        model[2].weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"layer '2' holds NaN"):
            post_training(model, Recipe("int8"), x)


class Block(nn.Module):
    """Pre-norm: every linear layer but the last reads a norm that nothing else reads."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.up, self.gate = nn.Linear(width, 24), nn.Linear(width, 24)
        self.down = nn.Linear(24, width)

    def forward(self, x):
        h = self.norm(x)
        mixed = (self.query(h) @ h.mT / 4).softmax(-1) @ self.value(h)
        x = x + self.output(mixed)
        h = self.other(x)
        return x + self.down(self.up(h) * self.gate(h).tanh())


class TestSmooth:
    def test_the_function_stays_and_the_formula_holds(self):
        model, x = Block(), torch.randn(4, 9, 16)
        with torch.no_grad():
            model.norm.weight[3] = 40.0  # the outlier
        changed = smooth(model, x, alpha=0.6)
        torch.testing.assert_close(changed(x), model(x), rtol=1e-4, atol=1e-4)
        makers = {"output": "value", "up": "other", "gate": "other", "down": "up"}
        assert changed.smoothed == makers
        # (query reads the norm, too, but so does the product with h: it must stay.)
        inputs = model.other(x + model.output(_mixed(model, x))).detach().double()
        largest = torch.cat((model.up.weight, model.gate.weight)).detach().double().abs().amax(0)
        scale = inputs.abs().amax((0, 1)) ** 0.6 / largest**0.4
        expected = model.gate.weight.detach().double() * scale
        torch.testing.assert_close(
            changed.gate.weight.detach().double(), expected, rtol=1e-4, atol=1e-6
        )

    def test_outliers_cost_less_afterwards(self):
        model, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8)), torch.randn(200, 32)
        with torch.no_grad():
            model[0].weight[5] = 300.0
            model[1].weight[:, 5] /= 100
        expected = model(x)
        errors = [
            (post_training(m, Recipe("int8-static"), x)(x) - expected).norm()
            for m in (model, smooth(model, x))
        ]
        assert errors[1] < 0.3 * errors[0]

    @pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
    def test_models_of_transformers(self, name):
        transformers = pytest.importorskip("transformers")
        sizes = {
            "vocab_size": 60,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_size": 16,
        }
        torch.manual_seed(0)
        if name == "bert":
            config = transformers.BertConfig(**sizes, intermediate_size=32)
            model = transformers.BertModel(config, add_pooling_layer=False)
        elif name == "llama":
            config = transformers.LlamaConfig(**sizes, intermediate_size=32, num_key_value_heads=2)
            model = transformers.LlamaModel(config)
        else:
            config = transformers.GPT2Config(vocab_size=60, n_layer=2, n_head=2, n_embd=16)
            model = transformers.GPT2Model(config)
        model.eval()
        ids = torch.randint(60, (2, 7))
        changed = smooth(model, ids)
        torch.testing.assert_close(changed(ids)[0], model(ids)[0], rtol=1e-3, atol=1e-4)
        readers = set(changed.smoothed)
        if name == "bert":
            assert "encoder.layer.0.attention.output.dense" in readers
        elif name == "llama":
            for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
                assert f"layers.1.{part}" in readers
        else:
            assert {"h.0.attn.c_attn", "h.1.mlp.c_fc"} <= readers

    def test_errors(self):
        with pytest.raises(ValueError, match="alpha is 2"):
            smooth(Block(), torch.randn(2, 3, 16), alpha=2)
        with pytest.raises(ValueError, match="no linear layer has an input"):
            smooth(nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), torch.randn(3, 4))


def _mixed(model: Block, x: torch.Tensor) -> torch.Tensor:
    h = model.norm(x)
    return (model.query(h) @ h.mT / 4).softmax(-1) @ model.value(h)


def test_ternary_layers_are_packed():
    small = post_training(network(), Recipe("ternary-twn"), torch.randn(8, 24))
    assert all(isinstance(small[i], TernaryLinear) for i in (0, 2, 3))
