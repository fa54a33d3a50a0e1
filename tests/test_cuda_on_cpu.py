"""The CUDA kernels, run on the CPU: right in every schedule, and every planted bug is caught."""

import functools
import random
import struct
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cuda_kernels import Mutant
from cuda_trials import Trial, assert_caught, outcomes
from linear_inputs import DTYPES, difficult_rows
from torch import Tensor
from trine.ops.quantize_rows import reference

SEEDS = (1, 2, random.SystemRandom().randrange(3, 2**31))  # a failure names its seed


@dataclass(frozen=True)
class QuantizeRowsCase:
    x: Tensor  # [m, k], rows contiguous
    alignment: int = 16  # bytes, of x and of q: torch gives at least 16, a slice of x less

    def encode(self) -> bytes:
        m, k = self.x.shape
        size = self.x.element_size()
        row_bytes = self.x.stride(0) * size
        # The storage up to the last value: behind it begins what must not be read.
        extent = (m - 1) * self.x.stride(0) + k if m and k else 0
        raw = torch.as_strided(self.x, (extent,), (1,)).view(torch.uint8).numpy().tobytes()
        alignment = max(self.alignment, size)
        header = (DTYPES.index(self.x.dtype), m, k, row_bytes, alignment, self.alignment, len(raw))
        return struct.pack("<7q", *header) + raw

    def decode(self, answer: bytes) -> list[Tensor]:
        m, k = self.x.shape
        raw = np.frombuffer(answer, np.uint8).copy()
        q, scale, total = np.split(raw, (m * k, m * k + 4 * m))
        values = q.view(np.int8).reshape(m, k), scale.view(np.float32), total.view(np.int32)
        return [torch.from_numpy(value) for value in values]

    @functools.cached_property
    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        return reference.quantize_rows(self.x)


def padded(x: Tensor, columns: int) -> Tensor:
    """Equal to x, with NaN between the rows."""
    wide = torch.full((x.shape[0], x.shape[1] + columns), torch.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def quantize_rows_cases() -> list[QuantizeRowsCase]:
    torch.manual_seed(0)
    cases = []
    for dtype in DTYPES:
        values = 16 // dtype.itemsize  # in a chunk
        # Each number of threads per row, about four chunks for each thread: whole chunks (wide
        # accesses) and not. Fewer rows where they are long, to save time.
        for threads, m in ((8, 3), (32, 3), (128, 2), (512, 1), (1024, 1)):
            full = threads * 4 * values
            lengths = [full - 1, full] if threads < 512 else [full + 1, full + values]
            cases += [QuantizeRowsCase(torch.randn(m, k).to(dtype)) for k in lengths]
        cases += [QuantizeRowsCase(torch.randn(5, k).to(dtype)) for k in (1, 3, 8, 17, 64, 100)]
        cases += [QuantizeRowsCase(difficult_rows(k, dtype)) for k in (1, 16, 37, 130, 600)]
        cases += [QuantizeRowsCase(torch.randn(m, 24).to(dtype)) for m in (0, 1, 16, 33)]
        cases += [QuantizeRowsCase(torch.empty(3, 0, dtype=dtype))]
        # Whole chunks in a row, but addresses that forbid wide accesses.
        cases += [QuantizeRowsCase(torch.randn(3, 72).to(dtype), a) for a in (1, 2, 4, 8)]
        cases += [QuantizeRowsCase(padded(torch.randn(3, 72).to(dtype), c)) for c in (1, 2, 4, 8)]
    # Every tie between two integers, and every bit pattern of a 16-bit type.
    cases += [QuantizeRowsCase(torch.arange(-254, 255).float()[None] / 2)]
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).reshape(256, 256)
    cases += [QuantizeRowsCase(patterns.view(dtype)) for dtype in (torch.float16, torch.bfloat16)]
    # The NaN that a GPU's arithmetic gives: every bit of its payload set.
    cases += [
        QuantizeRowsCase(torch.full((2, 9), 2**31 - 1, dtype=torch.int32).view(torch.float32))
    ]
    # Row maxima for which 127 / absmax and x * that must each be rounded, and only once.
    cases += [QuantizeRowsCase(torch.rand(64, 40) * 10.0 ** torch.arange(-32, 32)[:, None])]
    return cases


@functools.cache
def cases() -> list[QuantizeRowsCase]:
    """Small ones first: most bugs show there."""
    return sorted(quantize_rows_cases(), key=lambda case: case.x.numel())


@pytest.fixture(scope="module")
def outcome(request):
    yield from outcomes(request, lambda _: cases())


@pytest.mark.parametrize("trial", [Trial("quantize_rows", seeds=SEEDS)], ids=str)
def test_quantize_rows_matches_reference(trial, outcome):
    outcome(trial)


REDUCE = "common/cuda/reduce.cuh"
KERNEL = "quantize_rows/rows.cuh"
MUTANTS = (
    Mutant("missing barrier", REDUCE, "    __syncthreads();\n", ""),
    Mutant(
        "barrier that some threads skip",
        REDUCE,
        "= value;\n    __syncthreads();",
        "= value, __syncthreads();",
        r"deadlock(.|\n)*waits in __syncthreads(.|\n)*waits in __shfl_xor_sync",
    ),
    Mutant(
        "shared array used again without a barrier",
        KERNEL,
        "Sum{}, warp_total)",
        "Sum{}, reinterpret_cast<int32_t*>(warp_largest))",
    ),
    Mutant("half a mask", REDUCE, "_sync(kWholeWarp", "_sync(0x0000ffffu", "does not name"),
    Mutant("shuffle too narrow", REDUCE, "value, step)", "value, step, kLanes / 2)"),
    Mutant("shuffle step left out", REDUCE, "step = kLanes / 2;", "step = kLanes / 4;"),
    Mutant("result of one warp alone", REDUCE, "[lane % kWarps]", "[0]"),
    Mutant(
        "result in the wrong place",
        REDUCE,
        "warp_results[threadIdx.x / kWarpThreads]",
        "warp_results[threadIdx.x % kWarpThreads]",
    ),
    Mutant(
        "shared array too short",
        KERNEL,
        "TRINE_SHARED_ARRAY(uint32_t, warp_largest, kRowWarps)",
        "TRINE_SHARED_ARRAY(uint32_t, warp_largest, (kRowWarps + 1) / 2)",
        "outside of a shared array|a shared array .* was overrun",
    ),
    Mutant(
        "tail read without a mask",
        KERNEL,
        "if (c * kChunkValues<T> + i < k) {\n        const int at",
        "{\n        const int at",
        "outside of x",
    ),
    Mutant(
        "tail written without a mask",
        KERNEL,
        "if (c * kChunkValues<T> + i < k) {\n        const uint32_t q",
        "{\n        const uint32_t q",
        "outside of q|q .* was overrun",
    ),
    Mutant(
        "rows behind the last written",
        KERNEL,
        "if (has_row && thread == 0)",
        "if (thread == 0)",
        "outside of (scale|sum)|(scale|sum) .* was overrun",
    ),
    Mutant(
        "early return before a shuffle",
        KERNEL,
        "    uint32_t largest = 0;",
        "    if (!has_row) return;\n    uint32_t largest = 0;",
        r"deadlock(.|\n)*returned",
    ),
    Mutant(
        "alignment of rows ignored",
        KERNEL,
        "problem.row_bytes % kChunkBytes == 0 &&",
        "",
        "not aligned to its size",
    ),
    Mutant(
        "long rows cut off",
        KERNEL,
        "const int64_t first_not_held = thread + kHeldChunks * kRowThreads",
        "const int64_t first_not_held = thread + (kHeldChunks + 1) * kRowThreads",
    ),
    Mutant("NaN let through", KERNEL, "finite && !zero ? ~0u", "!zero ? ~0u"),
    Mutant("tiny rows not zero", KERNEL, "absmax < kSmallestAbsmax", "absmax == 0.0f"),
    Mutant("two roundings", KERNEL, "{127.0f / absmax", "{1.0f / absmax * 127.0f"),
    Mutant(
        "no rounding of the product",
        KERNEL,
        "__float_as_uint(x * to_q + kRoundsToInteger)",
        "__float_as_uint(__builtin_fmaf(x, to_q, kRoundsToInteger))",
    ),
)


@pytest.mark.parametrize("trial", [Trial("quantize_rows", bug) for bug in MUTANTS], ids=str)
def test_planted_bug_is_caught(trial, outcome):
    assert_caught(trial, outcome)
