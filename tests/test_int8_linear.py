"""int8_linear: every instruction set against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_inputs import DTYPES, SHAPES, assert_same_bits, difficult_rows, non_contiguous
from memory_guard import at_end_of_memory
from torch._subclasses.fake_tensor import FakeTensorMode
from trine.ops import int8_linear, pack_int8, unpack_int8
from trine.ops.int8_linear import reference

INPUT_SCALE = torch.tensor([0.03])


def zero_point(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32)


def assert_matches_reference(*args, **kwargs) -> None:
    assert_same_bits(int8_linear(*args, **kwargs), reference.int8_linear(*args, **kwargs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_reference(isa, dtype, m, n, k):
    assert_matches_reference(*reference.example_inputs(m, n, k, dtype))
    assert_matches_reference(*reference.example_inputs(m, n, k, dtype, bias=False))


# Every number of few rows; then vectors of 8 and 16 rows in tiles of 1 to 3, and rows left over.
@pytest.mark.parametrize("m", [*range(1, 18), 22, 23, 33, 48, 54, 55, 64, 97])
def test_every_tile_height(isa, m):
    assert_matches_reference(*reference.example_inputs(m, 7, 130))


BLOCKS_AND_SLICES = [(1, 303, 9000), (3, 303, 4500), (7, 33, 9000), (2, 600, 70), (13, 260, 1100)]
BLOCKS_AND_SLICES += [(50, 70, 4500), (20, 530, 100), (20, 9, 0)]


@pytest.mark.parametrize(("m", "n", "k"), BLOCKS_AND_SLICES)
def test_several_blocks_and_slices(isa, m, n, k):
    """k beyond one slice and none at all, n beyond one block of weight rows."""
    assert_matches_reference(*reference.example_inputs(m, n, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 16, 37, 130])
def test_difficult_rows(isa, dtype, k):
    _, *weight = reference.example_inputs(1, 19, k, dtype)
    assert_matches_reference(difficult_rows(k, dtype), *weight)
    for value in (0, -128, 127):
        scales = {"input_scale": INPUT_SCALE, "input_zero_point": zero_point(value)}
        assert_matches_reference(difficult_rows(k, dtype), *weight, **scales)


def test_layouts(isa):
    x, *weight = reference.example_inputs(6, 9, 50)
    expected = int8_linear(x, *weight)
    for other in non_contiguous(x):
        assert_same_bits(int8_linear(other, *weight), expected)
    assert_same_bits(int8_linear(x[0], *weight), expected[0])
    assert_same_bits(int8_linear(x.reshape(1, 2, 3, 50), *weight), expected.reshape(1, 2, 3, 9))
    assert int8_linear(x.new_empty(2, 0, 50), *weight).shape == (2, 0, 9)
    packed_weight, weight_scale, bias = weight
    strided = torch.stack([bias, bias], 1)[:, 0]
    transposed = packed_weight.T.contiguous().T
    assert_same_bits(int8_linear(x, transposed, weight_scale, strided), expected)


@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_of_another_dtype(isa, bias_dtype):
    x, packed_weight, weight_scale, bias = reference.example_inputs(dtype=torch.bfloat16)
    assert_matches_reference(x, packed_weight, weight_scale, bias.to(bias_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [None, 0, -128, -3, 127])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 5, 37), (7, 33, 64), (3, 300, 130), (19, 9, 130), (2, 3, 0)]
)
def test_static_input(isa, dtype, value, m, n, k):
    x, *weight = reference.example_inputs(m, n, k, dtype)
    point = None if value is None else zero_point(value)
    scales = {"input_scale": INPUT_SCALE, "input_zero_point": point}
    assert_matches_reference(x * 4, *weight, **scales)  # 0.03 * 127 is 3.8: some saturate


@pytest.mark.parametrize(("x_value", "w_value"), [(127, 127), (-127, 127), (127, -127), (-1, -127)])
@pytest.mark.parametrize(("m", "k"), [(2, 64), (2, 5008), (2, 131072), (16, 131072)])
def test_extreme_values_do_not_saturate(isa, x_value, w_value, m, k):
    packed_weight = torch.full((3, k), w_value, dtype=torch.int8)
    y = int8_linear(torch.full((m, k), float(x_value)), packed_weight, torch.ones(3))
    q, scale = (127 if x_value > 0 else -127), abs(x_value) / 127
    expected = torch.tensor(float(q * w_value * k)) * torch.tensor(scale)
    assert_same_bits(y, expected.expand(m, 3))


@pytest.mark.parametrize(("m", "k"), [(2, 64), (2, 65536), (16, 65536)])
def test_extreme_static_values_do_not_saturate(isa, m, k):
    packed_weight = torch.full((3, k), 127, dtype=torch.int8)
    x, ones = torch.full((m, k), -1e9), torch.ones(3)
    scales = {"input_scale": torch.tensor(1.0), "input_zero_point": zero_point(127)}
    y = int8_linear(x, packed_weight, ones, **scales)
    assert_same_bits(y, torch.full((m, 3), -255.0 * 127 * k))


@pytest.mark.parametrize("k", [1, 15, 16, 48, 65, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, 20])
def test_reads_nothing_beyond_its_inputs(isa, m, dtype, k):
    x, packed_weight, weight_scale, bias = reference.example_inputs(m, 5, k, dtype)
    guarded = [at_end_of_memory(t) for t in (x, packed_weight, weight_scale, bias)]
    assert_same_bits(int8_linear(*guarded), int8_linear(x, packed_weight, weight_scale, bias))


def test_number_of_threads_changes_nothing(isa, threads):
    for m, n, k in ((1, 700, 1000), (40, 130, 300), (300, 3, 500)):
        args = reference.example_inputs(m, n, k)
        scales = {"input_scale": INPUT_SCALE, "input_zero_point": zero_point(5)}
        threads(1)
        alone, alone_static = int8_linear(*args), int8_linear(*args, **scales)
        threads(3)
        assert_same_bits(int8_linear(*args), alone)
        assert_same_bits(int8_linear(*args, **scales), alone_static)


# --- gradients ---------------------------------------------------------------------------------


def gradients(x, bias, grad_y, packed_weight, weight_scale, call=int8_linear):
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    call(x, packed_weight, weight_scale, bias).backward(grad_y)
    return x.grad, bias.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37,), (3, 37), (2, 3, 37), (0, 37)])
def test_gradients_are_those_of_the_dequantised_product(dtype, shape):
    _, packed_weight, weight_scale, bias = reference.example_inputs(dtype=dtype)
    x, grad_y = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 5).to(dtype)
    dense = packed_weight[:, :37].double() * weight_scale.double()[:, None]
    wide_x, wide_bias = x.double().requires_grad_(), bias.double().requires_grad_()
    torch.nn.functional.linear(wide_x, dense, wide_bias).backward(grad_y.double())
    grad_x, grad_bias = gradients(x, bias, grad_y, packed_weight, weight_scale)
    # One rounding to dtype, and float32 sums of 5 (x) or 6 (bias) terms.
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(grad_x, wide_x.grad.to(dtype), **tolerance)
    torch.testing.assert_close(grad_bias, wide_bias.grad.to(dtype), **tolerance)


def test_gradient_to_bias_alone_and_to_x_alone():
    x, packed_weight, weight_scale, bias = reference.example_inputs()
    y = int8_linear(x, packed_weight, weight_scale, bias.requires_grad_())
    assert_same_bits(torch.autograd.grad(y.sum(), bias)[0], torch.full((5,), 3.0))
    x.requires_grad_()
    y = int8_linear(x, packed_weight, weight_scale)
    (grad_x,) = torch.autograd.grad(y.sum(), x)
    dense = packed_weight[:, :37] * weight_scale[:, None]
    torch.testing.assert_close(grad_x, dense.sum(0).expand(3, 37))


def test_weight_changed_before_backward_is_an_error():
    x, packed_weight, weight_scale, _ = reference.example_inputs()
    y = int8_linear(x.requires_grad_(), packed_weight, weight_scale)
    packed_weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradient_to_the_packed_weight_is_refused():
    x, packed_weight, weight_scale, _ = reference.example_inputs()
    with pytest.raises(ValueError, match="no gradient to a packed weight or its scales"):
        int8_linear(x.requires_grad_(), packed_weight, weight_scale.requires_grad_())


def test_no_gradient_path_where_none_is_wanted():
    x, packed_weight, weight_scale, bias = reference.example_inputs()
    expected = int8_linear(x, packed_weight, weight_scale, bias)
    x.requires_grad_()
    assert int8_linear(x, packed_weight, weight_scale, bias).grad_fn is not None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = int8_linear(x, packed_weight, weight_scale, bias)
        assert y.grad_fn is None
        assert_same_bits(y, expected)


# --- the rest of PyTorch -----------------------------------------------------------------------


def test_autocast():
    x, packed_weight, weight_scale, bias = reference.example_inputs()
    expected = int8_linear(x.bfloat16(), packed_weight, weight_scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(int8_linear(x, packed_weight, weight_scale, bias), expected)
        grad_y = torch.randn(3, 5).bfloat16()
        grad_x, _ = gradients(x, bias, grad_y, packed_weight, weight_scale)
    assert grad_x.dtype == torch.float32
    dense = packed_weight[:, :37] * weight_scale[:, None]
    torch.testing.assert_close(grad_x, (grad_y.float() @ dense).bfloat16().float())


@pytest.mark.parametrize(
    "args",
    [
        *(reference.example_inputs(dtype=dtype) for dtype in DTYPES),
        reference.example_inputs(0, 5, 37, bias=False),
        reference.example_inputs(2, 0, 16),
    ],
)
def test_opcheck(args):
    torch.library.opcheck(torch.ops.trine.int8_linear.default, args)


def test_opcheck_with_static_input():
    x, *weight = reference.example_inputs(4)
    args = (x.reshape(2, 2, 37), *weight)
    scales = {"input_scale": INPUT_SCALE, "input_zero_point": zero_point(2)}
    torch.library.opcheck(torch.ops.trine.int8_linear.default, args, scales)


def test_compile():
    args = reference.example_inputs()
    compiled = torch.compile(int8_linear, fullgraph=True)
    assert_same_bits(compiled(*args), int8_linear(*args))
    x, packed_weight, weight_scale, bias = args
    grad_y = torch.randn(3, 5)
    call = (x, bias, grad_y, packed_weight, weight_scale)
    for a, b in zip(gradients(*call, call=compiled), gradients(*call), strict=True):
        torch.testing.assert_close(a, b)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x, packed_weight, weight_scale, bias):
            return int8_linear(x, packed_weight, weight_scale, bias)

    args = reference.example_inputs()
    rows = torch.export.Dim("rows")
    shapes = {"x": {0: rows}, "packed_weight": None, "weight_scale": None, "bias": None}
    exported = torch.export.export(Layer(), args, dynamic_shapes=shapes).module()
    more_rows = (torch.randn(8, 37), *args[1:])
    assert_same_bits(exported(*more_rows), int8_linear(*more_rows))


def test_gradient_through_the_fake():
    args = reference.example_inputs()
    with FakeTensorMode() as mode:
        x, packed_weight, weight_scale, bias = (mode.from_tensor(t) for t in args)
        y = int8_linear(x.requires_grad_(), packed_weight, weight_scale, bias.requires_grad_())
        y.sum().backward()
        assert (y.shape, x.grad.shape, bias.grad.shape) == ((3, 5), (3, 37), (5,))


# --- errors ------------------------------------------------------------------------------------


def changed(**changes) -> dict:
    names = ("x", "packed_weight", "weight_scale", "bias")
    return dict(zip(names, reference.example_inputs(), strict=True)) | changes


ERRORS = {
    "wrong K": (changed(x=torch.randn(3, 60)), "K = 60 columns"),
    "integer x": (changed(x=torch.ones(3, 37, dtype=torch.int32)), "x must be float32, bfloat16"),
    "scalar x": (changed(x=torch.tensor(1.0)), "at least one dimension"),
    "float weight": (changed(packed_weight=torch.zeros(5, 48)), "packed_weight must be int8"),
    "flat weight": (changed(packed_weight=torch.zeros(48, dtype=torch.int8)), "packed_weight must"),
    "half scale": (changed(weight_scale=torch.ones(5).half()), "weight_scale must be float32"),
    "short scale": (changed(weight_scale=torch.ones(4)), r"weight_scale must be \[5\]"),
    "short bias": (changed(bias=torch.ones(4)), r"bias must have shape \[5\]"),
    "2-D bias": (changed(bias=torch.ones(1, 5)), r"bias must have shape \[5\]"),
    "integer bias": (changed(bias=torch.ones(5, dtype=torch.int32)), "bias must be float32"),
    "two input scales": (changed(input_scale=torch.ones(2)), "input_scale must hold one value"),
    "half input scale": (changed(input_scale=torch.ones(1).half()), "input_scale must be float32"),
    "zero input scale": (changed(input_scale=torch.zeros(1)), "positive and finite"),
    "NaN input scale": (changed(input_scale=torch.tensor(torch.nan)), "positive and finite"),
    "infinite scale": (changed(input_scale=torch.tensor(torch.inf)), "positive and finite"),
    "zero point alone": (changed(input_zero_point=zero_point(1)), "needs input_scale beside it"),
    "zero point 128": (
        changed(input_scale=torch.ones(1), input_zero_point=zero_point(128)),
        r"input_zero_point must lie in \[-128, 127\], it is 128",
    ),
    "long zero point": (
        changed(input_scale=torch.ones(1), input_zero_point=torch.tensor(1)),
        "input_zero_point must be int32",
    ),
    "two zero points": (
        changed(input_scale=torch.ones(1), input_zero_point=zero_point(1).repeat(2)),
        "input_zero_point must hold one value",
    ),
    "K too large": (
        changed(x=torch.zeros(1, 131073), packed_weight=torch.zeros(5, 131088, dtype=torch.int8)),
        "K = 131073 exceeds 131072",
    ),
    "K too large for static input": (
        changed(
            x=torch.zeros(1, 65537),
            packed_weight=torch.zeros(5, 65552, dtype=torch.int8),
            input_scale=torch.ones(1),
        ),
        "K = 65537 exceeds 65536",
    ),
    "weight elsewhere": (
        changed(packed_weight=torch.zeros(5, 48, dtype=torch.int8, device="meta")),
        "on one device",
    ),
    "bias elsewhere": (changed(bias=torch.zeros(5, device="meta")), "on one device"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as error:
        int8_linear(**arguments)
    assert str(error.value).startswith("int8_linear: ")


@pytest.mark.parametrize("case", ["wrong K", "float weight", "flat weight", "short scale"])
def test_the_fake_refuses_what_the_kernel_refuses(case):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        torch.ops.trine.int8_linear(**{name: t.to("meta") for name, t in arguments.items()})


# --- packing -----------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(0, 70), st.randoms(use_true_random=False))
def test_pack(n, k, random):
    rows = [[random.randint(-127, 127) for _ in range(k)] for _ in range(n)]
    weight = torch.tensor(rows, dtype=torch.int8).reshape(n, k)
    packed = pack_int8(weight)
    columns = (k + 15) // 16 * 16
    assert packed.shape == (n, columns)
    for row, packed_row in zip(rows, packed.tolist(), strict=True):
        assert packed_row == row + [0] * (columns - k)
    assert unpack_int8(packed, k).tolist() == rows


def test_pack_errors():
    with pytest.raises(ValueError, match="int8 matrix"):
        pack_int8(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="int8 matrix"):
        pack_int8(torch.zeros(2, dtype=torch.int8))
    with pytest.raises(ValueError, match="holds -128"):
        pack_int8(torch.tensor([[-128]], dtype=torch.int8))
