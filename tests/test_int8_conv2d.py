"""INT8 convolution: every kernel gives the reference's bits; the layer, and what is saved of it."""

import copy
import itertools

import pytest
import torch
import trine
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import DTYPES, assert_same_bits
from torch import nn
from trine.nn import Int8Conv2d
from trine.ops import int8_conv2d, pack_conv2d, unpack_conv2d
from trine.ops.int8_conv2d import reference

# (B, C, N, kernel, groups, stride, padding, dilation, H, W)
SHAPES = [
    (2, 3, 16, (3, 3), 1, (1, 1), (1, 1), (1, 1), 9, 7),
    (1, 20, 70, (3, 3), 1, (2, 2), (1, 1), (1, 1), 12, 13),
    (1, 37, 37, (5, 5), 37, (2, 2), (2, 2), (1, 1), 11, 10),  # depthwise
    (2, 12, 24, (3, 3), 3, (1, 1), (1, 1), (2, 2), 9, 9),
    (1, 5, 33, (1, 1), 1, (1, 1), (0, 0), (1, 1), 4, 4),
    (1, 16, 48, (1, 3), 1, (1, 2), (0, 1), (1, 1), 5, 150),
    (1, 6, 12, (2, 3), 6, (2, 1), (1, 3), (3, 1), 8, 8),  # two outputs for each channel
    (1, 1, 1, (3, 3), 1, (1, 1), (0, 0), (1, 1), 3, 3),
    (2, 1, 16, (3, 3), 1, (2, 2), (1, 1), (1, 1), 6, 6),  # one channel lies in both layouts
]


def inputs(shape, dtype=torch.float32, bias=True, static=False, channels_last=False):
    b, c, n, kernel, groups, stride, padding, dilation, height, width = shape
    weight = torch.randint(-127, 128, (n, c // groups, *kernel), dtype=torch.int8)
    x = torch.randn(b, c, height, width).to(dtype)
    if channels_last:
        x = torch.randn(b, height, width, c).to(dtype).permute(0, 3, 1, 2)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if static:
        zero_point = torch.tensor([11], dtype=torch.int32)
        options |= {"input_scale": torch.tensor([0.02]), "input_zero_point": zero_point}
    arguments = (x, pack_conv2d(weight, groups), torch.rand(n) / 100)
    return (*arguments, torch.randn(n).to(dtype) if bias else None), options


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_reference(isa, shape):
    for dtype, static, last in itertools.product(DTYPES, (False, True), (False, True)):
        arguments, options = inputs(shape, dtype, not last, static, last)
        y = int8_conv2d(*arguments, **options)
        assert_same_bits(y, reference.int8_conv2d(*arguments, **options))
        if last and y.shape[1] > 1:
            assert y.is_contiguous(memory_format=torch.channels_last)


def test_against_float64():
    """From the formula: what is rounded is known, so the rest is exact up to fp32's last bits."""
    (x, packed, scale, bias), options = inputs(SHAPES[1])
    step = x.double().abs().max() / 127
    weight = unpack_conv2d(packed, (70, 20, 3, 3)).double() * scale.double()[:, None, None, None]
    expected = nn.functional.conv2d(
        (x.double() / step).round() * step, weight, bias.double(), (2, 2), (1, 1)
    )
    y = int8_conv2d(x, packed, scale, bias, **options)
    assert (y - expected).norm() < 1e-6 * expected.norm()


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 5),
    of_group=st.integers(1, 9),
    outs=st.integers(1, 20),
    kh=st.integers(1, 3),
    kw=st.integers(1, 3),
)
def test_packing_is_undone(groups, of_group, outs, kh, kw):
    weight = torch.randint(-127, 128, (groups * outs, of_group, kh, kw), dtype=torch.int8)
    packed = pack_conv2d(weight, groups)
    assert torch.equal(unpack_conv2d(packed, tuple(weight.shape)), weight)
    assert packed.long().abs().sum() == weight.long().abs().sum()  # padding is 0


def test_threads_do_not_show(threads):
    for shape in (SHAPES[1], SHAPES[2], (3, 8, 24, (3, 3), 2, (1, 1), (1, 1), (1, 1), 40, 40)):
        arguments, options = inputs(shape)
        threads(1)
        alone = int8_conv2d(*arguments, **options)
        for count in (2, 3, 7):
            threads(count)
            assert_same_bits(int8_conv2d(*arguments, **options), alone)


def test_difficult_images(isa):
    for static in (False, True):
        arguments, options = inputs(
            (5, 4, 6, (3, 3), 1, (1, 1), (1, 1), (1, 1), 5, 5), static=static
        )
        x = arguments[0]
        x[1], x[2, 0, 0, 0], x[3, 1, 2, 3] = 0, torch.nan, torch.inf
        x[4] *= 1e30
        y = int8_conv2d(x, *arguments[1:], **options)
        assert_same_bits(y, reference.int8_conv2d(x, *arguments[1:], **options))
        assert y[2:4].isnan().all()
        assert y[:2].isfinite().all()
        torch.testing.assert_close(y[1], arguments[3][:, None, None].expand_as(y[1]))


def test_empty_batch_and_strided_input():
    arguments, options = inputs(SHAPES[0])
    x = arguments[0]
    assert int8_conv2d(x[:0], *arguments[1:], **options).shape == (0, 16, 9, 7)
    wide = torch.randn(2, 3, 9, 14)
    expected = int8_conv2d(wide[..., ::2].contiguous(), *arguments[1:], **options)
    assert_same_bits(int8_conv2d(wide[..., ::2], *arguments[1:], **options), expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck_compile_and_export(channels_last):
    arguments, options = inputs(SHAPES[1], static=True, channels_last=channels_last)
    x, *weight = arguments
    given = x.permute(0, 2, 3, 1) if channels_last else x
    raw = ([2, 2], [1, 1], [1, 1], 1, channels_last)
    fixed = (options["input_scale"], options["input_zero_point"])
    torch.library.opcheck(torch.ops.trine.int8_conv2d.default, (given, *weight, *raw, *fixed))
    layer = Int8Conv2d.from_conv(nn.Conv2d(20, 8, 3, padding=1))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), layer(x))
    assert_same_bits(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[3]], ids=str)
def test_gradients_are_those_of_the_dense_convolution(shape):
    (x, packed, scale, bias), options = inputs(shape)
    x.requires_grad_()
    bias.requires_grad_()
    y = int8_conv2d(x, packed, scale, bias, **options)
    grad = torch.randn_like(y)
    y.backward(grad)
    _, c, n, kernel, groups, *_ = shape
    dense = unpack_conv2d(packed, (n, c // groups, *kernel)).double()
    wide, offset = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    weight = dense * scale.double()[:, None, None, None]
    nn.functional.conv2d(wide, weight, offset, **options).backward(grad.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias.grad.double(), offset.grad, rtol=1e-5, atol=1e-5)


class TestLayer:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_from_conv_is_near_the_convolution(self, dtype):
        for conv in (
            nn.Conv2d(6, 10, 3, padding="same", groups=2),
            nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6, bias=False),
            nn.Conv2d(6, 10, (1, 3), padding="valid", dilation=2),
        ):
            conv, x = conv.to(dtype), torch.randn(2, 6, 9, 9).to(dtype)
            y, expected = Int8Conv2d.from_conv(conv)(x), conv(x)
            assert y.shape == expected.shape
            assert (y - expected).float().norm() < 0.03 * expected.float().norm()
        assert Int8Conv2d.from_conv(conv)(x[0]).shape == expected.shape[1:]

    def test_the_dense_weight(self):
        conv = nn.Conv2d(6, 10, 3, groups=2)
        weight = Int8Conv2d.from_conv(conv).weight
        step = conv.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
        assert ((weight - conv.weight).abs() <= step * 0.501).all()

    @pytest.mark.parametrize("static", [False, True])
    def test_saved_and_loaded(self, static, tmp_path):
        fixed = {"input_scale": torch.tensor([0.03])} if static else {}
        layer = Int8Conv2d.from_conv(nn.Conv2d(3, 5, 3, padding=1), **fixed)
        model, x = nn.Sequential(layer, nn.ReLU()), torch.randn(1, 3, 6, 6)
        trine.save(model, tmp_path / "model.safetensors")
        again = trine.load(tmp_path / "model.safetensors")
        assert isinstance(again[0], Int8Conv2d)
        assert_same_bits(again(x), model(x))
        empty = Int8Conv2d(3, 5, 3, padding=1, static_input=static)
        if not static:
            assert empty(x).isnan().all()
        empty.load_state_dict(layer.state_dict())
        assert_same_bits(empty(x), layer(x))

    def test_dtypes_and_copies(self):
        layer, x = Int8Conv2d.from_conv(nn.Conv2d(3, 5, 3)), torch.randn(1, 3, 6, 6)
        half = copy.deepcopy(layer).half()
        assert half.weight_scale.dtype == torch.float32
        assert half.packed_weight.dtype == torch.int8
        assert half.bias.dtype == half(x.half()).dtype == torch.float16
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16

    def test_errors(self):
        layer, x = Int8Conv2d.from_conv(nn.Conv2d(4, 6, 3)), torch.randn(1, 4, 5, 5)
        for match, call in (
            ("expected \\[batch, 4", lambda: layer(torch.randn(1, 3, 5, 5))),
            ("kernel spans", lambda: layer(x[..., :2])),
            ("float32, bfloat16 or float16", lambda: layer(x.double())),
            (
                "padding_mode",
                lambda: Int8Conv2d.from_conv(nn.Conv2d(2, 2, 3, padding_mode="reflect")),
            ),
            ("even kernel", lambda: Int8Conv2d.from_conv(nn.Conv2d(2, 2, 2, padding="same"))),
            ("takes torch.nn.Conv2d; got Linear", lambda: Int8Conv2d.from_conv(nn.Linear(2, 2))),
            ("must divide", lambda: Int8Conv2d(3, 4, 3, groups=2)),
            ("-128", lambda: pack_conv2d(torch.full((1, 1, 1, 1), -128, dtype=torch.int8))),
            (
                "pack the weight with",
                lambda: int8_conv2d(x, layer.packed_weight[:, :, :, :, :0], layer.weight_scale),
            ),
            (
                "no gradient to a packed weight",
                lambda: int8_conv2d(
                    x, layer.packed_weight, layer.weight_scale.clone().requires_grad_()
                ),
            ),
        ):
            with pytest.raises(ValueError, match=match):
                call()
        conv = nn.Conv2d(2, 2, 3)
        conv.weight.data[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            Int8Conv2d.from_conv(conv)
