"""ternary24_linear: every instruction set against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import DTYPES, SHAPES, assert_same_bits, difficult_rows, non_contiguous
from trine.ops import (
    pack_ternary,
    pack_ternary24,
    ternary24_linear,
    ternary_linear,
    unpack_ternary24,
)
from trine.ops.ternary24_linear import reference

op = torch.ops.trine.ternary24_linear.default


def assert_matches_reference(*args) -> None:
    assert_same_bits(ternary24_linear(*args), reference.ternary24_linear(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_reference(isa, dtype, m, n, k):
    assert_matches_reference(*reference.example_inputs(m, n, k, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_shape", [(), (1,)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 17, 100), (3, 1, 64), (9, 20, 300), (70, 33, 130)])
def test_one_scale_for_the_tensor(isa, dtype, scale_shape, m, n, k):
    args = reference.example_inputs(m, n, k, dtype, scale_shape=scale_shape)
    assert_matches_reference(*args)


@pytest.mark.parametrize("k", [320, 1600])
def test_every_number_of_rows(isa, k):
    """Crosses every remainder of every tile, and the change from one path to another."""
    args = reference.example_inputs(80, 53, k)
    expected = reference.ternary24_linear(*args)
    for m in range(1, 81):
        assert_same_bits(ternary24_linear(args[0][:m], *args[1:]), expected[:m])


@pytest.mark.parametrize(
    ("m", "n", "k"), [(5, 261, 8192), (13, 70, 8256), (66, 35, 8256), (3, 35, 16400)]
)
def test_more_than_one_block(isa, m, n, k):
    """More columns, and more k, than a kernel takes at a time."""
    assert_matches_reference(*reference.example_inputs(m, n, k))


@pytest.mark.parametrize("m", [1, 7, 65])
def test_every_number_of_columns(isa, m):
    x, packed_weight, scale, bias = reference.example_inputs(m, 70, 192)
    expected = reference.ternary24_linear(x, packed_weight, scale, bias)
    for n in range(1, 71):
        y = ternary24_linear(x, packed_weight[:n], scale[:n], bias[:n])
        assert_same_bits(y, expected[:, :n])


@pytest.mark.parametrize("m", [1, 6, 65])
def test_every_depth(isa, m):
    """K that leave part of a group, of a byte, of 16 bytes and of a vector of the weight unused."""
    for k in range(0, 600, 7):
        assert_matches_reference(*reference.example_inputs(m, 18, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_shape", [(), (19,)])
def test_difficult_rows(isa, dtype, scale_shape):
    _, *rest = reference.example_inputs(8, 19, 128, dtype, scale_shape=scale_shape)
    x = difficult_rows(128, dtype)
    assert_matches_reference(x, *rest)
    assert_matches_reference(x.repeat(9, 1), *rest)
    for row in range(8):
        assert_matches_reference(x[row : row + 1], *rest)


@pytest.mark.parametrize("m", [1, 3, 70])
def test_every_group(isa, m):
    """All 64 states of a group's bits, at every place that a group takes in 16 bytes."""
    states = torch.arange(64)
    groups = torch.stack([states.roll(shift) for shift in range(64)])  # [row, place]
    bits = groups[:, :, None] >> torch.arange(6) & 1
    packed_weight = (bits.view(64, 48, 8) << torch.arange(8)).sum(2).to(torch.uint8)
    x = torch.randn(m, 256)
    assert_matches_reference(x, packed_weight, torch.ones(64))
    assert_matches_reference(x[:, :200], packed_weight[:, :48], torch.ones(64))


@pytest.mark.parametrize("m", [1, 4, 33, 65])
def test_same_bits_as_ternary_linear(isa, m):
    """The same dense weight, packed in two bits a value."""
    x, packed_weight, scale, bias = reference.example_inputs(m, 40, 500)
    dense = unpack_ternary24(packed_weight, 500)
    assert_same_bits(
        ternary24_linear(x, packed_weight, scale, bias),
        ternary_linear(x, pack_ternary(dense), scale, bias),
    )


def test_layouts(isa):
    x, packed_weight, scale, bias = reference.example_inputs(6, 21, 100)
    for other in non_contiguous(x):
        assert_matches_reference(other, packed_weight, scale, bias)
    assert_matches_reference(x, packed_weight.T.contiguous().T, scale, bias)
    assert_matches_reference(
        x, packed_weight.repeat(1, 2)[:, : packed_weight.shape[1]], scale, bias
    )
    assert_matches_reference(x, packed_weight, scale.repeat_interleave(2)[::2], None)
    assert_matches_reference(x[0], packed_weight, scale, bias)
    assert_matches_reference(x.reshape(2, 3, 100), packed_weight, scale, bias)


@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_of_another_dtype(isa, bias_dtype):
    x, packed_weight, scale, bias = reference.example_inputs(2, 9, 70)
    assert_matches_reference(x, packed_weight, scale, bias.to(bias_dtype))
    assert_matches_reference(x.bfloat16(), packed_weight, scale, bias.to(bias_dtype))


@pytest.mark.parametrize("m", [1, 9, 65])
def test_extreme_values(isa, m):
    """Activations of +-127 against weights of their sign, and of the opposite one: no partial sum
    of a kernel may overflow."""
    k = 8192
    x = torch.randint(0, 2, (m, k)).float() * 2 - 1
    x[0] = 1
    kept = (torch.arange(k) % 4 < 2).to(torch.int8)
    values = kept.repeat(20, 1)
    values[5:10] *= -1
    values[10:15] *= x[m - 1].to(torch.int8)
    values[15:] *= -x[m - 1].to(torch.int8)
    packed_weight = pack_ternary24(values)
    y = ternary24_linear(x, packed_weight, torch.ones(20))
    assert_same_bits(y, reference.ternary24_linear(x, packed_weight, torch.ones(20)))
    largest = 127 * k / 2 * (torch.tensor(1.0) / 127)
    assert_same_bits(y[0, :10], torch.cat([largest.repeat(5), -largest.repeat(5)]))


def test_largest_k(isa):
    k = 2**22
    rows = torch.tensor([[1, 0, 1, 0], [0, -1, 0, -1], [0, 0, 0, 0]], dtype=torch.int8)
    packed_weight = pack_ternary24(rows.repeat(1, 64)).repeat(1, k // 256)
    y = ternary24_linear(torch.ones(1, k), packed_weight, torch.ones(3))
    acc = torch.tensor([127.0 * k / 2, -127.0 * k / 2, 0.0])
    assert_same_bits(y, (acc * (torch.tensor(1.0) / 127))[None])


@pytest.mark.parametrize("m", [1, 5, 90])
@pytest.mark.parametrize("scale_shape", [(), (600,)])
def test_number_of_threads_changes_nothing(isa, threads, m, scale_shape):
    args = reference.example_inputs(m, 600, 1024, scale_shape=scale_shape)
    threads(1)
    alone = ternary24_linear(*args)
    threads(3)
    assert torch.equal(alone, ternary24_linear(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_shape", [(), (5,)])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype, scale_shape, bias):
    x, *rest = reference.example_inputs(4, 5, 128, dtype, bias, scale_shape)
    for rows in (x, x[0], x.reshape(2, 2, 128), x.new_empty(2, 0, 128)):
        torch.library.opcheck(op, (rows, *rest))


def test_compile_and_export():
    x, *rest = reference.example_inputs(5, 6, 128)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return ternary24_linear(x, *rest) + 1

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},)).module()
    assert torch.equal(exported(x[:3]), layer(x[:3]))


def test_compile_with_gradient():
    x, packed_weight, scale, bias = reference.example_inputs(5, 6, 64)
    x.requires_grad_()

    def loss(x):
        return ternary24_linear(x, packed_weight, scale, bias).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, *rest = reference.example_inputs(3, 6, 70)
    with torch.autocast("cpu", dtype=dtype):
        y = ternary24_linear(x, *rest)
    assert_same_bits(y, ternary24_linear(x.to(dtype), *rest))


def test_inference_mode():
    args = reference.example_inputs()
    with torch.inference_mode():
        y = ternary24_linear(*args)
    assert y.is_inference()
    assert_same_bits(y, ternary24_linear(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_shape", [(), (7,)])
def test_gradients(dtype, scale_shape):
    """Those of the dense product with the weight that the packed one stands for, in float64."""
    x, packed_weight, scale, bias = reference.example_inputs(4, 7, 190, dtype, True, scale_shape)
    grad_y = torch.randn(2, 2, 7).to(dtype)
    x = x.reshape(2, 2, 190)
    weight = reference.decode(packed_weight, 190) * scale.double().reshape(-1, 1)
    true_x, true_bias = x.double().requires_grad_(), bias.double().requires_grad_()
    torch.nn.functional.linear(true_x, weight, true_bias).backward(grad_y.double())

    x.requires_grad_()
    bias.requires_grad_()
    ternary24_linear(x, packed_weight, scale, bias).backward(grad_y)
    for actual, expected in [(x.grad, true_x.grad), (bias.grad, true_bias.grad)]:
        assert actual.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(actual.double(), expected, rtol=2 * eps, atol=8 * eps)


def _bad_arguments():
    x = torch.randn(3, 128)
    weight = torch.zeros(5, 32, dtype=torch.uint8)
    scale = torch.ones(5)
    return {
        "must be float32, bfloat16 or float16": (x.double(), weight, scale),
        "at least one dimension": (torch.tensor(1.0), weight, scale),
        "packed_weight must be uint8": (x, weight.to(torch.int8), scale),
        "weight_scale must be float32": (x, weight, scale.half()),
        "packed_weight must be \\[N, 16": (x, weight[0], scale),
        "x has K = 80 columns.*32": (x[:, :80], weight, scale),
        "K = 4194305 exceeds 4194304": (
            torch.empty(0, 2**22 + 1),
            torch.empty(0, 2**22 * 3 // 16 + 16, dtype=torch.uint8),
            torch.ones(0),
        ),
        "weight_scale must hold one value or \\[5\\]": (x, weight, torch.ones(4)),
        "weight_scale must hold one value": (x, weight, torch.ones(5, 2)),
        "bias must have shape \\[5\\]": (x, weight, scale, torch.ones(4)),
        "bias must be float32": (x, weight, scale, torch.ones(5, dtype=torch.int32)),
    }


@pytest.mark.parametrize("message", _bad_arguments())
def test_errors(message):
    args = _bad_arguments()[message]
    with pytest.raises(ValueError, match=message) as caught:
        ternary24_linear(*args)
    assert str(caught.value).startswith("ternary24_linear: ")
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("message", [m for m in _bad_arguments() if "float16" not in m][1:-1])
def test_errors_without_data(message):
    """What the kernel would refuse is refused while tracing too."""
    args = [t.to("meta") for t in _bad_arguments()[message]]
    with pytest.raises(ValueError, match=message):
        op(*args)


def test_quantized_rows_are_refused():
    _, *rest = reference.example_inputs()
    with pytest.raises(ValueError, match="x must be a tensor"):
        ternary24_linear(object(), *rest)


def test_pack_errors():
    with pytest.raises(ValueError, match="takes an int8 matrix"):
        pack_ternary24(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="takes an int8 matrix"):
        pack_ternary24(torch.zeros(2, dtype=torch.int8))
    with pytest.raises(ValueError, match="holds 0 to 2"):
        pack_ternary24(torch.tensor([[0, 2]], dtype=torch.int8))
    rows = torch.zeros(3, 9, dtype=torch.int8)
    rows[1, 4:7] = -1
    with pytest.raises(ValueError, match="row 1 holds 3 in columns 4 to 7"):
        pack_ternary24(rows)


def packed_by_hand(rows: list[list[int]]) -> list[list[int]]:
    """Rows of bytes, built group by group from the description of the layout."""
    packed = []
    for row in rows:
        padded = row + [0] * (-len(row) % 4)
        size = 16 * -(-6 * len(padded) // 4 // 128)
        bits = 0
        for place in range(-(-8 * size // 6)):
            group = padded[4 * place : 4 * place + 4] or [0] * 4
            values = [(column, value) for column, value in enumerate(group) if value]
            first, second = (3, 1), (0, 1)
            if len(values) == 2:
                first, second = values
            elif values and values[0][0] == 3:
                second = values[0]
            elif values:
                first = values[0]
            sixbits = first[0] + 4 * (first[1] < 0) + 8 * second[0] + 32 * (second[1] < 0)
            bits += sixbits << 6 * place
        packed.append(list((bits % 256**size).to_bytes(size, "little")))
    return packed


group_values = st.lists(st.sampled_from([-1, 1]), max_size=2).flatmap(
    lambda values: st.permutations(values + [0] * (4 - len(values)))
)


@settings(deadline=None)
@given(st.data())
def test_pack_and_unpack(data):
    n, k = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 200))
    row = st.lists(group_values, min_size=-(-k // 4), max_size=-(-k // 4))
    drawn = data.draw(st.lists(row, min_size=n, max_size=n))
    rows = [[value for group in groups for value in group][:k] for groups in drawn]
    values = torch.tensor(rows, dtype=torch.int8).reshape(n, k)
    packed = pack_ternary24(values)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == packed_by_hand(rows)
    assert torch.equal(unpack_ternary24(packed, k), values)
    assert torch.equal(reference.decode(packed, k), values.double())


@settings(deadline=None)
@given(k=st.integers(0, 300), seed=st.integers(0, 2**16))
def test_any_bits_are_a_weight(k, seed):
    """It is ternary and 2:4, and packs to other bits of the same meaning."""
    torch.manual_seed(seed)
    _, packed_weight, _, _ = reference.example_inputs(0, 3, k)
    values = unpack_ternary24(packed_weight, k)
    assert torch.equal(values.double(), reference.decode(packed_weight, k))
    assert torch.equal(unpack_ternary24(pack_ternary24(values), k), values)
