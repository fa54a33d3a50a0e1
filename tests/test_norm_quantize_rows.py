"""The norms that quantise rows: every instruction set against the reference, and that against
torch."""

import pytest
import torch
from linear_inputs import DTYPES, assert_same_bits, difficult_rows, non_contiguous
from memory_guard import at_end_of_memory
from torch import Tensor, nn
from trine import ops
from trine.ops.norm_quantize_rows import reference
from trine.ops.norm_quantize_rows.reference import SUM_LANES, example_inputs

NORMS = ("rms", "layer")
each_norm = pytest.mark.parametrize("norm", NORMS)


def norm_quantize_rows(norm: str, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    return getattr(ops, f"{norm}_norm_quantize_rows")(*arguments)


def assert_matches_reference(norm: str, *arguments) -> None:
    actual = norm_quantize_rows(norm, *arguments)
    expected = getattr(reference, f"{norm}_norm_quantize_rows")(*arguments)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


def parameters(norm: str, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1 if norm == "rms" else 2, k).to(dtype))


# Both sides of a vector, of a block of vectors, of a block of those, and of the lanes of the sum.
@each_norm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 7, 8, 16, 17, 63, 65, 255, 256, 257, 1000, 2560, 4097])
def test_matches_reference(isa, norm, dtype, k):
    assert_matches_reference(norm, *example_inputs(norm, 3, k, dtype))
    assert_matches_reference(norm, *example_inputs(norm, 2, k, dtype, weight=False))


@each_norm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [SUM_LANES, SUM_LANES + 5, 3 * SUM_LANES - 17])
def test_long_rows(isa, norm, dtype, k):
    assert_matches_reference(norm, *example_inputs(norm, 2, k, dtype))


@each_norm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 16, 37, 130])
def test_difficult_rows(isa, norm, dtype, k):
    given = parameters(norm, k)
    for eps in (0.0, 1e-5):
        assert_matches_reference(norm, difficult_rows(k, dtype), *(None for _ in given), eps)
        assert_matches_reference(norm, difficult_rows(k, dtype), *given, eps)


def test_rows_without_an_rms_norm(isa):
    """Squares that overflow make the norm infinite; NaN, infinity and 0 / 0 spoil their row."""
    zero, huge = torch.zeros(2, 40), torch.full((1, 40), 2e19)
    q, scale, total = norm_quantize_rows("rms", torch.cat([zero, huge]))
    assert (q.any().item(), scale.tolist(), total.tolist()) == (False, [0, 0, 0], [0, 0, 0])
    assert_spoiled("rms", zero, None, 0.0)
    weight = torch.ones(40)
    weight[0] = torch.inf
    assert_spoiled("rms", torch.ones(1, 40), weight)


def assert_spoiled(norm: str, x: Tensor, *arguments) -> None:
    q, scale, _ = norm_quantize_rows(norm, x, *arguments)
    assert not q.any()
    assert scale.isnan().all()


@each_norm
def test_nan_and_infinity_spoil_their_row(isa, norm):
    x = torch.randn(4, 40)
    x[0, 3], x[2, 39] = torch.nan, -torch.inf
    q, scale, total = norm_quantize_rows(norm, x, *parameters(norm, 40))
    assert scale.isnan().tolist() == [True, False, True, False]
    assert not q[::2].any()
    assert q[1::2].any(1).all()
    assert total[::2].tolist() == [0, 0]


@pytest.mark.parametrize("k", [1, 7, 40, 768, SUM_LANES + 5])
def test_constant_rows_give_the_bias(isa, k):
    """Their variance is 0, but for the rounding of the mean, a few units of its last place."""
    weight, bias = torch.randn(k), torch.randn(k)
    x = torch.tensor([0.0, 0.5, -3.0, 0.1, 1000.3])[:, None].expand(5, k).contiguous()
    assert_matches_reference("layer", x, weight, bias, 1e-5)
    q, scale, _ = norm_quantize_rows("layer", x, weight, bias, 1e-5)
    expected_q, expected_scale, _ = ops.quantize_rows(bias.expand(5, k).contiguous())
    limit = 4 * x.abs().amax(1) * torch.finfo(torch.float32).eps / 1e-5**0.5 * weight.abs().max()
    error = (q * scale[:, None] - expected_q * expected_scale[:, None]).abs().amax(1)
    assert (error <= limit + expected_scale * (1 + 1e-5)).all()
    assert (q[:2] == expected_q[:2]).all()  # sums without a rounding
    if k == 1:
        assert (q == expected_q).all()
    assert_spoiled("layer", x[:1], weight, bias, 0.0)  # 0 / 0


def test_differences_that_overflow(isa):
    """Their squares: r is 0, which leaves the bias. Their sum: there is no mean."""
    bias = torch.randn(40)
    squares, total = torch.zeros(2, 2, 40)
    squares[:, ::2], total[:] = 1e20, 1e38
    q, *_ = norm_quantize_rows("layer", squares, None, bias)
    assert_same_bits(q, ops.quantize_rows(bias.expand(2, 40).contiguous())[0])
    assert_spoiled("layer", total, None, bias)


@each_norm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_dtypes_of_the_parameters(isa, norm, dtype, weight_dtype):
    x, *rest, eps = example_inputs(norm, 3, 50, dtype)
    rest = [values.to(weight_dtype) for values in rest]
    assert_matches_reference(norm, x, *rest, eps)
    assert_matches_reference(norm, x, *(v.repeat_interleave(2)[::2] for v in rest), eps)
    if norm == "layer":
        assert_matches_reference(norm, x, rest[0].float(), rest[1], eps)
        assert_matches_reference(norm, x, None, rest[1], eps)
        assert_matches_reference(norm, x, rest[0], None, eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_rms_norm_of_torch(dtype):
    """Up to the order of its sum and the accuracy of its root: a few roundings in fp32, so one of
    the norm's dtype, and one of q where that meets a tie."""
    limit = 4 * torch.finfo(torch.float32).eps
    limit += torch.finfo(dtype).eps if dtype != torch.float32 else 0
    x, weight, _ = example_inputs("rms", 64, 2560, dtype)
    for norm in (nn.RMSNorm(2560, 1e-6), nn.RMSNorm(2560)):
        norm = norm.to(dtype)
        norm.weight.data = weight
        with torch.no_grad():
            normed = norm(x)
        ours = reference.rms_norm(x, weight, norm.eps or torch.finfo(dtype).eps)
        torch.testing.assert_close(ours, normed, rtol=limit, atol=0)
        assert_quantised("rms", normed, limit, x, weight, norm.eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_layer_norm_of_torch(dtype):
    """Relative to the largest number that either adds, for torch takes x * r - mean * r."""
    limit = 8 * torch.finfo(torch.float32).eps
    limit += torch.finfo(dtype).eps if dtype != torch.float32 else 0
    x, weight, bias, eps = example_inputs("layer", 64, 2560, dtype)
    with torch.no_grad():
        normed = nn.functional.layer_norm(x, (2560,), weight, bias, eps)
    ours = reference.layer_norm(x, weight, bias, eps)
    largest = 12 * limit  # of any |x| * r * weight here
    torch.testing.assert_close(ours, normed, rtol=limit, atol=largest)
    assert_quantised("layer", normed, limit, x, weight, bias, eps)


def assert_quantised(norm: str, normed: Tensor, limit: float, *arguments) -> None:
    q, scale, _ = norm_quantize_rows(norm, *arguments)
    expected_q, expected_scale, _ = ops.quantize_rows(normed)
    torch.testing.assert_close(scale, expected_scale, rtol=2 * limit, atol=0)
    assert (q.int() - expected_q.int()).abs().max() <= 1


@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_layer_norm_in_float64(offset):
    """The formula by hand: mean, then the variance of the differences, which do not cancel."""
    x = torch.randn(16, 768) + offset
    weight, bias = torch.randn(2, 768)
    d = x.double() - x.double().mean(1, keepdim=True)
    root = (d.square().mean(1, keepdim=True) + 1e-5).sqrt()
    truth = d / root * weight.double() + bias.double()
    # Of the mean's last place, which is all that a mean far from 0 costs.
    limit = torch.finfo(torch.float32).eps * (4 + 2 * offset) * weight.abs().max()
    assert (reference.layer_norm(x, weight, bias, 1e-5) - truth).abs().max() < 2 * limit


def test_rms_norm_in_float64():
    x, weight = torch.randn(16, 768) * 3, torch.randn(768)
    root = (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
    truth = x.double() / root * weight.double()
    limit = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        reference.rms_norm(x, weight, 1e-5).double(), truth, rtol=limit, atol=0
    )


def test_sum_is_pairwise():
    """The definition in another way: by recursion, in the order of the halves."""

    def by_halves(values: list[Tensor]) -> Tensor:
        half = len(values) // 2
        return by_halves(values[:half]) + by_halves(values[half:]) if half else values[0]

    for k in (1, 5, 64, 100):
        rows = torch.randn(1, k)
        assert reference.sum_pairwise(rows)[0] == by_halves(
            list(torch.cat([rows[0], torch.zeros(128 - k)]))
        )
    rows = torch.rand(1, 2 * SUM_LANES + 3)
    actual = reference.sum_pairwise(rows)[0].double()
    torch.testing.assert_close(actual, rows.double().sum(), rtol=3e-7, atol=0)


@each_norm
def test_layouts(isa, norm):
    x, *rest = example_inputs(norm, 6, 50)
    for other in non_contiguous(x):
        assert_matches_reference(norm, other, *rest)
    eps = 1e-5
    assert_matches_reference(norm, torch.randn(2, 3, 4, 5), *parameters(norm, 5), eps)
    none = (None,) * len(parameters(norm, 1))
    assert_matches_reference(norm, torch.randn(9), *none, eps)
    assert_matches_reference(norm, torch.randn(0, 9), *none, eps)


@each_norm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 8, 15, 17, 33])
def test_reads_nothing_beyond_its_input(isa, norm, dtype, k):
    x, *rest, eps = example_inputs(norm, 3, k, dtype)
    rest = [at_end_of_memory(values.float()) for values in rest]
    assert_matches_reference(norm, at_end_of_memory(x), *rest, eps)


@each_norm
def test_number_of_threads_changes_nothing(isa, norm, threads):
    arguments = example_inputs(norm, 100, 1000, torch.bfloat16)
    threads(1)
    alone = norm_quantize_rows(norm, *arguments)
    threads(3)
    for a, b in zip(alone, norm_quantize_rows(norm, *arguments), strict=True):
        assert torch.equal(a, b)


@each_norm
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors(norm, device):
    x = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        norm_quantize_rows(norm, x.int())
    with pytest.raises(ValueError, match="at least one dimension"):
        norm_quantize_rows(norm, torch.tensor(1.0, device=device))
    good = torch.ones(3, device=device)
    for shape in ((4,), (1, 3), ()):
        bad = torch.ones(shape, device=device)
        with pytest.raises(ValueError, match=r"weight must have shape \[3\], one value per column"):
            norm_quantize_rows(norm, x, bad)
        if norm == "layer":
            with pytest.raises(ValueError, match=r"bias must have shape \[3\], one value per col"):
                norm_quantize_rows(norm, x, good, bad)
    with pytest.raises(ValueError, match="on one device"):
        norm_quantize_rows(norm, x.to("meta"), torch.ones(3))


@each_norm
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(norm, dtype):
    shape = dict(zip(DTYPES, [(3, 37), (2, 0, 5), (4, 2, 9)], strict=True))[dtype]
    op = getattr(torch.ops.trine, f"{norm}_norm_quantize_rows").default
    given = parameters(norm, shape[-1])
    for rest in (given, (None for _ in given)):
        torch.library.opcheck(op, (torch.randn(shape).to(dtype), *rest, 1e-5))


@each_norm
def test_compile(norm):
    x, *rest, _ = example_inputs(norm, 5, 33)
    op = getattr(ops, f"{norm}_norm_quantize_rows")
    compiled = torch.compile(op, fullgraph=True)
    for a, b in zip(compiled(x, *rest), op(x, *rest), strict=True):
        assert torch.equal(a, b)
