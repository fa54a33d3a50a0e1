"""ternary_linear: every instruction set against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import DTYPES, SHAPES, assert_same_bits, difficult_rows, non_contiguous
from trine.ops import pack_ternary, ternary_linear, unpack_ternary
from trine.ops.ternary_linear import reference

op = torch.ops.trine.ternary_linear.default


def assert_matches_reference(*args) -> None:
    assert_same_bits(ternary_linear(*args), reference.ternary_linear(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_reference(isa, dtype, m, n, k):
    assert_matches_reference(*reference.example_inputs(m, n, k, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_shape", [(), (1,)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 17, 100), (3, 1, 64), (9, 20, 300)])
def test_one_scale_for_the_tensor(isa, dtype, scale_shape, m, n, k):
    args = reference.example_inputs(m, n, k, dtype, scale_shape=scale_shape)
    assert_matches_reference(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 5, 13])
@pytest.mark.parametrize(
    ("n", "k", "groups"), [(5, 64, 1), (17, 256, 4), (35, 576, 3), (16, 640, 2)]
)
def test_groups(isa, dtype, m, n, k, groups):
    args = reference.example_inputs(m, n, k, dtype, scale_shape=(n, groups))
    assert_matches_reference(*args)


@pytest.mark.parametrize(("m", "n", "k", "groups"), [(7, 19, 2368, 37), (2, 5, 8320, 2)])
def test_many_groups_and_long_groups(isa, m, n, k, groups):
    assert_matches_reference(*reference.example_inputs(m, n, k, scale_shape=(n, groups)))


@pytest.mark.parametrize(("k", "groups"), [(320, 0), (1600, 0), (320, 5)])
def test_every_number_of_rows(isa, k, groups):
    """Crosses every remainder of every tile, and the change from one path to another."""
    n = 53
    scale_shape = (n, groups) if groups else (n,)
    args = reference.example_inputs(40, n, k, scale_shape=scale_shape)
    expected = reference.ternary_linear(*args)
    for m in range(1, 41):
        assert_same_bits(ternary_linear(args[0][:m], *args[1:]), expected[:m])


@pytest.mark.parametrize(
    ("m", "n", "k", "groups"), [(5, 261, 8192, 0), (13, 35, 8256, 0), (3, 35, 8256, 129)]
)
def test_more_than_one_block(isa, m, n, k, groups):
    """More columns, and more k, than a kernel takes at a time."""
    scale_shape = (n, groups) if groups else (n,)
    assert_matches_reference(*reference.example_inputs(m, n, k, scale_shape=scale_shape))


@pytest.mark.parametrize(("m", "groups"), [(1, 0), (7, 0), (2, 3)])
def test_every_number_of_columns(isa, m, groups):
    scale_shape = (70, groups) if groups else (70,)
    x, packed_weight, scale, bias = reference.example_inputs(m, 70, 192, scale_shape=scale_shape)
    expected = reference.ternary_linear(x, packed_weight, scale, bias)
    for n in range(1, 71):
        y = ternary_linear(x, packed_weight[:n], scale[:n], bias[:n])
        assert_same_bits(y, expected[:, :n])


@pytest.mark.parametrize("m", [1, 6])
def test_every_depth(isa, m):
    """K that leave part of a word, of 16 bytes and of a cache line of packed weight unused."""
    for k in range(0, 270, 7):
        assert_matches_reference(*reference.example_inputs(m, 18, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_shape", [(), (19,), (19, 2)])
def test_difficult_rows(isa, dtype, scale_shape):
    _, *rest = reference.example_inputs(8, 19, 128, dtype, scale_shape=scale_shape)
    x = difficult_rows(128, dtype)
    assert_matches_reference(x, *rest)
    for row in range(8):
        assert_matches_reference(x[row : row + 1], *rest)


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


@pytest.mark.parametrize("m", [1, 9, 13])
@pytest.mark.parametrize("scale_shape", [(20,), (20, 2)])
def test_extreme_values(isa, m, scale_shape):
    """Activations of +-127 against weights all 1, all -1 or of the activation's sign: no partial
    sum of a kernel may overflow."""
    k = 8192
    x = torch.randint(0, 2, (m, k)).float() * 2 - 1
    x[0] = 1
    values = torch.ones(20, k, dtype=torch.int8)
    values[5:10] = -1
    values[10:15] = x[m - 1].to(torch.int8)
    values[15:] = -x[m - 1].to(torch.int8)
    scale = torch.ones(scale_shape)
    y = ternary_linear(x, pack_ternary(values), scale)
    assert_same_bits(y, reference.ternary_linear(x, pack_ternary(values), scale))
    largest = 127 * k * (torch.tensor(1.0) / 127)
    assert_same_bits(y[0, :10], torch.cat([largest.repeat(5), -largest.repeat(5)]))


def test_largest_k(isa):
    k = 2**22
    x = torch.ones(1, k)
    all_plus, all_minus, all_zero = 0xAAAAAAAA - 2**32, 0, 0x55555555
    words = torch.tensor([[all_plus], [all_minus], [all_zero]], dtype=torch.int32)
    packed_weight = words.repeat(1, k // 16)
    y = ternary_linear(x, packed_weight, torch.ones(3))
    acc = torch.tensor([127.0 * k, -127.0 * k, 0.0])
    assert_same_bits(y, (acc * (torch.tensor(1.0) / 127))[None])


@pytest.mark.parametrize("m", [1, 5, 64])
@pytest.mark.parametrize("scale_shape", [(), (600,), (600, 4)])
def test_number_of_threads_changes_nothing(isa, threads, m, scale_shape):
    args = reference.example_inputs(m, 600, 1024, scale_shape=scale_shape)
    threads(1)
    alone = ternary_linear(*args)
    threads(3)
    assert torch.equal(alone, ternary_linear(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_shape", [(), (5,), (5, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype, scale_shape, bias):
    x, *rest = reference.example_inputs(4, 5, 128, dtype, bias, scale_shape)
    for rows in (x, x[0], x.reshape(2, 2, 128), x.new_empty(2, 0, 128)):
        torch.library.opcheck(op, (rows, *rest))


@pytest.mark.parametrize("scale_shape", [(), (6,), (6, 2)])
def test_compile_and_export(scale_shape):
    x, *rest = reference.example_inputs(5, 6, 128, scale_shape=scale_shape)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return ternary_linear(x, *rest) + 1

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},)).module()
    assert torch.equal(exported(x[:3]), layer(x[:3]))


def test_compile_to_machine_code():
    x, *rest = reference.example_inputs(5, 6, 128)
    compiled = torch.compile(lambda x: ternary_linear(x, *rest) + 1, fullgraph=True)
    assert torch.equal(compiled(x), ternary_linear(x, *rest) + 1)


def test_compile_with_gradient():
    x, packed_weight, scale, bias = reference.example_inputs(5, 6, 64)
    x.requires_grad_()

    def loss(x):
        return ternary_linear(x, packed_weight, scale, bias).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, *rest = reference.example_inputs(3, 6, 70)
    with torch.autocast("cpu", dtype=dtype):
        y = ternary_linear(x, *rest)
    assert_same_bits(y, ternary_linear(x.to(dtype), *rest))


def test_inference_mode():
    args = reference.example_inputs()
    with torch.inference_mode():
        y = ternary_linear(*args)
    assert y.is_inference()
    assert_same_bits(y, ternary_linear(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_shape", [(), (7,), (7, 3)])
def test_gradients(dtype, scale_shape):
    """Those of the dense product with the weight that the packed one stands for, in float64."""
    x, packed_weight, scale, bias = reference.example_inputs(4, 7, 192, dtype, True, scale_shape)
    grad_y = torch.randn(2, 2, 7).to(dtype)
    x = x.reshape(2, 2, 192)
    weight = reference.decode(packed_weight, 192)
    spread = scale.reshape(scale.shape[0], -1) if scale.dim() else scale.reshape(1, 1)
    weight = weight * spread.double().repeat_interleave(192 // spread.shape[1], 1)
    true_x, true_bias = x.double().requires_grad_(), bias.double().requires_grad_()
    torch.nn.functional.linear(true_x, weight, true_bias).backward(grad_y.double())

    x.requires_grad_()
    bias.requires_grad_()
    ternary_linear(x, packed_weight, scale, bias).backward(grad_y)
    for actual, expected in [(x.grad, true_x.grad), (bias.grad, true_bias.grad)]:
        assert actual.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(actual.double(), expected, rtol=2 * eps, atol=8 * eps)


def test_gradient_only_where_it_is_wanted():
    x, packed_weight, scale, bias = reference.example_inputs()
    assert ternary_linear(x, packed_weight, scale, bias).grad_fn is None
    y = ternary_linear(x, packed_weight, scale, bias.requires_grad_())
    y.sum().backward()
    assert x.grad is None
    assert torch.equal(bias.grad, torch.full_like(bias, 3.0))
    with torch.no_grad():
        assert ternary_linear(x, packed_weight, scale, bias).grad_fn is None


def _bad_arguments():
    x = torch.randn(3, 128)
    weight = torch.zeros(5, 8, dtype=torch.int32)
    scale = torch.ones(5)
    return {
        "must be float32, bfloat16 or float16": (x.double(), weight, scale),
        "at least one dimension": (torch.tensor(1.0), weight, scale),
        "packed_weight must be int32": (x, weight.to(torch.int8), scale),
        "weight_scale must be float32": (x, weight, scale.half()),
        "packed_weight must be \\[N, 4": (x, weight[0], scale),
        "x has K = 100 columns.*8": (x[:, :100], weight[:, :4], scale),
        "K = 4194305 exceeds 4194304": (
            torch.empty(0, 2**22 + 1),
            torch.empty(0, 2**18 + 4, dtype=torch.int32),
            torch.ones(0),
        ),
        "weight_scale must hold one value, \\[5\\]": (x, weight, torch.ones(4)),
        "or \\[5, groups\\]": (x, weight, torch.ones(3, 2)),
        "weight_scale has 4 groups per row.*K = 128": (x, weight, torch.ones(5, 4)),
        "weight_scale has 3 groups": (x, weight, torch.ones(5, 3)),
        "weight_scale has 0 groups": (x, weight, torch.ones(5, 0)),
        "bias must have shape \\[5\\]": (x, weight, scale, torch.ones(4)),
        "bias must be float32": (x, weight, scale, torch.ones(5, dtype=torch.int32)),
    }


@pytest.mark.parametrize("message", _bad_arguments())
def test_errors(message):
    args = _bad_arguments()[message]
    with pytest.raises(ValueError, match=message) as caught:
        ternary_linear(*args)
    assert str(caught.value).startswith("ternary_linear: ")
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    "message",
    [
        "packed_weight must be int32",
        "weight_scale must be float32",
        "packed_weight must be \\[N, 4",
        "K = 4194305 exceeds 4194304",
        "weight_scale must hold one value, \\[5\\]",
        "or \\[5, groups\\]",
        "weight_scale has 4 groups per row.*K = 128",
        "weight_scale has 0 groups",
        "bias must have shape \\[5\\]",
    ],
)
def test_errors_without_data(message):
    """What the kernel would refuse is refused while tracing too."""
    args = [t.to("meta") for t in _bad_arguments()[message]]
    with pytest.raises(ValueError, match=message):
        op(*args)


def test_pack_errors():
    with pytest.raises(ValueError, match="takes an int8 matrix"):
        pack_ternary(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="takes an int8 matrix"):
        pack_ternary(torch.zeros(2, dtype=torch.int8))
    with pytest.raises(ValueError, match="holds 0 to 2"):
        pack_ternary(torch.tensor([[0, 2]], dtype=torch.int8))


def packed_by_hand(rows: list[list[int]]) -> list[list[int]]:
    """Unsigned words, built value by value from the description of the layout."""
    packed = []
    for row in rows:
        padded = row + [0] * (-len(row) % 64)
        words = []
        for start in range(0, len(padded), 16):
            word = 0
            for j in range(4):
                for i in range(4):
                    word += (padded[start + 4 * i + j] + 1) * 256**j * 4**i
            words.append(word)
        packed.append(words)
    return packed


@settings(deadline=None)
@given(st.data())
def test_pack_and_unpack(data):
    n, k = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 150))
    one_row = st.lists(st.integers(-1, 1), min_size=k, max_size=k)
    rows = data.draw(st.lists(one_row, min_size=n, max_size=n))
    values = torch.tensor(rows, dtype=torch.int8).reshape(n, k)
    packed = pack_ternary(values)
    assert packed.dtype == torch.int32
    assert packed.shape == (n, 4 * ((k + 63) // 64))
    assert (packed.long() & 0xFFFFFFFF).tolist() == packed_by_hand(rows)
    assert torch.equal(unpack_ternary(packed, k), values)
    assert torch.equal(reference.decode(packed, k), values.double())
