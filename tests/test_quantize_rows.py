"""quantize_rows: every instruction set against the reference."""

import pytest
import torch
from linear_inputs import DTYPES, assert_same_bits, difficult_rows, non_contiguous
from memory_guard import at_end_of_memory
from trine.ops import quantize_rows
from trine.ops.quantize_rows import reference


def assert_matches_reference(x: torch.Tensor) -> None:
    for actual, expected in zip(quantize_rows(x), reference.quantize_rows(x), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k"),
    [(1, 1), (1, 15), (2, 16), (3, 17), (5, 63), (5, 64), (4, 65), (2, 1000), (0, 8), (3, 0)],
)
def test_matches_reference(isa, dtype, m, k):
    assert_matches_reference(torch.randn(m, k).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 16, 37, 130])
def test_difficult_rows(isa, dtype, k):
    assert_matches_reference(difficult_rows(k, dtype))


def test_rounds_half_to_even(isa):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    q, scale, total = quantize_rows(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    assert scale.tolist() == [1.0]
    assert total.tolist() == [253]


def test_smallest_absmax(isa):
    below, at = 2.0**-121, 2.0**-120
    q, scale, _ = quantize_rows(torch.tensor([[below, -below], [at, -at]]))
    assert q.tolist() == [[0, 0], [127, -127]]
    assert scale.tolist() == [0.0, (torch.tensor(at) / 127).item()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_16_bit_types(isa, dtype):
    """One row per value, so that widening itself is compared, subnormals and NaN included."""
    if dtype == torch.float32:
        patterns = torch.randint(-(2**31), 2**31, (4096, 1)).to(torch.int32)
    else:
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16)[:, None]
    assert_matches_reference(patterns.view(dtype))


def test_layouts(isa):
    x = torch.randn(6, 50)
    for other in non_contiguous(x):
        assert_matches_reference(other)
    assert_matches_reference(torch.randn(2, 3, 4, 5))
    assert_matches_reference(torch.randn(9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 8, 15, 17, 33])
def test_reads_nothing_beyond_its_input(isa, dtype, k):
    assert_matches_reference(at_end_of_memory(torch.randn(3, k).to(dtype)))


def test_number_of_threads_changes_nothing(isa, threads):
    x = torch.randn(300, 1000)
    threads(1)
    alone = quantize_rows(x)
    threads(3)
    for a, b in zip(alone, quantize_rows(x), strict=True):
        assert torch.equal(a, b)


def test_errors():
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        quantize_rows(torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="at least one dimension"):
        quantize_rows(torch.tensor(1.0))
    # Expanded from one value: the check comes before anything of this size is allocated.
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match="K = 16909321 exceeds 16909320"):
            quantize_rows(torch.zeros(1, device=device).expand(2**20, 16909321))
    with pytest.raises(ValueError, match=r"all tensors must be dense, one is .*sparse_coo"):
        quantize_rows(torch.zeros(2, 2).to_sparse())


def test_flush_to_zero_mode_keeps_16_bit_subnormals(isa):
    x = (torch.randn(4, 40) * 1e-6).half()
    expected = reference.quantize_rows(x)
    torch.set_flush_denormal(True)
    try:
        actual = quantize_rows(x)
    finally:
        torch.set_flush_denormal(False)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 37), (2, 0, 5), (4, 2, 9)])
def test_opcheck(dtype, shape):
    torch.library.opcheck(torch.ops.trine.quantize_rows.default, (torch.randn(shape).to(dtype),))


def test_compile_and_export():
    x = torch.randn(5, 33)
    compiled = torch.compile(quantize_rows, fullgraph=True)
    for a, b in zip(compiled(x), quantize_rows(x), strict=True):
        assert torch.equal(a, b)
