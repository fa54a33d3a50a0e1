"""The packed linear layers: state, dtypes, loading, drop-in behaviour, on every instruction set."""

import copy
import io
import json
import pickle

import pytest
import torch
from linear_inputs import DTYPES, assert_same_bits, non_contiguous
from torch import Tensor, nn
from trine import nn as packed_nn

CHOICES = list(packed_nn._CHOICES)
SHAPES = ((1, 1), (5, 37), (17, 64), (16, 130))  # (N, K)


def dense(k: int = 37, n: int = 5, bias: bool = True, dtype: torch.dtype = torch.float32):
    return nn.Linear(k, n, bias).to(dtype)


def packed(choice: str, k: int = 37, n: int = 5, bias: bool = True, dtype=torch.float32):
    return packed_nn.pack_linear(dense(k, n, bias, dtype), choice)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
def test_is_the_linear_layer_of_its_weight(isa, choice, dtype, bias):
    for n, k in SHAPES:
        layer = packed(choice, k, n, bias, dtype)
        x = torch.randn(2, 3, k).to(dtype)
        y = layer(x)
        assert y.shape == (2, 3, n)
        assert y.dtype == dtype
        # fp32 weight, so that only the int8 rows and the rounding of y (2**-8 in bf16) differ.
        bias_values = None if layer.bias is None else layer.bias.float()
        expected = nn.functional.linear(x.float(), layer._dense_weight().float(), bias_values)
        assert relative_error(y, expected) < 0.02


def test_int8_weight_is_close_to_the_dense_one():
    linear = dense(130, 16)
    layer = packed_nn.Int8Linear.from_linear(linear)
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.weight - linear.weight).abs() <= 0.5001 * step).all()


def test_ternary_codes_and_scale():
    linear = dense(70, 6)
    layer = packed_nn.TernaryLinear.from_linear(linear)
    scale = linear.weight.detach().double().abs().mean()
    expected = (linear.weight.detach().double() / scale).round().clamp(-1, 1) * scale
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("granularity", "groups"), [("tensor", None), ("row", None), (64, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_ternary_granularities(isa, granularity, groups, bias):
    n, k = 6, 192
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    shape = {"tensor": (1,), "row": (n,)}.get(granularity, (n, groups))
    scale = torch.rand(shape) + 0.1
    bias_values = torch.randn(n) if bias else None
    layer = packed_nn.TernaryLinear.from_codes(codes, scale, bias_values)
    by_column = scale.repeat_interleave(k // groups, 1) if groups else scale[:, None]
    assert_same_bits(layer.weight, codes * by_column)
    x = torch.randn(4, k)
    assert relative_error(layer(x), nn.functional.linear(x, layer.weight, bias_values)) < 0.02

    again = packed_nn.TernaryLinear(**json.loads(json.dumps(layer.config())))
    assert again.weight_scale.shape == shape
    again.load_state_dict(layer.state_dict())
    assert_same_bits(again(x), layer(x))


@pytest.mark.parametrize(("granularity", "groups"), [("row", None), (64, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weight_granularities(isa, granularity, groups, dtype):
    n, k = 6, 192
    linear = dense(k, n, dtype=dtype)
    layer = packed_nn.Int8WeightLinear.from_linear(linear, group=None if groups is None else 64)
    assert layer.granularity == granularity
    assert layer.weight_scale.dtype == torch.float32
    by_group = linear.weight.detach().double().reshape(n, groups or 1, -1)
    step = by_group.abs().amax(2, keepdim=True) / 127
    rounded = ((by_group / step).round() * step).reshape(n, k)
    x = torch.randn(4, k).to(dtype)
    expected = nn.functional.linear(x.double(), rounded, linear.bias.double())
    assert relative_error(layer(x).double(), expected) < max(1e-6, torch.finfo(dtype).eps)

    again = packed_nn.Int8WeightLinear(**json.loads(json.dumps(layer.config())))
    again.load_state_dict(layer.state_dict())
    assert_same_bits(again(x), layer(x))


def test_int8_weight_errors():
    for granularity in ("tensor", 63, 100, 0, 128):
        with pytest.raises(ValueError, match="must be 'row' or a multiple of 64 that divides"):
            packed_nn.Int8WeightLinear(192, 4, granularity=granularity)
    with pytest.raises(ValueError, match="granularity is 128"):
        packed_nn.Int8WeightLinear.from_linear(nn.Linear(192, 4), group=128)
    codes = torch.zeros(6, 192, dtype=torch.int8)
    for shape in ((5,), (1,), (6, 5), (5, 3), ()):
        with pytest.raises(ValueError, match="weight_scale has shape"):
            packed_nn.Int8WeightLinear.from_codes(codes, torch.ones(shape))
    with pytest.raises(ValueError, match="bias has shape"):
        packed_nn.Int8WeightLinear.from_codes(codes, torch.ones(6), torch.zeros(5))


def test_ternary_errors():
    for granularity in ("column", 63, 100, 0, 128):
        with pytest.raises(ValueError, match="granularity is"):
            packed_nn.TernaryLinear(192, 4, granularity=granularity)
    codes = torch.zeros(6, 192, dtype=torch.int8)
    for shape in ((5,), (6, 5), (5, 3), ()):
        with pytest.raises(ValueError, match="weight_scale has shape"):
            packed_nn.TernaryLinear.from_codes(codes, torch.ones(shape))
    with pytest.raises(ValueError, match="granularity is 96"):
        packed_nn.TernaryLinear.from_codes(codes, torch.ones(6, 2))
    with pytest.raises(ValueError, match="bias has shape"):
        packed_nn.TernaryLinear.from_codes(codes, torch.ones(1), torch.zeros(5))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("bias", [True, False])
def test_ternary24_granularities(isa, granularity, bias):
    n, k = 6, 190
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8) * (torch.arange(k) % 4 < 2)
    scale = torch.rand(1 if granularity == "tensor" else n) + 0.1
    bias_values = torch.randn(n) if bias else None
    layer = packed_nn.Ternary24Linear.from_codes(codes, scale, bias_values)
    assert layer.granularity == granularity
    assert_same_bits(layer.weight, codes * scale[:, None])
    x = torch.randn(4, k)
    assert relative_error(layer(x), nn.functional.linear(x, layer.weight, bias_values)) < 0.02
    twin = packed_nn.TernaryLinear.from_codes(codes, scale, bias_values)
    assert_same_bits(layer(x), twin(x))
    assert layer.packed_weight.shape == (6, 48)  # 288 bits, whole 16 bytes


def test_ternary24_errors():
    with pytest.raises(ValueError, match="granularity is 64"):
        packed_nn.Ternary24Linear(192, 4, granularity=64)
    codes = torch.zeros(6, 192, dtype=torch.int8)
    for shape in ((5,), (6, 3), ()):
        with pytest.raises(ValueError, match="weight_scale has shape"):
            packed_nn.Ternary24Linear.from_codes(codes, torch.ones(shape))
    with pytest.raises(ValueError, match="bias has shape"):
        packed_nn.Ternary24Linear.from_codes(codes, torch.ones(1), torch.zeros(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse24_keeps_the_two_largest_of_each_four(dtype):
    weight = torch.tensor([[3.0, -4.0, 1.0, 2.0, 0.5, 0.5, -0.5], [-0.0, 0, 7, 0, 1, 2, 3]])
    linear = dense(7, 2, dtype=dtype)
    linear.weight.data.copy_(weight)
    expected = torch.tensor([[3.0, -4.0, 0, 0, 0.5, 0.5, 0], [0, 0, 7, 0, 0, 2, 3]])
    layer = packed_nn.Sparse24Linear.from_linear(linear)
    assert_same_bits(layer.weight.detach(), expected.to(dtype))
    assert layer.weight_scale is None
    assert "weight_scale" not in layer.state_dict()

    small = packed_nn.Sparse24Linear.from_linear(linear, values="int8")
    assert small.values.dtype == torch.int8
    step = expected.abs().amax(1, keepdim=True) / 127
    assert ((small._dense_weight() - expected).abs() <= 0.5001 * step).all()
    assert small.config()["values"] == "int8"
    with pytest.raises(ValueError, match="must be 'float' or 'int8'"):
        packed_nn.Sparse24Linear(7, 2, values="int4")


def test_zero_rows_give_exactly_the_bias():
    linear = dense(64, 4)
    with torch.no_grad():
        linear.weight[1] = 0
        linear.weight[2] = 1e-40  # below the smallest scale: counts as zero
    layer = packed_nn.Int8Linear.from_linear(linear)
    y = layer(torch.randn(3, 64))
    assert torch.equal(y[:, 1:3], linear.bias[1:3].expand(3, 2))


def test_static_input():
    linear, x = dense(), torch.rand(6, 37) * 2
    scale, zero_point = torch.tensor(2.0 / 255), torch.tensor(-128)
    layer = packed_nn.Int8Linear.from_linear(linear, input_scale=scale, input_zero_point=zero_point)
    assert relative_error(layer(x), linear(x)) < 0.02
    again = packed_nn.Int8Linear(**layer.config())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert again.input_zero_point.dtype == torch.int32
    symmetric = packed_nn.Int8Linear.from_linear(linear, input_scale=torch.tensor(2.0 / 127))
    assert relative_error(symmetric(x), linear(x)) < 0.02
    with pytest.raises(ValueError, match="needs input_scale"):
        packed_nn.Int8Linear.from_linear(linear, input_zero_point=zero_point)


@pytest.mark.parametrize("choice", CHOICES)
class TestState:
    def test_no_parameters(self, choice):
        layer = packed(choice)
        assert not list(layer.parameters())
        assert "bias" in layer.state_dict()
        assert "bias" not in packed(choice, bias=False).state_dict()

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_round_trip_through_config_and_state_dict(self, choice, dtype, bias):
        layer = packed(choice, bias=bias, dtype=dtype)
        kind = packed_nn.layer_kinds[layer.kind]
        again = kind(**json.loads(json.dumps(layer.config())))
        x = torch.randn(4, 37).to(dtype)
        assert again(x).isnan().all()  # empty
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), layer(x))
        assert again.weight.dtype == dtype
        assert again.config() == layer.config()

    def test_copies(self, choice):
        layer, x = packed(choice), torch.randn(4, 37)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for other in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
        ):
            assert torch.equal(other(x), layer(x))
            other.bias.zero_()
            assert not torch.equal(other(x), layer(x))

    def test_codes_and_scales_keep_their_dtype(self, choice):
        layer = packed(choice)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        for cast in (
            lambda m: m.half(),
            lambda m: m.bfloat16(),
            lambda m: m.to(torch.float16),
            lambda m: m.type(torch.bfloat16),
            lambda m: m.to("cpu", torch.float16),
        ):
            module = cast(nn.Sequential(copy.deepcopy(layer)))[0]
            dtype = module.weight.dtype
            assert dtype in (torch.float16, torch.bfloat16)
            for name, tensor in module.state_dict().items():
                if name in module.float_buffers:
                    assert tensor.dtype == dtype
                else:
                    assert_same_bits(tensor, before[name])
            assert module(torch.randn(2, 37).to(dtype)).dtype == dtype

    def test_dtype_follows_without_a_bias(self, choice):
        layer = packed(choice, bias=False).bfloat16()
        assert layer.weight.dtype == torch.bfloat16
        assert copy.deepcopy(layer).float().weight.dtype == torch.float32

    def test_default_dtype_is_taken(self, choice):
        layer = packed(choice)
        torch.set_default_dtype(torch.bfloat16)
        try:
            config = {k: v for k, v in layer.config().items() if k != "dtype"}
            again = packed_nn.layer_kinds[layer.kind](**config)
        finally:
            torch.set_default_dtype(torch.float32)
        assert again.weight.dtype == torch.bfloat16
        before = layer.state_dict()
        again.load_state_dict(before)
        for name, tensor in again.state_dict().items():
            if name not in again.float_buffers:
                assert_same_bits(tensor, before[name])

    def test_assigned_state_brings_its_dtype(self, choice):
        layer = packed(choice, dtype=torch.bfloat16)
        again = packed_nn.layer_kinds[layer.kind](37, 5, **layer._options(), device="meta")
        again.load_state_dict(layer.state_dict(), assign=True)
        assert again.weight.dtype == torch.bfloat16
        x = torch.randn(2, 37).bfloat16()
        assert torch.equal(again.to("cpu")(x), layer(x))

    def test_meta_construction_and_to_empty(self, choice):
        layer = packed(choice)
        with torch.device("meta"):
            again = packed_nn.layer_kinds[layer.kind](**layer.config())
        assert again.weight.device.type == "meta"
        again.to_empty(device="cpu").load_state_dict(layer.state_dict())
        x = torch.randn(2, 37)
        assert torch.equal(again(x), layer(x))

    def test_reading_the_dtype_of_the_weight_does_not_unpack_it(self, choice, monkeypatch):
        layer = packed(choice, dtype=torch.bfloat16)
        expected = layer.dense_weight()

        def unpacked(self):
            raise AssertionError("unpacked")

        with monkeypatch.context() as patch:
            patch.setattr(type(layer), "_dense_weight", unpacked)
            weight = layer.weight
            assert isinstance(weight, Tensor)
            assert weight.dtype == torch.bfloat16
            assert weight.device == torch.device("cpu")
            assert weight.shape == weight.size() == (5, 37)
            assert weight.dim() == weight.ndim == 2
            assert weight.numel() == 5 * 37
            assert weight.is_floating_point()
            assert not weight.requires_grad
            with pytest.raises(AssertionError, match="unpacked"):
                weight.float()
        assert type(weight.detach()) is Tensor
        assert weight.float().numpy().shape == (5, 37)
        assert weight.tolist() == expected.tolist()
        assert repr(weight) == repr(expected)
        assert_same_bits(copy.deepcopy(weight), expected)
        x = torch.randn(2, 37).bfloat16()
        assert_same_bits(nn.functional.linear(x, weight), nn.functional.linear(x, expected))
        with torch.autocast("cpu", torch.bfloat16):
            y = nn.functional.linear(x.float(), weight)
        assert_same_bits(y, nn.functional.linear(x, expected))

    def test_weight_is_read_only(self, choice):
        layer = packed(choice)
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = torch.zeros(5, 37)
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = nn.Parameter(torch.zeros(5, 37))

    def test_loading_errors(self, choice):
        layer = packed(choice)
        model = nn.Sequential(packed(choice))
        good = {f"0.{name}": tensor for name, tensor in layer.state_dict().items()}
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name in good:
            without = {key: tensor for key, tensor in good.items() if key != name}
            wrong_shape = {**good, name: good[name][1:]}
            wrong_dtype = {**good, name: good[name].to(torch.int16)}
            for bad, message in (
                (without, f"{name} is missing"),
                (wrong_shape, f"{name} has shape"),
                (wrong_dtype, f"{name} is torch.int16, expected"),
            ):
                with pytest.raises(RuntimeError, match=message):
                    model.load_state_dict(bad, strict=False)
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({})
        for name, tensor in model.state_dict().items():
            assert_same_bits(tensor, before[name])

    def test_a_scale_that_was_cast_is_refused(self, choice):
        layer = packed(choice)
        if layer.weight_scale is None:
            return
        state = {**layer.state_dict(), "weight_scale": layer.weight_scale.bfloat16()}
        with pytest.raises(RuntimeError, match="cast after packing"):
            layer.load_state_dict(state, assign=True)

    def test_repr_shows_the_configuration(self, choice):
        assert "in_features=37, out_features=5, bias=True" in repr(packed(choice))


@pytest.mark.parametrize("choice", CHOICES)
class TestFromLinear:
    def test_layout_of_the_weight_does_not_matter(self, choice):
        linear = dense(40, 8)
        expected = packed_nn.pack_linear(linear, choice).state_dict()
        for weight in non_contiguous(linear.weight.detach()):
            linear.weight = nn.Parameter(weight)
            for name, tensor in packed_nn.pack_linear(linear, choice).state_dict().items():
                assert_same_bits(tensor, expected[name])

    def test_conv1d(self, choice):
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 37)
        linear = dense()
        with torch.no_grad():
            linear.weight.copy_(conv1d.weight.T)
            linear.bias.copy_(conv1d.bias)
        x = torch.randn(3, 37)
        assert torch.equal(
            packed_nn.pack_linear(conv1d, choice)(x), packed_nn.pack_linear(linear, choice)(x)
        )

    def test_the_dense_layer_is_untouched_and_not_shared(self, choice):
        linear = dense()
        before = copy.deepcopy(linear.state_dict())
        layer, x = packed_nn.pack_linear(linear, choice), torch.randn(2, 37)
        y = layer(x)
        assert_same_bits(linear.weight.detach(), before["weight"])
        with torch.no_grad():
            linear.bias.zero_()
            linear.weight.zero_()
        assert torch.equal(layer(x), y)

    def test_errors(self, choice):
        with pytest.raises(ValueError, match=r"takes torch\.nn\.Linear"):
            packed_nn.pack_linear(nn.Conv2d(3, 4, 1), choice)
        with pytest.raises(ValueError, match=r"float64; convert the layer"):
            packed_nn.pack_linear(dense(dtype=torch.float64), choice)
        with pytest.raises(ValueError, match="meta device"):
            packed_nn.pack_linear(nn.Linear(4, 4, device="meta"), choice)
        for value in (torch.nan, torch.inf):
            linear = dense()
            linear.weight.data[2, 3] = value
            with pytest.raises(ValueError, match="NaN or infinity"):
                packed_nn.pack_linear(linear, choice)

    def test_empty_sides(self, choice):
        for k, n in ((0, 3), (8, 0)):
            linear = dense(k, n)
            y = packed_nn.pack_linear(linear, choice)(torch.randn(2, k))
            torch.testing.assert_close(y, linear(torch.randn(2, k)))


@pytest.mark.parametrize("choice", CHOICES)
class TestCalls:
    def test_wrong_number_of_features(self, choice):
        with pytest.raises(ValueError, match=r"shape \[2, 36\], expected \[\.\.\., 37\]"):
            packed(choice)(torch.randn(2, 36))

    def test_gradient_flows_to_the_input_alone(self, choice):
        layer = packed(choice)
        x = torch.randn(4, 37, requires_grad=True)
        grad_y = torch.randn(4, 5)
        layer(x).backward(grad_y)
        expected = grad_y.double() @ layer._dense_weight().double()
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-6)
        assert not layer(x.detach()).requires_grad

    def test_autocast(self, choice):
        layer, x = packed(choice), torch.randn(2, 37)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == nn.functional.linear(x, torch.randn(3, 37)).dtype
        with torch.inference_mode():
            assert layer(x).dtype == torch.float32


def test_unknown_choice():
    with pytest.raises(ValueError, match="'int4' is not one of int8"):
        packed_nn.pack_linear(dense(), "int4")


def test_unknown_dtype():
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        packed_nn.Int8Linear(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        packed_nn.Int8Linear(3, 4, dtype="float99")


def all_layers() -> nn.Sequential:
    return nn.Sequential(*(packed(choice, 24, 24) for choice in CHOICES))


class CastsToTheWeightsDtype(nn.Module):
    """As T5 does."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        if isinstance(weight, Tensor) and x.dtype != weight.dtype and weight.dtype != torch.int8:
            x = x.to(weight.dtype)
        return self.linear(x)


@pytest.mark.parametrize("choice", CHOICES)
def test_models_that_read_the_weights_dtype(choice):
    model, x = CastsToTheWeightsDtype(packed(choice, dtype=torch.bfloat16)), torch.randn(2, 37)
    expected = model.linear(x.bfloat16())
    assert_same_bits(model(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), expected)
    assert_same_bits(torch.export.export(model, (x,)).module()(x), expected)


def test_compile_and_export():
    model, x = all_layers().eval(), torch.randn(3, 24)
    expected = model(x)
    torch._dynamo.reset()  # each kind of layer compiles the same few functions anew
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), expected)
