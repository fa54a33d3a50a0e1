"""int8_weight_linear: every instruction set against the reference in float64."""

import pytest
import torch
from linear_inputs import (
    DTYPES,
    SHAPES,
    assert_same_bits,
    assert_within_sum_bound,
    difficult_rows,
    non_contiguous,
)
from memory_guard import at_end_of_memory
from torch._subclasses.fake_tensor import FakeTensorMode
from trine.ops import int8_weight_linear
from trine.ops.int8_weight_linear import reference

# (M, N, K, groups)
GROUPED = ((1, 5, 64, 1), (2, 17, 256, 4), (6, 40, 128, 1), (7, 33, 384, 3), (9, 9, 1024, 2))
GROUPED += ((1, 300, 2048, 16), (33, 50, 320, 5), (40, 17, 4096, 2), (130, 19, 1280, 20))


def assert_matches_reference(x, packed_weight, weight_scale, bias=None) -> None:
    actual = int8_weight_linear(x, packed_weight, weight_scale, bias)
    expected = reference.int8_weight_linear(x, packed_weight, weight_scale, bias)
    k, n = x.shape[-1], len(packed_weight)
    assert actual.dtype == x.dtype
    assert actual.shape == expected.shape
    m = x.shape[:-1].numel()
    wide = x.reshape(m, k).double().abs()
    dense = reference.dequantised(packed_weight, weight_scale, k)
    unscaled = wide @ packed_weight[:, :k].double().abs().T
    sums = actual.reshape(m, n), expected.reshape(m, n), wide @ dense.abs().T
    assert_within_sum_bound(*sums, k, unscaled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_reference(isa, dtype, m, n, k):
    assert_matches_reference(*reference.example_inputs(m, n, k, dtype))
    assert_matches_reference(*reference.example_inputs(m, n, k, dtype, bias=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "groups"), GROUPED)
def test_groups(isa, dtype, m, n, k, groups):
    assert_matches_reference(*reference.example_inputs(m, n, k, dtype, groups=groups))


def test_a_group_takes_its_own_scale(isa):
    """Powers of two, so that every result is exact: rows, groups and columns cannot be mixed up."""
    for m, n in ((1, 5), (40, 70)):
        x, packed_weight, _, _ = reference.example_inputs(m, n, 192)
        x = x.mul(8).round()
        scale = torch.randint(-6, 7, (n, 3)).double().exp2()
        by_group = torch.einsum(
            "mgk,ngk->mng", x.double().view(m, 3, 64), packed_weight.double().view(n, 3, 64)
        )
        expected = (by_group * scale).sum(2).float()
        assert_same_bits(int8_weight_linear(x, packed_weight, scale.float()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_rows(isa, dtype):
    for m in range(1, 35):
        assert_matches_reference(*reference.example_inputs(m, 19, 70, dtype, bias=m % 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 303, 9000), (5, 131, 4500), (70, 147, 1030), (97, 49, 257), (20, 530, 33)]
)
def test_several_panels_and_slices(isa, dtype, m, n, k):
    assert_matches_reference(*reference.example_inputs(m, n, k, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 16, 37, 130])
def test_difficult_rows(isa, dtype, k):
    _, *weight = reference.example_inputs(1, 19, k, dtype)
    rows = difficult_rows(k, dtype)
    for x in (rows, rows.repeat(5, 1), *rows.split(1)):
        assert_matches_reference(x, *weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("m", [3, 40])
def test_a_row_that_is_not_finite_spoils_no_other(isa, m, value):
    for dtype in DTYPES:
        x, *weight = reference.example_inputs(m, 21, 70, dtype)
        expected = int8_weight_linear(x, *weight)
        x[m // 2, 69] = value
        y = int8_weight_linear(x, *weight)
        assert not y[m // 2].isfinite().any()
        others = torch.arange(m) != m // 2
        assert_same_bits(y[others], expected[others])


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_are_lost_at_most(isa, dtype, m):
    """At worst each subnormal operand, product and sum counts as 0."""
    k, info = 130, torch.finfo(torch.float32)
    x, packed_weight, weight_scale, _ = reference.example_inputs(m, 9, k, dtype)
    dense = reference.dequantised(packed_weight, weight_scale, k)
    for scale in (info.tiny, info.tiny / 16):
        small = x * scale
        actual = int8_weight_linear(small, packed_weight, weight_scale).double()
        magnitude = small.double().abs() @ dense.abs().T
        bound = (4 * info.eps * k**0.5 + torch.finfo(dtype).eps) * magnitude
        lost = k * info.tiny * 128 + torch.finfo(dtype).tiny
        assert ((actual - small.double() @ dense.T).abs() <= bound + lost).all()


def test_layouts(isa):
    for dtype in (torch.float32, torch.bfloat16):
        x, *weight = reference.example_inputs(6, 9, 128, dtype, groups=2)
        expected = int8_weight_linear(x, *weight)
        for other in non_contiguous(x):
            assert_same_bits(int8_weight_linear(other, *weight), expected)
        many = int8_weight_linear(x.reshape(1, 2, 3, 128), *weight)
        assert_same_bits(many, expected.reshape(1, 2, 3, 9))
        assert_same_bits(int8_weight_linear(x[0], *weight), int8_weight_linear(x[:1], *weight)[0])
        assert int8_weight_linear(x.new_empty(2, 0, 128), *weight).shape == (2, 0, 9)
        packed_weight, scale, bias = weight
        strided = (
            packed_weight.T.contiguous().T,
            scale.T.contiguous().T,
            bias.repeat(2, 1).T[:, 0],
        )
        assert_same_bits(int8_weight_linear(x, *strided), expected)


@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_of_another_dtype(isa, bias_dtype):
    x, packed_weight, weight_scale, bias = reference.example_inputs(dtype=torch.bfloat16)
    assert_matches_reference(x, packed_weight, weight_scale, bias.to(bias_dtype))


@pytest.mark.parametrize("k", [1, 15, 16, 48, 65, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, 20])
def test_reads_nothing_beyond_its_inputs(isa, m, dtype, k):
    args = reference.example_inputs(m, 5, k, dtype)
    guarded = [at_end_of_memory(t) for t in args]
    assert_same_bits(int8_weight_linear(*guarded), int8_weight_linear(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1000, 640), (20, 300, 640), (200, 17, 1024)])
def test_number_of_threads_changes_nothing(isa, threads, dtype, m, n, k):
    for groups in (None, 2):
        args = reference.example_inputs(m, n, k, dtype, groups=groups)
        threads(1)
        alone = int8_weight_linear(*args)
        for count in (2, 3, 7):
            threads(count)
            assert_same_bits(int8_weight_linear(*args), alone)


# --- gradients ---------------------------------------------------------------------------------


def gradients(x, bias, grad_y, packed_weight, weight_scale, call=int8_weight_linear):
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    call(x, packed_weight, weight_scale, bias).backward(grad_y)
    return x.grad, bias.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (0,)])
def test_gradients(dtype, groups, rows):
    _, packed_weight, weight_scale, bias = reference.example_inputs(1, 5, 192, dtype, groups=groups)
    x, grad_y = torch.randn(*rows, 192).to(dtype), torch.randn(*rows, 5).to(dtype)
    dense = reference.dequantised(packed_weight, weight_scale, 192)
    wide_x, wide_bias = x.double().requires_grad_(), bias.double().requires_grad_()
    torch.nn.functional.linear(wide_x, dense, wide_bias).backward(grad_y.double())
    grad_x, grad_bias = gradients(x, bias, grad_y, packed_weight, weight_scale)
    # One rounding to dtype, and float32 sums of 5 (x) or 6 (bias) terms.
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(grad_x, wide_x.grad.to(dtype), **tolerance)
    torch.testing.assert_close(grad_bias, wide_bias.grad.to(dtype), **tolerance)


def test_no_gradient_path_where_none_is_wanted():
    x, *weight = reference.example_inputs()
    x.requires_grad_()
    assert int8_weight_linear(x, *weight).grad_fn is not None
    with torch.no_grad():
        assert int8_weight_linear(x, *weight).grad_fn is None


def test_gradient_to_the_packed_weight_is_refused():
    x, packed_weight, weight_scale, _ = reference.example_inputs()
    with pytest.raises(ValueError, match="no gradient to a packed weight or its scales"):
        int8_weight_linear(x, packed_weight, weight_scale.requires_grad_())


# --- the rest of PyTorch -----------------------------------------------------------------------


def test_autocast():
    x, *weight = reference.example_inputs()
    expected = int8_weight_linear(x.bfloat16(), *weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(int8_weight_linear(x, *weight), expected)


@pytest.mark.parametrize(
    "args",
    [
        *(reference.example_inputs(dtype=dtype) for dtype in DTYPES),
        reference.example_inputs(4, 5, 128, groups=2),
        reference.example_inputs(0, 5, 37, bias=False),
        reference.example_inputs(2, 0, 16),
    ],
)
def test_opcheck(args):
    torch.library.opcheck(torch.ops.trine.int8_weight_linear.default, args)


def test_compile():
    args = reference.example_inputs(3, 5, 128, groups=2)
    compiled = torch.compile(int8_weight_linear, fullgraph=True)
    assert_same_bits(compiled(*args), int8_weight_linear(*args))
    x, packed_weight, weight_scale, bias = args
    call = (x, bias, torch.randn(3, 5), packed_weight, weight_scale)
    for a, b in zip(gradients(*call, call=compiled), gradients(*call), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_through_the_fake():
    args = reference.example_inputs()
    with FakeTensorMode() as mode:
        x, packed_weight, weight_scale, bias = (mode.from_tensor(t) for t in args)
        x.requires_grad_()
        y = int8_weight_linear(x, packed_weight, weight_scale, bias.requires_grad_())
        y.sum().backward()
        assert (y.shape, x.grad.shape, bias.grad.shape) == ((3, 5), (3, 37), (5,))


# --- errors ------------------------------------------------------------------------------------


def changed(**changes) -> dict:
    names = ("x", "packed_weight", "weight_scale", "bias")
    return dict(zip(names, reference.example_inputs(), strict=True)) | changes


CUT = r"must cut K = 37 into groups of a multiple of 64 values"
ERRORS = {
    "wrong K": (changed(x=torch.randn(3, 60)), "K = 60 columns"),
    "integer x": (changed(x=torch.ones(3, 37, dtype=torch.int32)), "x must be float32, bfloat16"),
    "scalar x": (changed(x=torch.tensor(1.0)), "at least one dimension"),
    "no tensor": (changed(x="rows"), "x must be a tensor"),
    "float weight": (changed(packed_weight=torch.zeros(5, 48)), "packed_weight must be int8"),
    "flat weight": (changed(packed_weight=torch.zeros(48, dtype=torch.int8)), "packed_weight must"),
    "half scale": (changed(weight_scale=torch.ones(5).half()), "weight_scale must be float32"),
    "short scale": (changed(weight_scale=torch.ones(4)), r"weight_scale must be \[5\]"),
    "short groups": (changed(weight_scale=torch.ones(4, 2)), r"or \[5, groups\]"),
    "cube of scales": (changed(weight_scale=torch.ones(5, 1, 1)), r"or \[5, groups\]"),
    "a group of 37": (changed(weight_scale=torch.ones(5, 1)), CUT),
    "no groups": (changed(weight_scale=torch.ones(5, 0)), CUT),
    "short bias": (changed(bias=torch.ones(4)), r"bias must have shape \[5\]"),
    "integer bias": (changed(bias=torch.ones(5, dtype=torch.int32)), "bias must be float32"),
    "bias elsewhere": (changed(bias=torch.zeros(5, device="meta")), "on one device"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as error:
        int8_weight_linear(**arguments)
    assert str(error.value).startswith("int8_weight_linear: ")


@pytest.mark.parametrize(
    "case", ["wrong K", "float weight", "flat weight", "short scale", "a group of 37", "no groups"]
)
def test_the_fake_refuses_what_the_kernel_refuses(case):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        torch.ops.trine.int8_weight_linear(**{name: t.to("meta") for name, t in arguments.items()})
