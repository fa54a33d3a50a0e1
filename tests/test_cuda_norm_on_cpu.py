"""The CUDA kernel of norm_quantize_rows, run on the CPU; what quantize_rows has in common with it
is tried in test_cuda_on_cpu.py."""

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from cuda_kernels import Mutant
from cuda_trials import Trial, assert_caught, outcomes
from linear_inputs import DTYPES, difficult_rows
from test_cuda_on_cpu import SEEDS, QuantizeRowsCase, padded
from torch import Tensor
from trine.ops.norm_quantize_rows import reference
from trine.ops.norm_quantize_rows.reference import SUM_LANES, example_inputs


@dataclass(frozen=True)
class NormCase(QuantizeRowsCase):
    norm: str = "rms"
    parameters: tuple[Tensor | None, ...] = ()  # the weight and LayerNorm's bias, x's dtype or fp32
    eps: float = 1e-5
    alignments: tuple[int, int] = (16, 16)  # of the parameters

    def encode(self) -> bytes:
        (eps_bits,) = struct.unpack("<I", struct.pack("<f", self.eps))
        header, values = struct.pack("<2q", self.norm == "layer", eps_bits), b""
        for tensor, alignment in zip((*self.parameters, None)[:2], self.alignments, strict=True):
            raw = b"" if tensor is None else tensor.view(torch.uint8).numpy().tobytes()
            if alignment < 16:  # memory ends at a multiple of 16: it begins at none
                raw += bytes(alignment)
            is_float = tensor is not None and tensor.dtype == torch.float32
            header += struct.pack("<3q", is_float, alignment, len(raw))
            values += raw
        return header + super().encode() + values

    @functools.cached_property
    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        op = getattr(reference, f"{self.norm}_norm_quantize_rows")
        return op(self.x, *self.parameters, self.eps)


def norm_cases(norm: str) -> list[NormCase]:
    torch.manual_seed(0)
    cases = []
    none = (None,) if norm == "rms" else (None, None)

    def add(x: Tensor, parameters: Sequence[Tensor | None] = none, **about) -> None:
        cases.append(NormCase(x, norm=norm, parameters=tuple(parameters), **about))

    for dtype in DTYPES:
        values = 16 // dtype.itemsize  # in a chunk
        # Each number of threads per row, whole chunks (wide accesses) and not; the longest rows
        # have values that meet, in one thread or in a lane of the sum.
        for threads, m in ((8, 3), (32, 3), (128, 2)):
            full = threads * 4 * values
            for k in (full - 1, full):
                x, *rest, eps = example_inputs(norm, m, k, dtype)
                add(x, rest, eps=eps)
        for k in (SUM_LANES, SUM_LANES + 8, 3 * SUM_LANES + 3):
            x, *rest, _ = example_inputs(norm, 1, k, dtype)
            add(x, rest)
        for k in (1, 3, 8, 17, 64, 100, 256, 1000):
            x, *rest, _ = example_inputs(norm, 3, k, dtype)
            add(x, rest)
            add(x, [one.float() for one in rest])
            add(x)
        for k in (1, 37, 130):
            given = torch.randn(len(none), k)
            for eps in (0.0, 1e-5):
                add(difficult_rows(k, dtype), given, eps=eps)
        for m in (0, 1, 16, 33):
            add(torch.randn(m, 24).to(dtype), torch.ones(len(none), 24, dtype=dtype))
        add(torch.empty(3, 0, dtype=dtype))
        # Whole chunks in a row, but addresses that forbid wide accesses.
        x, *rest, _ = example_inputs(norm, 3, 72, dtype)
        for alignment in (4, 8):
            add(x, rest, alignment=alignment)
            add(x, rest, alignments=(alignment, 16))
            if norm == "layer":
                add(x, rest, alignments=(16, alignment))
                add(x, (rest[0].float(), rest[1]))
            add(padded(x, alignment), rest)
    # Sums of two values, which are added in one thread.
    sparse = torch.zeros(12, SUM_LANES + 8)
    sparse[:, 0], sparse[:, SUM_LANES] = torch.randn(12), torch.randn(12)
    add(sparse, eps=0.0)
    # A root and a reciprocal that must each be rounded, and only once.
    add(torch.rand(64, 40) * 10.0 ** torch.arange(-16, 16).repeat(2)[:, None], eps=0.0)
    return cases


@functools.cache
def cases() -> list[NormCase]:
    """Small ones first: most bugs show there."""
    both = [*norm_cases("rms"), *norm_cases("layer")]
    return sorted(both, key=lambda case: case.x.numel())


@pytest.fixture(scope="module")
def outcome(request):
    yield from outcomes(request, lambda _: cases())


@pytest.mark.parametrize("trial", [Trial("norm_quantize_rows", seeds=SEEDS[1:])], ids=str)
def test_matches_reference(trial, outcome):
    outcome(trial)


KERNEL = "norm_quantize_rows/cuda.cu"
MUTANTS = (
    Mutant("missing barrier", KERNEL, "    __syncthreads();\n", ""),
    Mutant(
        "shared array too short",
        KERNEL,
        "sums_of_squares, kWarpSums);",
        "sums_of_squares, (kWarpSums + 1) / 2);",
        "outside of a shared array|a shared array .* was overrun",
    ),
    Mutant("one shared array for two sums", KERNEL, "held, sums_of_squares,", "held, sums_of_x,"),
    Mutant("sums of one warp alone", KERNEL, "[i * kWarps + lane % kWarps]", "[i * kWarps]"),
    Mutant("far lanes first", KERNEL, "value, step);", "value, kLanes / 2 / step);"),
    Mutant(
        "halves of a chunk first",
        KERNEL,
        "values[2 * i] + values[2 * i + 1]",
        "values[i] + values[i + left]",
    ),
    Mutant("values that meet overwrite", KERNEL, "kRowThreads, i < kSums)", "kRowThreads, true)"),
    Mutant(
        "values of long rows left out",
        KERNEL,
        "if constexpr (Share::kMayBeLonger)\n",
        "if constexpr (false)\n",
    ),
    Mutant(
        "long rows' chunks by the wrong number",
        KERNEL,
        "share.load(at), at, false)",
        "share.load(at), at + kRowThreads, false)",
    ),
    Mutant(
        "a product and a sum in one rounding",
        KERNEL,
        "(centred(chunk, i) * r) * parameter[i]",
        "__builtin_fmaf(value_of(chunk, i), r, -centre * r) * parameter[i]",
    ),
    Mutant(
        "root that rounds twice",
        KERNEL,
        "1.0f / sqrtf(mean + norm.eps)",
        "sqrtf(1.0f / (mean + norm.eps))",
    ),
    Mutant(
        "mean by a reciprocal",
        KERNEL,
        "square) / float(problem.k)",
        "square) * (1.0f / float(problem.k))",
    ),
    Mutant("no centre", KERNEL, "value_of(chunk, j) - centre", "value_of(chunk, j)"),
    Mutant(
        "differences behind the row",
        KERNEL,
        "return is_missing(c, j) ? 0.0f : value * value;",
        "return value * value;",
    ),
    Mutant(
        "chunks of nobody counted",
        KERNEL,
        "kWide ? c >= share.chunks :",
        "kWide ? false :",
    ),
    Mutant(
        "largest value behind the row",
        KERNEL,
        "normed[i] = is_missing(c, i) ? 0.0f : normed[i]",
        "normed[i] = normed[i]",
    ),
    Mutant(
        "no rounding of the norm",
        KERNEL,
        "(centred(chunk, i) * r) * parameter[i]",
        "centred(chunk, i) * (r * parameter[i])",
    ),
    Mutant("eps left out", KERNEL, "mean + norm.eps", "mean"),
    Mutant("bias left out", KERNEL, "normed[i] + parameter[i]", "normed[i]"),
    Mutant("weight taken for bias", KERNEL, "(norm.bias, 0.0f", "(norm.weight, 0.0f"),
    Mutant("parameters of another chunk", KERNEL, "c * kParts + part", "c * kParts"),
    Mutant(
        "parameters read without a mask",
        KERNEL,
        "load_chunk<W, kWide>(from, k,",
        "load_chunk<W, kWide>(from, k + kChunkValues<T>,",
        "outside of the (weight|bias)",
    ),
    Mutant(
        "alignment of the weight ignored",
        KERNEL,
        "is_aligned(norm.weight) && ",
        "",
        "not aligned to its size",
    ),
    Mutant(
        "alignment of the bias ignored",
        KERNEL,
        " && is_aligned(norm.bias)",
        "",
        "not aligned to its size",
    ),
    Mutant(
        "norm of long rows left out",
        KERNEL,
        "return normalize(share.load(c), c);",
        "return share.load(c);",
    ),
)


@pytest.mark.parametrize("trial", [Trial("norm_quantize_rows", m) for m in MUTANTS], ids=str)
def test_planted_bug_is_caught(trial, outcome):
    assert_caught(trial, outcome)
