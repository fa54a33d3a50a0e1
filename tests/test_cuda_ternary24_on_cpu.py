"""The CUDA kernels of ternary24_linear, run on the CPU: right, planted bugs are caught."""

import functools
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cuda_kernels import Mutant
from cuda_trials import Trial, assert_caught, outcomes
from linear_inputs import DTYPES, assert_same_bits, difficult_rows
from test_cuda_linear_on_cpu import LinearCase
from torch import Tensor
from trine.ops.ternary24_linear import reference

OP = "ternary24_linear"
SEEDS = (1, random.SystemRandom().randrange(2, 2**31))  # a failure names its seed
# The emulation's GPU has 5 multiprocessors: up to 80 weight rows, blocks of up to 16 rows of x have
# twice the warps; from 160 on they take two tiles each, of up to 8 rows. k beside the borders of
# groups, of the three pieces of a chunk, of what the lanes and warps of a block take at a time.
FEW_ROWS = (
    (1, 1, 1),
    (1, 17, 84),
    (2, 16, 16),
    (7, 31, 86),
    (8, 33, 256),
    (9, 20, 257),
    (3, 90, 8200),
    (12, 90, 700),
    (1, 161, 640),
    (16, 85, 130),
    (17, 40, 170),
    (33, 24, 300),
    (64, 3, 48),
    (2, 4, 0),
)
UNPACKED = ((1, 1), (3, 5), (9, 32), (7, 64), (2, 70), (5, 100), (2, 257), (40, 700), (3, 0))


class Case(LinearCase):
    @functools.cached_property
    def expected(self) -> list[Tensor]:
        inputs = self.x, self.packed_weight, self.weight_scale, self.bias
        return [reference.ternary24_linear(*inputs)]


class Unpacked(LinearCase):
    """Of 65 rows, so that the weight alone is unpacked."""

    def decode(self, answer: bytes) -> list[Tensor]:
        """The dense weight, of k rounded up to chunks, and where positions do not ascend."""
        n, chunks = len(self.packed_weight), -(-self.x.shape[1] // 32)
        raw = torch.from_numpy(np.frombuffer(answer, np.uint8).copy())
        values, indices = raw.split([n * chunks * 16, n * chunks * 4])
        nibbles = torch.stack([indices & 15, indices >> 4], -1).reshape(n, -1).long()
        positions = torch.stack([nibbles & 3, nibbles >> 2], -1)
        dense = torch.zeros(n, chunks * 8, 4, dtype=torch.int8)
        dense.scatter_(2, positions, values.view(torch.int8).reshape(n, -1, 2))
        return [dense.reshape(n, -1)[:, : self.x.shape[1]], positions.diff() <= 0]

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        dense = reference.decode(self.packed_weight, self.x.shape[1]).to(torch.int8)
        groups = -(-self.x.shape[1] // 32) * 8
        return [dense, torch.zeros(len(dense), groups, 1, dtype=torch.bool)]

    def check(self, actual: Tensor, expected: Tensor) -> None:
        assert_same_bits(actual, expected)


def every_group() -> Tensor:
    """All 64 states of a group's bits, at every place that a group takes in 48 bytes."""
    states = torch.arange(64)
    groups = torch.stack([states.roll(shift) for shift in range(64)])
    bits = groups[:, :, None] >> torch.arange(6) & 1
    return (bits.view(64, 48, 8) << torch.arange(8)).sum(2).to(torch.uint8)


@functools.cache
def cases() -> Sequence[LinearCase]:
    """Small ones first: most bugs show there."""
    torch.manual_seed(0)
    found = []
    for i, (m, n, k) in enumerate(FEW_ROWS):
        scale_shape = (1,) if i % 4 == 0 else None
        inputs = reference.example_inputs(m, n, k, DTYPES[i % 3], m % 2 == 1, scale_shape)
        found.append(Case(OP, *inputs))
    for dtype in DTYPES:
        _, *weight = reference.example_inputs(8, 18, 130, dtype)
        found.append(Case(OP, difficult_rows(130, dtype), *weight))
    for m in (3, 20):
        found.append(Case(OP, torch.randn(m, 256), every_group(), torch.ones(64), None))
    for n, k in UNPACKED:
        found.append(Unpacked(OP, *reference.example_inputs(65, n, k)))
    found.append(Unpacked(OP, torch.randn(65, 256), every_group(), torch.ones(64), None))
    work = lambda case: case.x.numel() * len(case.packed_weight)  # noqa: E731
    return sorted(found, key=work)


@pytest.fixture(scope="module")
def outcome(request):
    yield from outcomes(request, lambda _: cases())


@pytest.mark.parametrize("trial", [Trial(OP, seeds=SEEDS)], ids=str)
def test_matches_reference(trial, outcome):
    outcome(trial)


KERNEL, FEW_ROWS_KERNEL = "ternary24_linear/cuda.cu", "common/cuda/few_rows.cuh"
MUTANTS = (
    Mutant(
        "tables read before they are there",
        KERNEL,
        "    __syncthreads();\n    tables_",
        "    tables_",
    ),
    Mutant(
        "table of another lane", KERNEL, "% kWarpThreads * kEntryBytes", "/ 2 * kEntryBytes", ""
    ),
    Mutant("bits of two words not joined", KERNEL, "word_at(word + 1), shift)", "0u, shift)"),
    Mutant("wrong shift to the left", KERNEL, "<< (kRowBits - shift)", "<< kRowBits"),
    Mutant("parts in the wrong order", KERNEL, "i + kGone < kWords ?", "i + kGone + 1 < kWords ?"),
    Mutant(
        "pieces behind the row's end",
        FEW_ROWS_KERNEL,
        "(kPieces == 1 || at < linear.weight_stride)",
        "true",
        "outside of the weight",
    ),
    Mutant(
        "x behind the row's end",
        FEW_ROWS_KERNEL,
        "(kPieces == 1 || at < linear.q_stride)",
        "true",
        "outside of q|Tensor-likes are not",
    ),
    Mutant("part of x", FEW_ROWS_KERNEL, "(chunk * kParts + part)", "(chunk * kParts)"),
    Mutant("one tile of rows for two", FEW_ROWS_KERNEL, "blockIdx.x % row_blocks", "0"),
    Mutant(
        "signs of both in one column", KERNEL, "first_is_minus && second_is_minus", "first_is_minus"
    ),
    Mutant(
        "columns that descend",
        KERNEL,
        "{second, first, second_column,",
        "{first, second, second_column,",
    ),
    Mutant(
        "second value in the last column", KERNEL, "if (column == 3) return {0, one, 0, 3};", ""
    ),
    Mutant(
        "unpack: table read before it is there",
        KERNEL,
        "  __syncthreads();\n  const int64_t units",
        "  const int64_t units",
    ),
    Mutant(
        "unpack: words behind the row's end",
        KERNEL,
        "if (at < packed_stride) load",
        "load",
        "outside of the weight",
    ),
    Mutant(
        "unpack: a chunk behind the last",
        KERNEL,
        "if (unit * kUnitChunks + chunk >= chunks) continue;",
        "",
        "outside of the values",
    ),
    Mutant("unpack: rows behind the last", KERNEL, "if (row >= n) return;", "", "outside of"),
    Mutant(
        "unpack: indices high nibble first",
        KERNEL,
        "entry >> 16 << 4 * g",
        "entry >> 16 << 4 * (g ^ 1)",
    ),
)


@pytest.mark.parametrize("trial", [Trial(OP, mutant) for mutant in MUTANTS], ids=str)
def test_planted_bug_is_caught(trial, outcome):
    assert_caught(trial, outcome)
