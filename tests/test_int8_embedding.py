"""int8_embedding: every instruction set against the reference, and that against float64."""

import pytest
import torch
from linear_inputs import DTYPES, assert_same_bits
from memory_guard import at_end_of_memory
from trine.ops import int8_embedding, pack_int8
from trine.ops.int8_embedding import reference
from trine.ops.int8_embedding.reference import example_inputs


def assert_matches_reference(*arguments) -> None:
    assert_same_bits(int8_embedding(*arguments), reference.int8_embedding(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [0, 1, 7, 8, 15, 16, 17, 37, 64, 100])
def test_matches_reference(isa, dtype, d):
    for shape in ((5,), (2, 3), (), (0,), (2, 0, 3)):
        for index_dtype in (torch.int64, torch.int32):
            assert_matches_reference(*example_inputs(shape, 7, d, dtype, index_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_and_scales_of_all_sizes(isa, dtype):
    codes = torch.arange(-127, 129).clamp(max=127).to(torch.int8).repeat(7, 1)
    scale = torch.tensor([1.0, 1 / 3, 1e-7, 1e5, 0.0, torch.inf, torch.nan])
    assert_matches_reference(torch.arange(7), codes, scale, 250, dtype)


def test_against_float64(isa):
    """Products of a code and a scale have 31 bits: in float64 they are exact."""
    codes = torch.randint(-127, 128, (50, 33), dtype=torch.int8)
    scale, indices = torch.rand(50) / 100, torch.randint(50, (4, 9))
    y = int8_embedding(indices, pack_int8(codes), scale, 33)
    assert torch.equal(y, (codes.double() * scale.double()[:, None])[indices].float())


def test_layouts(isa):
    indices, weight, scale, *rest = example_inputs((6, 4), 9, 37)
    every_second = torch.stack([scale, torch.full_like(scale, torch.nan)], 1).flatten()[::2]
    wide = torch.full((9, 60), 99, dtype=torch.int8)
    wide[:, :48] = weight
    for at in (indices.T, indices[:, ::2], indices[::2, 1:]):
        for codes in (weight, wide[:, :48], weight.T.contiguous().T):
            assert_matches_reference(at, codes, every_second, *rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 16, 33])
def test_reads_nothing_beyond_its_input(isa, dtype, d):
    _, *table, d, dtype = example_inputs((1,), 3, d, dtype)
    for index_dtype in (torch.int64, torch.int32):
        indices = at_end_of_memory(torch.tensor([0, 2, 2, 1], dtype=index_dtype))
        assert_matches_reference(indices, *map(at_end_of_memory, table), d, dtype)


def test_number_of_threads_changes_nothing(isa, threads):
    arguments = example_inputs((500,), 40, 300, torch.bfloat16)
    for count in (1, 3):
        threads(count)
        assert_matches_reference(*arguments)


@pytest.mark.parametrize("index", [-1, 7, 2**40, -(2**62)])
def test_index_beyond_the_table(index):
    indices, *rest = example_inputs((2, 300))
    indices[1, 17] = index
    with pytest.raises(IndexError, match=rf"^int8_embedding: indices .* \[0, 7\), one is {index}$"):
        int8_embedding(indices, *rest)
    with pytest.raises(IndexError, match=r"\[0, 0\)"):
        int8_embedding(torch.tensor([0]), torch.empty(0, 16, dtype=torch.int8), torch.ones(0), 9)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors(device):
    indices, weight, scale, d, dtype = example_inputs()
    indices, weight, scale = indices.to(device), weight.to(device), scale.to(device)
    for arguments, message in (
        ((indices.float(), weight, scale, d, dtype), "indices must be int64 or int32"),
        ((indices, weight.float(), scale, d, dtype), "packed_weight must be int8"),
        ((indices, weight, scale.half(), d, dtype), "weight_scale must be float32"),
        ((indices, weight, scale, 49, dtype), r"embedding_dim = 49 needs a .*\[V, 64\]"),
        ((indices, weight, scale, -3, dtype), "embedding_dim = -3 needs"),
        ((indices, weight[0], scale, d, dtype), r"needs a packed_weight \[V, 48\]"),
        ((indices, weight, scale[1:], d, dtype), r"weight_scale must be \[7\]"),
        ((indices, weight, scale, d, torch.float64), "dtype must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(ValueError, match=message):
            int8_embedding(*arguments)
    with pytest.raises(ValueError, match="gives no gradient to its scales"):
        int8_embedding(indices, weight, scale.requires_grad_(), d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)])
def test_opcheck(dtype, shape):
    op = torch.ops.trine.int8_embedding.default
    torch.library.opcheck(op, example_inputs(shape, dtype=dtype))


def test_compile_and_export():
    indices, *rest = example_inputs((4, 5))
    compiled = torch.compile(lambda at: int8_embedding(at, *rest), fullgraph=True)
    assert torch.equal(compiled(indices), int8_embedding(indices, *rest))

    class Table(torch.nn.Module):
        def forward(self, at):
            return int8_embedding(at, *rest)

    exported = torch.export.export(Table(), (indices,)).module()
    assert torch.equal(exported(indices), int8_embedding(indices, *rest))
