"""The CUDA kernels of sparse24_linear, run on the CPU: right, planted bugs are caught."""

import functools
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cuda_kernels import Mutant
from cuda_sparse24_mutants import MUTANTS
from cuda_sparse24_sm90a_mutants import MUTANTS as SM90A_MUTANTS
from cuda_trials import Trial, assert_caught, outcomes
from linear_inputs import DTYPES, difficult_rows, exact_sparse24_inputs
from torch import Tensor
from trine.ops.sparse24_linear import reference

OP = "sparse24_linear"
SEEDS = (1, random.SystemRandom().randrange(2, 2**31))  # a failure names its seed
# The emulation's GPU has 5 multiprocessors. Up to 16 rows: up to 80 weight rows, blocks have twice
# the warps, from 320 on two tiles each. More rows: the largest tiles from five blocks of 256 x 128
# on, the middle ones from five of 128 x 64. k beside the borders of chunks, of what one load of
# indices brings, of steps, units and stages.
FEW_ROWS = (
    (1, 1, 1),
    (1, 17, 100),
    (2, 16, 128),
    (8, 33, 65),
    (9, 20, 257),
    (3, 90, 2176),
    (12, 90, 704),
    (1, 321, 640),
    (16, 321, 256),
    (13, 90, 128),
    (2, 4, 0),
)
MANY_ROWS = (
    (17, 19, 33),
    (30, 70, 640),
    (65, 260, 330),
    (130, 520, 384),
    (30, 3, 0),
)
# sm_90a: each tile of y, the smallest first; the last is computed tile after tile. The second shape
# does not suit the copy engine.
SM90A = (
    (65, 140, 640),
    (66, 140, 33),
    (127, 780, 128),
    (170, 800, 116),
    (190, 790, 128),
    (340, 900, 256),
)


@dataclass(frozen=True)
class SparseCase:
    x: Tensor
    values: Tensor
    indices: Tensor
    bias: Tensor | None
    weight_scale: Tensor | None

    def encode(self) -> bytes:
        (m, k), (n, columns) = self.x.shape, self.values.shape
        bias_type = -1 if self.bias is None else DTYPES.index(self.bias.dtype)
        scales = 0 if self.weight_scale is None else n
        packed_bytes = columns * self.values.element_size()
        header = (DTYPES.index(self.x.dtype), m, n, k, packed_bytes, scales, bias_type, 0)
        tensors = (self.x, self.values, self.weight_scale, self.bias, self.indices)
        raw = [t.view(-1).view(torch.uint8).numpy().tobytes() for t in tensors if t is not None]
        return struct.pack("<8q", *header) + b"".join(raw)

    def decode(self, answer: bytes) -> list[Tensor]:
        y = torch.from_numpy(np.frombuffer(answer, np.uint8).copy())
        return [y.view(self.x.dtype).reshape(len(self.x), len(self.values))]

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        inputs = self.x, self.values, self.indices, self.bias
        return [reference.sparse24_linear(*inputs, weight_scale=self.weight_scale)]


def float_case(m: int, n: int, k: int, dtype: torch.dtype) -> SparseCase:
    return SparseCase(*exact_sparse24_inputs(m, n, k, dtype, bias=m % 2 == 1), None)


def not_stored(m: int, n: int, k: int) -> SparseCase:
    """NaN and infinity where no value of the weight is, and infinity where one is."""
    case = float_case(m, n, k, torch.bfloat16)
    # Every row stores columns 0 and 1 of each four, row 3 columns 2 and 3 of the first.
    indices = torch.full_like(case.indices, 0x44)
    indices[3, 0] = 0x4E
    x = case.x.clone()
    x[:, 2], x[:, 6], x[5, 11] = torch.nan, torch.inf, -torch.inf
    return SparseCase(x, case.values, indices, case.bias, None)


def difficult_case(dtype: torch.dtype, times: int, n: int, k: int) -> SparseCase:
    inputs, scale = reference.example_inputs(8, n, k, dtype, torch.int8)
    x = difficult_rows(k, dtype).repeat(times, 1)
    return SparseCase(x, *inputs[1:], scale["weight_scale"])


def cases_for(shapes: Sequence[tuple[int, int, int]]) -> list[SparseCase]:
    torch.manual_seed(0)
    cases = []
    for i, (m, n, k) in enumerate(shapes):
        inputs, scale = reference.example_inputs(m, n, k, DTYPES[i % 3], torch.int8, m % 2 == 1)
        cases.append(SparseCase(*inputs, scale["weight_scale"]))
        cases.append(float_case(m, n, k, DTYPES[1 + i % 2]))
    return cases


@functools.cache
def cases_of(capability: int) -> Sequence[SparseCase]:
    """Small ones first: most bugs show there."""
    if capability == 90:
        cases = [*cases_for(SM90A), not_stored(70, 140, 128)]
        cases += [difficult_case(dtype, 9, 140, 128) for dtype in DTYPES]
    else:
        cases = [*cases_for(FEW_ROWS), *cases_for(MANY_ROWS)]
        cases += [not_stored(20, 24, 160), not_stored(7, 24, 160)]
        cases += [difficult_case(dtype, 1, 18, 130) for dtype in DTYPES]
    work = lambda case: case.x.numel() * len(case.values)  # noqa: E731
    return sorted(cases, key=work)


@pytest.fixture(scope="module")
def outcome(request):
    yield from outcomes(request, lambda trial: cases_of(trial.capability))


# The other choice that pipeline.cuh names, for GPUs where it turns out faster.
ALONE = Mutant(
    "without clusters", "common/cuda/pipeline.cuh", "int kCluster = 2;", "int kCluster = 1;"
)
RIGHT = [Trial(OP, mutant, 90, SEEDS) for mutant in (None, ALONE)]


@pytest.mark.parametrize("trial", [Trial(OP, None, 80, SEEDS), *RIGHT], ids=str)
def test_matches_reference(trial, outcome):
    outcome(trial)


@pytest.mark.parametrize("trial", [*MUTANTS, *SM90A_MUTANTS], ids=str)
def test_planted_bug_is_caught(trial, outcome):
    assert_caught(trial, outcome)
