"""int8_weight_linear's CUDA kernels, run on the CPU: within the op's bound, planted bugs caught."""

import functools
import random
import struct
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cuda_kernels import BY_SCHEDULE, Mutant
from cuda_trials import Trial, assert_caught, outcomes
from linear_inputs import DTYPES, assert_within_sum_bound
from torch import Tensor
from trine.ops.int8_weight_linear import reference

SEEDS = (1, random.SystemRandom().randrange(2, 2**31))  # a failure names its seed
# (M, N, K, groups): both kernels for few rows, their tails, more k than the warps of a block take
# at a time; small and, as they fill the emulation's 5 multiprocessors, large tiles.
FEW_ROWS = ((1, 1, 1, None), (3, 17, 100, None), (8, 5, 2100, None), (9, 33, 40, None))
FEW_ROWS += ((2, 18, 640, 5), (16, 20, 128, 2), (5, 3, 64, 1))
MANY_ROWS = ((17, 70, 37, None), (66, 9, 330, None), (130, 260, 65, None))
MANY_ROWS += ((18, 66, 192, 3), (20, 5, 256, 2))


@dataclass(frozen=True)
class WeightCase:
    x: Tensor
    packed_weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def encode(self) -> bytes:
        (m, k), (n, packed) = self.x.shape, self.packed_weight.shape
        columns = k if self.x.dtype == torch.float32 else -(-k // 8) * 8  # whole units of 16 bytes
        x = torch.nn.functional.pad(self.x, (0, columns - k))
        groups = self.weight_scale.numel() // n
        bias_type = -1 if self.bias is None else DTYPES.index(self.bias.dtype)
        numbers = (DTYPES.index(x.dtype), m, n, k, columns * x.element_size(), packed, groups)
        tensors = [x, self.packed_weight, self.weight_scale]
        tensors += [] if self.bias is None else [self.bias]
        raw = [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
        return struct.pack("<8q", *numbers, bias_type) + b"".join(raw)

    def decode(self, answer: bytes) -> list[Tensor]:
        y = torch.from_numpy(np.frombuffer(answer, np.uint8).copy()).view(self.x.dtype)
        return [y.reshape(len(self.x), len(self.packed_weight))]

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        inputs = self.x, self.packed_weight, self.weight_scale, self.bias
        return [reference.int8_weight_linear(*inputs)]

    def check(self, actual: Tensor, expected: Tensor) -> None:
        k = self.x.shape[1]
        dense = reference.dequantised(self.packed_weight, self.weight_scale, k)
        magnitude = self.x.double().abs() @ dense.abs().T
        assert_within_sum_bound(actual, expected, magnitude, k)


@functools.cache
def cases() -> list[WeightCase]:
    """Small ones first: most bugs show there."""
    torch.manual_seed(0)
    made = []
    for i, (m, n, k, groups) in enumerate((*FEW_ROWS, *MANY_ROWS)):
        for dtype in DTYPES:
            if m * n * k > 10**6 and dtype != torch.bfloat16:
                continue
            made.append(WeightCase(*reference.example_inputs(m, n, k, dtype, i % 2 == 0, groups)))
    for dtype in DTYPES:  # every weight there is, and what is not finite
        _, _, scale, bias = reference.example_inputs(2, 17, 255, dtype)
        weight = torch.zeros(17, 256, dtype=torch.int8)
        weight[:, :255] = torch.arange(-127, 128).roll(1)
        for m in (2, 20):
            x = torch.zeros(m, 255, dtype=dtype)
            x[0], x[1, 3], x[1, 90] = torch.randn(255), torch.inf, 1
            made.append(WeightCase(x, weight, scale, bias))
    return sorted(made, key=lambda one: one.x.numel() * len(one.packed_weight))


@pytest.fixture(scope="module")
def outcome(request):
    yield from outcomes(request, lambda _: cases())


@pytest.mark.parametrize("trial", [Trial("int8_weight_linear", seeds=SEEDS)], ids=str)
def test_within_the_bound(trial, outcome):
    outcome(trial)


KERNEL, CODES = "int8_weight_linear/cuda.cu", "int8_weight_linear/codes.cuh"
MUTANTS = (
    Mutant("sign of float16 forgotten", CODES, "word ^ 0x80808080u", "word", BY_SCHEDULE),
    Mutant("sign of bfloat16 forgotten", CODES, "(bytes & 0x00800080u) |", "", BY_SCHEDULE),
    Mutant(
        "few: missing barrier",
        KERNEL,
        "totals[b][i];\n  __syncthreads();",
        "totals[b][i];",
        BY_SCHEDULE,
    ),
    Mutant(
        "few: weight rows behind the last read",
        KERNEL,
        "if (at < linear.weight_stride && n < linear.n)",
        "if (at < linear.weight_stride)",
        "outside of the weight",
    ),
    Mutant(
        "few: behind the end of the weight",
        KERNEL,
        "if (at < linear.weight_stride && n < linear.n)",
        "if (n < linear.n)",
        "outside of the weight",
    ),
    Mutant(
        "few: rows of x behind the last read",
        KERNEL,
        "if (m < linear.m && at < problem.x_bytes)",
        "if (at < problem.x_bytes)",
        "outside of",
    ),
    Mutant(
        "few: behind the end of x",
        KERNEL,
        "if (m < linear.m && at < problem.x_bytes)",
        "if (m < linear.m)",
        "outside of x",
    ),
    Mutant(
        "few: pairs swapped",
        KERNEL,
        "word_of(four, product % 2 * 2),",
        "word_of(four, product % 2 * 2 + 1),",
        BY_SCHEDULE,
    ),
    Mutant(
        "few: scale of another group",
        KERNEL,
        "k / problem.group_size];\n#pragma unroll\n          for (int b",
        "0];\n#pragma unroll\n          for (int b",
        BY_SCHEDULE,
    ),
    Mutant("many: halves swapped", KERNEL, "unit + 8 * half", "unit + 8 - 8 * half", BY_SCHEDULE),
    Mutant("many: sums not cleared", KERNEL, "            sum = 0.0f;\n", "", BY_SCHEDULE),
    Mutant(
        "many: a group ends too early",
        KERNEL,
        "(step + 1) % steps_of_group",
        "step % steps_of_group",
        BY_SCHEDULE,
    ),
    Mutant(
        "many: rows of x behind the last read",
        KERNEL,
        "m0 + row < linear.m && at < problem.x_bytes",
        "at < problem.x_bytes",
        "outside of|far from",
    ),
    Mutant(
        "many: weight rows behind the last read",
        KERNEL,
        "n0 + row < linear.n && at < linear.weight_stride",
        "at < linear.weight_stride",
        "outside of|far from",
    ),
    Mutant(
        "many: columns behind the last written",
        KERNEL,
        "linear.m - m0, linear.n - n0",
        "linear.m - m0, Tile::kColumns",
        "outside of|was overrun",
    ),
    Mutant(
        "float: missing barrier",
        KERNEL,
        "sums[i][j]);\n    __syncthreads();",
        "sums[i][j]);",
        BY_SCHEDULE,
    ),
    Mutant(
        "float: tail of k",
        KERNEL,
        "m < linear.m && k + across < problem.k",
        "m < linear.m",
        BY_SCHEDULE,
    ),
    Mutant(
        "float: rows written behind the last",
        KERNEL,
        "if (m < linear.m && n < linear.n)\n        static",
        "if (n < linear.n)\n        static",
        "outside of|was overrun",
    ),
)


@pytest.mark.parametrize("trial", [Trial("int8_weight_linear", bug) for bug in MUTANTS], ids=str)
def test_planted_bug_is_caught(trial, outcome):
    assert_caught(trial, outcome)
