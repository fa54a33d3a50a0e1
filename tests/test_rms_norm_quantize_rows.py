"""rms_norm_quantize_rows: every instruction set against the reference, and that against torch."""

import pytest
import torch
from linear_inputs import DTYPES, assert_same_bits, difficult_rows, non_contiguous
from memory_guard import at_end_of_memory
from torch import Tensor, nn
from trine.ops import rms_norm_quantize_rows
from trine.ops.rms_norm_quantize_rows import reference
from trine.ops.rms_norm_quantize_rows.reference import SUM_LANES, example_inputs


def assert_matches_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> None:
    actual = rms_norm_quantize_rows(x, weight, eps)
    expected = reference.rms_norm_quantize_rows(x, weight, eps)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


# Both sides of a vector, of a block of vectors, of a block of those, and of the lanes of the sum.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 7, 8, 16, 17, 63, 65, 255, 256, 257, 1000, 2560, 4097])
def test_matches_reference(isa, dtype, k):
    assert_matches_reference(*example_inputs(3, k, dtype))
    assert_matches_reference(*example_inputs(2, k, dtype, weight=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [SUM_LANES, SUM_LANES + 5, 3 * SUM_LANES - 17])
def test_long_rows(isa, dtype, k):
    assert_matches_reference(*example_inputs(2, k, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 16, 37, 130])
def test_difficult_rows(isa, dtype, k):
    for eps in (0.0, 1e-5):
        assert_matches_reference(difficult_rows(k, dtype), None, eps)
        assert_matches_reference(difficult_rows(k, dtype), torch.randn(k), eps)


def test_rows_without_a_norm(isa):
    """Squares that overflow make the norm infinite; NaN, infinity and 0 / 0 spoil their row."""
    zero, huge = torch.zeros(2, 40), torch.full((1, 40), 2e19)
    q, scale, total = rms_norm_quantize_rows(torch.cat([zero, huge]))
    assert (q.any().item(), scale.tolist(), total.tolist()) == (False, [0, 0, 0], [0, 0, 0])
    spoiled = torch.ones(2, 40)
    spoiled[0, 3], spoiled[1, 39] = torch.nan, torch.inf
    for x, eps in ((spoiled, 1e-5), (zero, 0.0)):
        q, scale, _ = rms_norm_quantize_rows(x, None, eps)
        assert not q.any()
        assert scale.isnan().all()
    weight = torch.ones(40)
    weight[0] = torch.inf
    assert rms_norm_quantize_rows(torch.ones(1, 40), weight)[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_dtypes_of_the_weight(isa, dtype, weight_dtype):
    x, weight, eps = example_inputs(3, 50, dtype)
    assert_matches_reference(x, weight.to(weight_dtype), eps)
    assert_matches_reference(x, weight.to(weight_dtype).repeat_interleave(2)[::2], eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_norm_of_torch(dtype):
    """Up to the order of its sum and the accuracy of its root: a few roundings in fp32, so one of
    the norm's dtype, and one of q where that meets a tie."""
    limit = 4 * torch.finfo(torch.float32).eps
    limit += torch.finfo(dtype).eps if dtype != torch.float32 else 0
    x, weight, _ = example_inputs(64, 2560, dtype)
    for norm in (nn.RMSNorm(2560, 1e-6), nn.RMSNorm(2560)):
        norm = norm.to(dtype)
        norm.weight.data = weight
        with torch.no_grad():
            normed = norm(x)
        ours = reference.rms_norm(x, weight, norm.eps or torch.finfo(dtype).eps)
        torch.testing.assert_close(ours, normed, rtol=limit, atol=0)
        q, scale, _ = rms_norm_quantize_rows(x, weight, norm.eps)
        expected_q, expected_scale, _ = torch.ops.trine.quantize_rows(normed)
        torch.testing.assert_close(scale, expected_scale, rtol=limit, atol=0)
        assert (q.int() - expected_q.int()).abs().max() <= 1


def test_sum_is_pairwise():
    """The definition in another way: by recursion, in the order of the halves."""

    def by_halves(values: list[Tensor]) -> Tensor:
        half = len(values) // 2
        return by_halves(values[:half]) + by_halves(values[half:]) if half else values[0]

    for k in (1, 5, 64, 100):
        rows = torch.randn(1, k)
        squares = torch.cat([rows[0] * rows[0], torch.zeros(128 - k)])
        assert reference.sum_of_squares(rows)[0] == by_halves(list(squares))
    rows = torch.randn(1, 2 * SUM_LANES + 3)
    truth = rows.double().square().sum()
    torch.testing.assert_close(reference.sum_of_squares(rows)[0].double(), truth, rtol=3e-7, atol=0)


def test_layouts(isa):
    x, weight, eps = example_inputs(6, 50)
    for other in non_contiguous(x):
        assert_matches_reference(other, weight, eps)
    assert_matches_reference(torch.randn(2, 3, 4, 5), torch.randn(5))
    assert_matches_reference(torch.randn(9))
    assert_matches_reference(torch.randn(0, 9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 8, 15, 17, 33])
def test_reads_nothing_beyond_its_input(isa, dtype, k):
    x, weight, eps = example_inputs(3, k, dtype)
    assert_matches_reference(at_end_of_memory(x), at_end_of_memory(weight.float()), eps)


def test_number_of_threads_changes_nothing(isa, threads):
    arguments = example_inputs(100, 1000, torch.bfloat16)
    threads(1)
    alone = rms_norm_quantize_rows(*arguments)
    threads(3)
    for a, b in zip(alone, rms_norm_quantize_rows(*arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors(device):
    x = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        rms_norm_quantize_rows(x.int())
    with pytest.raises(ValueError, match="at least one dimension"):
        rms_norm_quantize_rows(torch.tensor(1.0, device=device))
    for shape in ((4,), (1, 3), ()):
        with pytest.raises(ValueError, match=r"weight must have shape \[3\], one value per column"):
            rms_norm_quantize_rows(x, torch.ones(shape, device=device))
    with pytest.raises(ValueError, match="on one device"):
        rms_norm_quantize_rows(x.to("meta"), torch.ones(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    shape = dict(zip(DTYPES, [(3, 37), (2, 0, 5), (4, 2, 9)], strict=True))[dtype]
    op = torch.ops.trine.rms_norm_quantize_rows.default
    torch.library.opcheck(op, (torch.randn(shape).to(dtype), torch.randn(shape[-1]), 1e-5))
    torch.library.opcheck(op, (torch.randn(shape).to(dtype), None, 1e-5))


def test_compile():
    x, weight, _ = example_inputs(5, 33)
    compiled = torch.compile(rms_norm_quantize_rows, fullgraph=True)
    for a, b in zip(compiled(x, weight), rms_norm_quantize_rows(x, weight), strict=True):
        assert torch.equal(a, b)
