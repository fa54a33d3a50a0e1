"""sparse24_linear: every instruction set against the reference, and the packing against loops."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import (
    DTYPES,
    SHAPES,
    assert_same_bits,
    assert_within_sum_bound,
    difficult_rows,
    non_contiguous,
)
from memory_guard import at_end_of_memory
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass
from trine.nn import Sparse24Linear
from trine.ops import int8_linear, pack_int8, pack_sparse24, sparse24_linear, unpack_sparse24
from trine.ops.sparse24_linear import from_semi_structured, reference, to_semi_structured

VALUES_DTYPES = (*DTYPES, torch.int8)
ON_GPU = "fp32 values have no kernel on a GPU"
EPS = torch.finfo(torch.float32).eps
# Around the numbers of rows at which kernels change their ways, and N that fills no tile.
MANY_ROWS = ((15, 37, 130), (16, 9, 96), (17, 40, 1030), (65, 300, 70), (100, 33, 520))


@pytest.fixture(autouse=True)
def _values_that_have_a_kernel(request) -> None:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    values_dtype = parameters.get("values_dtype", parameters.get("dtype"))
    if parameters.get("isa") == "cuda" and values_dtype == torch.float32:
        pytest.skip(ON_GPU)


def dtypes_beside(isa: str, values_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of x. On a GPU float values go with x of their own type."""
    return (values_dtype,) if isa == "cuda" and values_dtype != torch.int8 else DTYPES


def dtype_beside(isa: str, values_dtype: torch.dtype) -> torch.dtype:
    """One of them: bf16 beside bf16 values, for which some processors have a kernel of its own."""
    if values_dtype == torch.bfloat16:
        return torch.bfloat16
    return dtypes_beside(isa, values_dtype)[0]


def assert_matches_reference(x, values, indices, bias=None, **kwargs) -> None:
    actual = sparse24_linear(x, values, indices, bias, **kwargs)
    assert_is_result(actual, x, values, indices, bias, **kwargs)


def assert_is_result(actual: Tensor, x, values, indices, bias=None, **kwargs) -> None:
    """Equal bits with int8 values; within the rounding of the sum with float ones."""
    expected = reference.sparse24_linear(x, values, indices, bias, **kwargs)
    if values.dtype == torch.int8:
        return assert_same_bits(actual, expected)
    assert actual.dtype == expected.dtype == x.dtype
    assert actual.shape == expected.shape
    m, k, n = x.shape[:-1].numel(), x.shape[-1], len(values)
    magnitude = reference.sparse_product(x.reshape(m, k).abs(), values.abs(), indices)
    assert_within_sum_bound(actual.reshape(m, n), expected.reshape(m, n), magnitude, k)


@pytest.mark.parametrize("values_dtype", VALUES_DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, *MANY_ROWS])
def test_matches_reference(isa, values_dtype, m, n, k):
    for dtype in dtypes_beside(isa, values_dtype):
        args, scale = reference.example_inputs(m, n, k, dtype, values_dtype)
        assert_matches_reference(*args, **scale)


@pytest.mark.parametrize("values_dtype", VALUES_DTYPES)
@pytest.mark.parametrize("k", [70, 1100])  # one slice of k, several
def test_every_number_of_rows(isa, values_dtype, k):
    for m in range(1, 35):
        dtype = dtype_beside(isa, values_dtype)
        args, scale = reference.example_inputs(m, 19, k, dtype, values_dtype, bias=m % 2)
        assert_matches_reference(*args, **scale)


@pytest.mark.parametrize("m", [1, 2, 7, 9, 40])
def test_largest_int8_products(isa, m):
    """127 times 127 or -128, all of one sign: no pair of products may saturate."""
    k = 260
    (_, values, indices, _), scale = reference.example_inputs(m, 5, k, torch.float32, torch.int8)
    for value in (-128, -127, 127):
        for x in (torch.ones(m, k), -torch.ones(m, k)):
            assert_matches_reference(x, torch.full_like(values, value), indices, **scale)


@pytest.mark.parametrize("values_dtype", VALUES_DTYPES)
@pytest.mark.parametrize("k", [1, 16, 37, 130])
def test_difficult_rows(isa, values_dtype, k):
    for dtype in dtypes_beside(isa, values_dtype):
        (_, *weight), scale = reference.example_inputs(1, 7, k, dtype, values_dtype)
        rows = difficult_rows(k, dtype)
        assert_matches_reference(rows, *weight, **scale)
        assert_matches_reference(rows.repeat(5, 1), *weight, **scale)


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_are_lost_at_most(isa, dtype, m):
    """At worst each subnormal operand, product and sum counts as 0."""
    k, tiny = 130, torch.finfo(torch.float32).tiny
    (x, values, indices, bias), _ = reference.example_inputs(m, 9, k, dtype, dtype, bias=False)
    for scale in (tiny, tiny / 16):
        small = x * scale
        actual = sparse24_linear(small, values, indices, bias).double()
        expected = reference.sparse_product(small, values, indices)
        magnitude = reference.sparse_product(small.abs(), values.abs(), indices)
        bound = (4 * EPS * k**0.5 + torch.finfo(dtype).eps) * magnitude
        lost = k * tiny * (1 + values.double().abs().max()) + torch.finfo(dtype).tiny
        assert ((actual - expected).abs() <= bound + lost).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 40])
def test_columns_that_are_not_stored_are_not_read(isa, m, dtype, value):
    weight = torch.zeros(3, 8)
    weight[0, [1, 2]], weight[1, 2] = 1.0, 1.0  # row 1 stores a filling 0 in column 0
    weight[:, 7] = 2.0  # and every row one in column 4
    x = torch.ones(m, 8)
    x[:, 0] = value
    y = sparse24_linear(x.to(dtype), *pack_sparse24(weight.to(dtype)))
    assert y[:, 0].tolist() == [4.0] * m
    assert y[:, 1:].isnan().all()


@pytest.mark.parametrize("values_dtype", VALUES_DTYPES)
@pytest.mark.parametrize("m", [1, 3, 40])
def test_every_pair_of_positions(isa, m, values_dtype):
    """Row p holds the p-th pair in each group; x tells all columns apart."""
    weight = torch.zeros(6, 11, 4)
    for row, pair in zip(weight, itertools.combinations(range(4), 2), strict=True):
        row[:, pair[0]], row[:, pair[1]] = 1, -3
    weight = weight.view(6, 44).to(values_dtype)
    x = torch.randperm(44 * m)[: 44 * m].view(m, 44).float()
    if values_dtype == torch.int8:
        scale = {"weight_scale": torch.ones(6)}
        expected = int8_linear(x, pack_int8(weight), torch.ones(6))
    else:
        x = x.to(dtype_beside(isa, values_dtype))
        scale, expected = {}, (x.float() @ weight.float().T).to(x.dtype)  # integers below 2^24
    assert_same_bits(sparse24_linear(x, *pack_sparse24(weight), **scale), expected)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 1000), (5, 33, 130), (64, 20, 257)])
def test_int8_has_the_bits_of_int8_linear(isa, m, n, k):
    weight = _prune(torch.randint(-127, 128, (n, k), dtype=torch.int8))
    x, scale, bias = torch.randn(m, k), torch.rand(n), torch.randn(n)
    sparse = sparse24_linear(x, *pack_sparse24(weight), bias, weight_scale=scale)
    assert torch.equal(sparse, int8_linear(x, pack_int8(weight), scale, bias))


@pytest.mark.parametrize("values_dtype", VALUES_DTYPES)
@pytest.mark.parametrize("m", [1, 40])
def test_damaged_indices_stay_inside_their_group(isa, m, values_dtype):
    """Every nibble, ascending or not: what is read lies in the group, so the result is bounded."""
    (x, values, indices, _), scale = reference.example_inputs(
        m, 32, 1000, dtype_beside(isa, values_dtype), values_dtype
    )
    x = x.clamp(-1, 1)
    damaged = torch.randint(0, 256, indices.shape, dtype=torch.uint8)
    y = sparse24_linear(x, values, damaged, **scale)
    if isa == "cuda":
        return  # the instruction's own description leaves the number open
    limit = values.double().abs().sum(1) * scale.get("weight_scale", torch.ones(32)) * 1.01
    assert (y.double().abs() <= limit).all()


@pytest.mark.parametrize("values_dtype", VALUES_DTYPES)
def test_reads_nothing_beyond_its_inputs(isa, values_dtype):
    for m, n, k in ((1, 3, 31), (3, 5, 96), (7, 9, 33), (13, 17, 130), (70, 5, 1000)):
        possible = dtypes_beside(isa, values_dtype)
        dtype = torch.bfloat16 if torch.bfloat16 in possible else values_dtype
        args, scale = reference.example_inputs(m, n, k, dtype, values_dtype)
        guarded = [at_end_of_memory(t) for t in args]
        guarded_scale = {name: at_end_of_memory(t) for name, t in scale.items()}
        expected = sparse24_linear(*args, **scale)
        assert torch.equal(sparse24_linear(*guarded, **guarded_scale), expected)


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_layouts(isa, values_dtype):
    dtype = dtype_beside(isa, values_dtype)
    (x, *weight), scale = reference.example_inputs(6, 9, 50, dtype, values_dtype)
    expected = sparse24_linear(x, *weight, **scale)
    for other in non_contiguous(x):
        assert torch.equal(sparse24_linear(other, *weight, **scale), expected)
    values, indices, bias = weight
    strided = (values.T.contiguous().T, indices.T.contiguous().T, bias.repeat(2, 1).T[:, 0])
    assert torch.equal(sparse24_linear(x, *strided, **scale), expected)
    many = sparse24_linear(x.view(2, 1, 3, 50), *weight, **scale)
    assert torch.equal(many, expected.view(2, 1, 3, 9))
    one = sparse24_linear(x[0], *weight, **scale)
    assert_same_bits(one, sparse24_linear(x[:1], *weight, **scale)[0])


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1000, 600), (20, 300, 600), (200, 17, 1000)])
def test_number_of_threads_changes_nothing(isa, threads, values_dtype, m, n, k):
    dtype = dtype_beside(isa, values_dtype)
    args, scale = reference.example_inputs(m, n, k, dtype, values_dtype)
    threads(1)
    alone = sparse24_linear(*args, **scale)
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(sparse24_linear(*args, **scale), alone)


def test_zeros_of_the_weight():
    weight = torch.tensor([[-0.0, 1.0, -0.0, 2.0], [0.0, 0.0, 0.0, -0.0], [0.0, 0.0, 0.0, 3.0]])
    values, indices = pack_sparse24(weight)
    assert values[:, :2].tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 3.0]]
    assert not values[values == 0].signbit().any()
    assert (indices[:, 0] & 15).tolist() == [1 | 3 << 2, 0 | 1 << 2, 0 | 3 << 2]
    assert (indices[:, 1:] == 0x44).all()  # padding: positions 0 and 1


@st.composite
def weights(draw) -> Tensor:
    """2:4 matrices of every dtype, K not only in whole groups, few values so that zeros abound."""
    dtype = draw(st.sampled_from(VALUES_DTYPES))
    n, k = draw(st.integers(0, 4)), draw(st.integers(0, 75))
    some = [0.0, -0.0, 1.0, -127.0, 3.0]
    numbers = draw(st.lists(st.sampled_from(some), min_size=n * k, max_size=n * k))
    return _prune(torch.tensor(numbers).view(n, k)).to(dtype)


@given(weights())
@settings(max_examples=150, deadline=None)
def test_pack_against_loops(weight):
    values, indices = pack_sparse24(weight)
    n, k = weight.shape
    chunks = (k + 31) // 32
    assert values.shape == (n, 16 * chunks)
    assert indices.shape == (n, 4 * chunks)
    for row in range(n):
        for group in range(8 * chunks):
            columns = range(4 * group, 4 * group + 4)
            numbers = [weight[row, c].item() if c < k else 0.0 for c in columns]
            taken = [p for p in range(4) if numbers[p] != 0]
            for p in range(4):  # the lowest free positions fill up
                if len(taken) < 2 and p not in taken:
                    taken.append(p)
            first, second = sorted(taken)
            byte = indices[row, group // 2].item()
            assert (byte >> 4 if group % 2 else byte & 15) == first | second << 2
            stored = values[row, 2 * group : 2 * group + 2].tolist()
            assert stored == [numbers[first], numbers[second]]
    assert torch.equal(unpack_sparse24(values, indices, k), weight)


def _prune(weight: Tensor) -> Tensor:
    """Zeros in a random two of each four columns."""
    n, k = weight.shape
    drop = torch.rand(n, (k + 3) // 4, 4).argsort(2) < 2
    return weight.masked_fill(drop.flatten(1)[:, :k], 0)


def semi_structured(dense: Tensor) -> SparseSemiStructuredTensorCUTLASS:
    """As PyTorch compresses it on a GPU; this much of it runs anywhere."""
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    return SparseSemiStructuredTensorCUTLASS(dense.shape, packed, meta, None, None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_from_and_to_pytorchs_compressed_tensors(dtype, monkeypatch):
    weight = _prune(torch.randint(-9, 10, (32, 256))).to(dtype)  # with groups of one and none
    packed = pack_sparse24(weight)
    for actual, expected in zip(from_semi_structured(semi_structured(weight)), packed, strict=True):
        assert torch.equal(actual, expected)
    with pytest.raises(RuntimeError, match="Only CUDA tensors are currently supported"):
        to_semi_structured(*packed, 256)
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    monkeypatch.setattr(
        SparseSemiStructuredTensorCUTLASS, "_validate_device_dim_dtype_shape", lambda tensor: None
    )
    assert torch.equal(to_semi_structured(*packed, 256).to_dense(), weight)


def test_what_pytorch_does_not_compress():
    with pytest.raises(ValueError, match=r"takes a torch\.sparse\.SparseSemi.* got Tensor"):
        from_semi_structured(torch.zeros(32, 64))
    with pytest.raises(ValueError, match="keeps one of each two columns"):
        to_semi_structured(*pack_sparse24(torch.zeros(32, 64)), 64)


def test_a_layer_whose_weight_pytorch_compressed():
    dense = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    dense.weight.data = _prune(dense.weight.detach())
    expected = Sparse24Linear.from_linear(dense)
    dense.weight = torch.nn.Parameter(semi_structured(dense.weight.detach()))
    layer = Sparse24Linear.from_linear(dense)
    assert torch.equal(layer.values, expected.values)
    assert torch.equal(layer.indices, expected.indices)


def test_autocast():
    (x, *weight), scale = reference.example_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse24_linear(x, *weight, **scale)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, sparse24_linear(x.bfloat16(), *weight, **scale))


def test_inference_mode(isa):
    args, scale = reference.example_inputs(values_dtype=torch.int8)
    with torch.inference_mode():
        assert_matches_reference(*args, **scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values_dtype", VALUES_DTYPES)
def test_gradients(dtype, values_dtype):
    """Against the dense product in float64; int8 values give them straight through."""
    (x, values, indices, bias), scale = reference.example_inputs(5, 9, 37, dtype, values_dtype)
    weight = unpack_sparse24(values, indices, 37).double()
    weight *= scale.get("weight_scale", torch.ones(9))[:, None]
    x, bias, grad_y = x.requires_grad_(), bias.requires_grad_(), torch.randn(5, 9).to(dtype)
    sparse24_linear(x, values, indices, bias, **scale).backward(grad_y)

    exact_x, exact_bias = (t.detach().double().requires_grad_() for t in (x, bias))
    torch.nn.functional.linear(exact_x, weight, exact_bias).backward(grad_y.double())
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4e-6 * weight.abs().sum(0).max().item()}
    torch.testing.assert_close(x.grad.double(), exact_x.grad, **close)
    torch.testing.assert_close(bias.grad.double(), exact_bias.grad, **close)


def test_gradients_of_leading_dimensions():
    (x, *weight), _ = reference.example_inputs(6, 4, 20)
    x = x.view(2, 3, 20).requires_grad_()
    sparse24_linear(x, *weight).sum().backward()
    assert x.grad.shape == (2, 3, 20)


def test_the_weight_takes_no_gradient():
    (x, values, *rest), _ = reference.example_inputs()
    with pytest.raises(ValueError, match="train a dense weight and pack it afterwards"):
        sparse24_linear(x, values.requires_grad_(), *rest)
    with torch.no_grad():
        sparse24_linear(x, values, *rest)


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 37), torch.float32), ((2, 0, 37), torch.bfloat16), ((4, 2, 37), torch.float16)],
)
def test_opcheck(values_dtype, shape, dtype):
    (_, *weight), scale = reference.example_inputs(1, 9, 37, dtype, values_dtype)
    x = torch.randn(shape).to(dtype)
    torch.library.opcheck(torch.ops.trine.sparse24_linear.default, (x, *weight), scale)


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.int8])
def test_compile(values_dtype):
    (x, *weight), scale = reference.example_inputs(values_dtype=values_dtype)
    compiled = torch.compile(sparse24_linear, fullgraph=True)
    assert torch.equal(compiled(x, *weight, **scale), sparse24_linear(x, *weight, **scale))

    grads = []
    for call in (sparse24_linear, compiled):
        leaf = x.clone().requires_grad_()
        call(leaf, *weight, **scale).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_export():
    class Layer(torch.nn.Module):
        def __init__(self, weight, scale):
            super().__init__()
            for name, buffer in zip(("values", "indices", "bias"), weight, strict=True):
                self.register_buffer(name, buffer)
            self.register_buffer("weight_scale", scale.get("weight_scale"))

        def forward(self, x):
            return sparse24_linear(
                x, self.values, self.indices, self.bias, weight_scale=self.weight_scale
            )

    (x, *weight), scale = reference.example_inputs(values_dtype=torch.int8)
    layer = Layer(weight, scale)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    more = torch.randn(11, x.shape[1])
    assert torch.equal(program.module()(more), layer(more))


def test_errors():
    (x, values, indices, bias), _ = reference.example_inputs(3, 5, 37)
    q, scale = values.clamp(-9, 9).to(torch.int8), torch.ones(5)

    def fails(message, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            sparse24_linear(*args, **kwargs)

    fails("x has K = 65 columns, which needs values of 48", torch.ones(3, 65), values, indices)
    fails("x must be float32, bfloat16 or float16", x.double(), values, indices)
    fails("x must have at least one dimension", torch.tensor(1.0), values, indices)
    fails(r"values \(where not int8\) must be float32", x, values.double(), indices)
    fails(r"values must be \[N, 16", x, values[0], indices)
    fails("indices must be uint8", x, values, indices.int())
    fails(r"indices must be \[5, 8\]", x, values, indices[:, :4])
    fails(r"indices must be \[5, 8\]", x, values, indices[:4])
    fails(r"bias must have shape \[5\]", x, values, indices, bias[:4])
    fails("weight_scale goes with int8 values only", x, values, indices, weight_scale=scale)
    fails("int8 values need a weight_scale", x, q, indices)
    fails("weight_scale must be float32", x, q, indices, weight_scale=scale.double())
    fails(r"weight_scale must be \[5\]", x, q, indices, weight_scale=scale[:2])
    wide = 131072 + 32
    too_wide = (torch.zeros(1, wide // 2, dtype=torch.int8), torch.zeros(1, wide // 8).byte())
    fails("K = 131104 exceeds 131072", torch.ones(1, wide), *too_wide, weight_scale=scale[:1])


def test_errors_of_the_fake():
    (x, values, indices, _), _ = reference.example_inputs(3, 5, 37)
    with FakeTensorMode() as mode:
        x, values, indices = (mode.from_tensor(t) for t in (x, values, indices))
        with pytest.raises(ValueError, match="K = 37 columns, which does not fit values of 16"):
            sparse24_linear(x, values[:, :16], indices)
        with pytest.raises(ValueError, match="weight_scale goes with int8 values"):
            sparse24_linear(x, values.to(torch.int8), indices)


def test_errors_of_packing():
    weight = torch.zeros(3, 12)
    weight[2, 4:7] = 1.0
    with pytest.raises(ValueError, match="row 2 holds 3 in columns 4 to 7; prune the weight"):
        pack_sparse24(weight)
    with pytest.raises(ValueError, match=r"takes a float32.* got torch.float64 \[3, 12\]"):
        pack_sparse24(weight.double())
    with pytest.raises(ValueError, match=r"got torch.float32 \[12\]"):
        pack_sparse24(weight[0])
    with pytest.raises(ValueError, match="the weight holds -128"):
        pack_sparse24(torch.full((1, 1), -128, dtype=torch.int8))

    values, indices = pack_sparse24(torch.eye(3, 12))
    with pytest.raises(ValueError, match=r"K = 40 needs values \[N, 32\]"):
        unpack_sparse24(values, indices, 40)
    with pytest.raises(ValueError, match=r"and uint8 indices; got torch.float32 and torch.int32"):
        unpack_sparse24(values, indices.int(), 12)
    indices[1, 1] = 0x40 | (2 << 2 | 2)
    with pytest.raises(ValueError, match="row 1, group 2 are not ascending"):
        unpack_sparse24(values, indices, 12)
