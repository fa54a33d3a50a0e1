"""The CUDA kernel of rms_norm_quantize_rows, run on the CPU; what quantize_rows has in common with
it is tried in test_cuda_on_cpu.py."""

import functools
import struct
from dataclasses import dataclass

import pytest
import torch
from cuda_kernels import Mutant
from cuda_trials import Trial, assert_caught, outcomes
from linear_inputs import DTYPES, difficult_rows
from test_cuda_on_cpu import SEEDS, QuantizeRowsCase, padded
from torch import Tensor
from trine.ops.rms_norm_quantize_rows import reference
from trine.ops.rms_norm_quantize_rows.reference import SUM_LANES, example_inputs


@dataclass(frozen=True)
class NormCase(QuantizeRowsCase):
    weight: Tensor | None = None  # in x's dtype or float32
    eps: float = 1e-5
    weight_alignment: int = 16

    def encode(self) -> bytes:
        raw = b"" if self.weight is None else self.weight.view(torch.uint8).numpy().tobytes()
        if self.weight_alignment < 16:
            raw += bytes(
                self.weight_alignment
            )  # memory ends at a multiple of 16: it begins at none
        is_float = self.weight is not None and self.weight.dtype == torch.float32
        (eps_bits,) = struct.unpack("<I", struct.pack("<f", self.eps))
        header = struct.pack("<4q", eps_bits, is_float, self.weight_alignment, len(raw))
        return header + super().encode() + raw

    @functools.cached_property
    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        return reference.rms_norm_quantize_rows(self.x, self.weight, self.eps)


def norm_cases() -> list[NormCase]:
    torch.manual_seed(0)
    cases = []

    def add(x: Tensor, weight: Tensor | None, **about) -> None:
        cases.append(NormCase(x, weight=weight, **about))

    for dtype in DTYPES:
        values = 16 // dtype.itemsize  # in a chunk
        # Each number of threads per row, whole chunks (wide accesses) and not; the longest rows
        # have squares that meet, in one thread or in a lane of the sum.
        for threads, m in ((8, 3), (32, 3), (128, 2)):
            full = threads * 4 * values
            for k in (full - 1, full):
                x, weight, eps = example_inputs(m, k, dtype)
                add(x, weight, eps=eps)
        for k in (SUM_LANES, SUM_LANES + 8, 3 * SUM_LANES + 3):
            x, weight, _ = example_inputs(1, k, dtype)
            add(x, weight)
        for k in (1, 3, 8, 17, 64, 100, 256, 1000):
            x, weight, _ = example_inputs(3, k, dtype)
            add(x, weight)
            add(x, weight.float())
            add(x, None)
        for k in (1, 37, 130):
            for eps in (0.0, 1e-5):
                add(difficult_rows(k, dtype), torch.randn(k), eps=eps)
        for m in (0, 1, 16, 33):
            add(torch.randn(m, 24).to(dtype), torch.ones(24, dtype=dtype))
        add(torch.empty(3, 0, dtype=dtype), None)
        # Whole chunks in a row, but addresses that forbid wide accesses.
        x, weight, _ = example_inputs(3, 72, dtype)
        for alignment in (4, 8):
            add(x, weight, alignment=alignment)
            add(x, weight, weight_alignment=alignment)
            add(padded(x, alignment), weight)
    # Sums of two squares, which are added in one thread.
    sparse = torch.zeros(12, SUM_LANES + 8)
    sparse[:, 0], sparse[:, SUM_LANES] = torch.randn(12), torch.randn(12)
    add(sparse, None, eps=0.0)
    # A root and a reciprocal that must each be rounded, and only once.
    add(torch.rand(64, 40) * 10.0 ** torch.arange(-16, 16).repeat(2)[:, None], None, eps=0.0)
    return cases


@functools.cache
def cases() -> list[NormCase]:
    """Small ones first: most bugs show there."""
    return sorted(norm_cases(), key=lambda case: case.x.numel())


@pytest.fixture(scope="module")
def outcome(request):
    yield from outcomes(request, lambda _: cases())


@pytest.mark.parametrize("trial", [Trial("rms_norm_quantize_rows", seeds=SEEDS[1:])], ids=str)
def test_matches_reference(trial, outcome):
    outcome(trial)


KERNEL = "rms_norm_quantize_rows/cuda.cu"
MUTANTS = (
    Mutant("missing barrier", KERNEL, "    __syncthreads();\n", ""),
    Mutant(
        "shared array too short",
        KERNEL,
        "warp_sums, kWarpSums",
        "warp_sums, (kWarpSums + 1) / 2",
        "outside of a shared array|a shared array .* was overrun",
    ),
    Mutant("sums of one warp alone", KERNEL, "[i * kWarps + lane % kWarps]", "[i * kWarps]"),
    Mutant("far lanes first", KERNEL, "value, step);", "value, kLanes / 2 / step);"),
    Mutant(
        "halves of a chunk first",
        KERNEL,
        "values[2 * i] + values[2 * i + 1]",
        "values[i] + values[i + left]",
    ),
    Mutant("squares that meet overwrite", KERNEL, "i < kSums);", "true);"),
    Mutant(
        "squares of long rows left out",
        KERNEL,
        "if constexpr (Share::kMayBeLonger)\n",
        "if constexpr (false)\n",
    ),
    Mutant(
        "a product and a sum in one rounding",
        KERNEL,
        "squares[i][j] + square",
        "__builtin_fmaf(value, value, squares[i][j])",
    ),
    Mutant(
        "root that rounds twice",
        KERNEL,
        "1.0f / sqrtf(mean + norm.eps)",
        "sqrtf(1.0f / (mean + norm.eps))",
    ),
    Mutant("mean by a reciprocal", KERNEL, "/ float(problem.k)", "* (1.0f / float(problem.k))"),
    Mutant(
        "no rounding of the norm",
        KERNEL,
        "(value_of(chunk, i) * r) * weight[i]",
        "value_of(chunk, i) * (r * weight[i])",
    ),
    Mutant("eps left out", KERNEL, "mean + norm.eps", "mean"),
    Mutant("weights of another chunk", KERNEL, "c * kParts + part", "c * kParts"),
    Mutant(
        "weights read without a mask",
        KERNEL,
        "load_chunk<W, kWide>(from, k,",
        "load_chunk<W, kWide>(from, k + kChunkValues<T>,",
        "outside of the weight",
    ),
    Mutant(
        "alignment of the weight ignored",
        KERNEL,
        "aligned_weight && ",
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


@pytest.mark.parametrize("trial", [Trial("rms_norm_quantize_rows", m) for m in MUTANTS], ids=str)
def test_planted_bug_is_caught(trial, outcome):
    assert_caught(trial, outcome)
