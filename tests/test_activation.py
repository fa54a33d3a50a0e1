"""Activations of the linear ops, fused into their last step: on every instruction set."""

import json
import math

import pytest
import torch
import trine
from linear_inputs import DTYPES, assert_same_bits, difficult_rows
from torch.nn import functional as F
from trine.nn import Int8Linear, NormedTernaryLinear, TernaryLinear
from trine.ops import QuantizedRows, int8_linear, ternary_linear
from trine.ops.activation import CODES
from trine.ops.activation.reference import activated
from trine.ops.int8_linear import reference as int8
from trine.ops.ternary_linear import reference as ternary

ACTIVATIONS = [*CODES]
# Row counts of every way through the kernels, one column and many, no columns of the weight.
SHAPES = [(1, 17, 100), (3, 300, 64), (9, 33, 65), (40, 21, 130), (1, 1, 1), (2, 3, 0), (0, 4, 32)]


def through_the_op(values: torch.Tensor, activation: str, dtype=torch.float32) -> torch.Tensor:
    """The activation of `values`, which a product with zeros leaves as they are."""
    nothing = torch.zeros(len(values), 16, dtype=torch.int8)
    x, scale = torch.zeros(1, 16, dtype=dtype), torch.ones(len(values))
    return int8_linear(x, nothing, scale, values, activation=activation)[0]


def dense_grid() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(10000, generator=generator)
    small = normal * 2.0 ** torch.randint(-149, 0, (10000,), generator=generator)
    return torch.cat([torch.linspace(-14, 14, 20001), 2 * normal, small])


def exact(activation: str, x: torch.Tensor) -> torch.Tensor:
    """In float64, without cancellation."""
    if activation == "relu":
        return x.clamp(min=0)
    if activation == "gelu":
        return x / 2 * torch.special.erfc(-x / math.sqrt(2))
    return x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_against_float64(isa, activation):
    x = dense_grid()
    expected = exact(activation, x.double())
    error = (through_the_op(x, activation).double() - expected).abs()
    if activation == "relu":
        assert (error == 0).all()
    else:
        # Denormals are a multiple of 2^-149.
        allowed = 2.0**-19 * torch.maximum(expected.abs(), x.double().abs() / 2**8) + 2.0**-149
        assert (error <= allowed).all(), (error / allowed).max()
        assert (error[x.abs() < 8] <= 2.5e-7).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_that_need_care(isa, activation):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([inf, -inf, nan, 0.0, 3e38, -3e38, 1e-45, -1e-45, 1e-40, -20.0, -13.0, 20.0])
    y = through_the_op(x, activation)
    assert_same_bits(y, activated(x, activation))
    assert y[0] == inf
    assert y[2].isnan()
    assert y[3] == 0
    assert (y[[1, 5, 9]].abs() < 1e-23).all()
    assert_same_bits(y[[4, 11]], x[[4, 11]])
    assert activated(torch.tensor(-0.0), activation).signbit()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_applied_before_the_only_rounding(isa, activation):
    x = torch.linspace(-6, 6, 999)
    for dtype in DTYPES:
        y = through_the_op(x, activation, dtype)
        assert_same_bits(y, activated(x, activation).to(dtype))


def shapes_and_dtypes() -> list[tuple[int, int, int, torch.dtype]]:
    return [(*shape, DTYPES[i % 3]) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_matches_reference(isa, activation):
    static = {"input_scale": torch.tensor([0.03]), "input_zero_point": torch.tensor([5]).int()}
    for *shape, dtype in shapes_and_dtypes():
        args = int8.example_inputs(*shape, dtype)
        for given, options in ((args, {}), ((*args[:3], None), {}), (args, static)):
            y = int8_linear(*given, **options, activation=activation)
            assert_same_bits(y, int8.int8_linear(*given, **options, activation=activation))
        y = int8_linear(*args, activation=activation)
        rows = QuantizedRows.of(args[0])
        assert_same_bits(int8_linear(rows, *args[1:], activation=activation), y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("granularity", ["row", "tensor", "group"])
def test_ternary_matches_reference(isa, activation, granularity):
    for m, n, k, dtype in shapes_and_dtypes():
        k = 64 * max(1, k // 64) if granularity == "group" else k
        scales = {"row": None, "tensor": (1,), "group": (n, k // 64)}[granularity]
        args = ternary.example_inputs(m, n, k, dtype, scale_shape=scales)
        for given in (args, (*args[:3], None)):
            y = ternary_linear(*given, activation=activation)
            assert_same_bits(y, ternary.ternary_linear(*given, activation=activation))
        rows = QuantizedRows.of(given[0])
        assert_same_bits(ternary_linear(rows, *given[1:], activation=activation), y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_difficult_rows(isa, activation):
    _, *weight = int8.example_inputs(1, 19, 37)
    x = difficult_rows(37, torch.float32)
    y = int8_linear(x, *weight, activation=activation)
    assert_same_bits(y, int8.int8_linear(x, *weight, activation=activation))


def test_number_of_threads_changes_nothing(isa, threads):
    for m, n, k in ((1, 700, 1000), (40, 130, 300)):
        args = int8.example_inputs(m, n, k)
        threads(1)
        alone = int8_linear(*args, activation="gelu")
        threads(3)
        assert_same_bits(int8_linear(*args, activation="gelu"), alone)


# --- the rest of PyTorch -----------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", ["int8", "ternary"])
def test_gradients_are_those_of_the_composition(op, activation):
    call, module = {"int8": (int8_linear, int8), "ternary": (ternary_linear, ternary)}[op]
    x, packed_weight, weight_scale, bias = module.example_inputs(4, 6, 64)
    codes = packed_weight.double() if op == "int8" else ternary.decode(packed_weight, 64)
    dense = codes * weight_scale.double()[:, None]
    grad_y = torch.randn(4, 6)
    # The derivative is taken where the quantised product lies, of the formula.
    before = call(x, packed_weight, weight_scale, bias).double().requires_grad_()
    exact(activation, before).backward(grad_y.double())
    x.requires_grad_(), bias.requires_grad_()
    y = call(x, packed_weight, weight_scale, bias, activation=activation)
    y.backward(grad_y)
    with torch.no_grad():
        assert_same_bits(y, call(x, packed_weight, weight_scale, bias, activation=activation))
    torch.testing.assert_close(x.grad, (before.grad @ dense).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias.grad, before.grad.sum(0).float(), rtol=1e-4, atol=1e-5)


def test_opcheck():
    for name, module in (("int8_linear", int8), ("ternary_linear", ternary)):
        args = module.example_inputs()
        torch.library.opcheck(getattr(torch.ops.trine, name).default, (*args, 2))
        rows = QuantizedRows.of(args[0])
        on_rows = getattr(torch.ops.trine, f"{name}_rows").default
        quantised = (rows.q, rows.scale, rows.sum)
        torch.library.opcheck(on_rows, (*quantised, *args[1:], torch.bfloat16, 3))


def test_compile_and_autocast():
    args = int8.example_inputs()

    def call(*given):
        return int8_linear(*given, activation="gelu") + 1

    assert_same_bits(torch.compile(call, fullgraph=True)(*args), call(*args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = int8_linear(*args, activation="gelu_tanh")
    expected = int8_linear(args[0].bfloat16(), *args[1:], activation="gelu_tanh")
    assert_same_bits(y, expected)


def test_errors():
    for call, module, name in (
        (int8_linear, int8, "int8_linear"),
        (ternary_linear, ternary, "ternary_linear"),
    ):
        args = module.example_inputs()
        with pytest.raises(ValueError, match=f"{name}: activation is 'tanh'; it must be None, 're"):
            call(*args, activation="tanh")
        for given in (args, [a.to("meta") for a in args]):
            with pytest.raises(ValueError, match=f"{name}: activation must be 0 .*, it is 4"):
                getattr(torch.ops.trine, name)(*given, 4)


# --- layers ------------------------------------------------------------------------------------


def layers(activation: str | None) -> list[torch.nn.Module]:
    linear = torch.nn.Linear(64, 24)
    made = [Int8Linear.from_linear(linear), TernaryLinear.from_linear(linear)]
    made.append(NormedTernaryLinear.from_ternary(made[1], torch.rand(64), 1e-6))
    for layer in made:
        layer.activation = activation
    return made


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layers_apply_and_keep_it(activation, tmp_path):
    x = torch.randn(5, 64)
    torch_activation = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    }[activation]
    for layer in layers(activation):
        with torch.no_grad():
            y = layer(x)
            layer.activation = None
            torch.testing.assert_close(y, torch_activation(layer(x)), rtol=1e-5, atol=1e-6)
            assert "activation" not in layer.config()
            assert "activation" not in repr(layer)
            layer.activation = activation
        assert f"activation={activation}" in repr(layer)
        again = type(layer)(**json.loads(json.dumps(layer.config())))
        again.load_state_dict(layer.state_dict())
        assert_same_bits(again(x), y)
        path = tmp_path / "layer.trine"
        trine.save(torch.nn.Sequential(layer), path)
        loaded = trine.load(path)
        assert loaded[0].activation == activation
        assert_same_bits(loaded(x), y)


def test_layers_refuse_an_unknown_one():
    for kind in (Int8Linear, TernaryLinear, NormedTernaryLinear):
        with pytest.raises(ValueError, match=f"{kind.__name__}: activation is 'silu'"):
            kind(64, 8, activation="silu")
