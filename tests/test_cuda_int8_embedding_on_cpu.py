"""The CUDA kernel of int8_embedding, run on the CPU: right, and every planted bug is caught."""

import functools
import struct
from dataclasses import dataclass

import pytest
import torch
from cuda_kernels import Mutant
from cuda_trials import Trial, assert_caught, outcomes
from linear_inputs import DTYPES
from test_cuda_on_cpu import SEEDS
from torch import Tensor
from trine.ops.int8_embedding import reference


@dataclass(frozen=True)
class EmbeddingCase:
    arguments: tuple  # of the op; indices [count]
    alignment: int = 16  # bytes, of y

    def encode(self) -> bytes:
        indices, codes, scale, dim, dtype = self.arguments
        wide = indices.dtype == torch.int64
        alignment = max(self.alignment, dtype.itemsize)
        header = (DTYPES.index(dtype), wide, len(indices), len(codes), dim, alignment)
        raw = [t.contiguous().numpy().tobytes() for t in (indices, codes, scale)]
        return struct.pack("<6q", *header) + b"".join(raw)

    def decode(self, answer: bytes) -> list[Tensor]:
        (expected,) = self.expected
        y = torch.empty_like(expected)
        if y.numel():
            y.view(-1)[:] = torch.frombuffer(bytearray(answer), dtype=y.dtype)[: y.numel()]
        return [y]

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        return [reference.int8_embedding(*self.arguments)]


@functools.cache
def cases() -> list[EmbeddingCase]:
    """Small ones first: most bugs show there."""
    torch.manual_seed(0)
    found = []
    for i, dtype in enumerate(DTYPES):
        values = 16 // dtype.itemsize  # in a chunk
        # A chunk, a slice of a warp, several slices; each whole (wide accesses) and not.
        for d in (1, 3, values, values + 1, 37, 128 * values, 128 * values + 5, 300 * values):
            for count, index in ((3, torch.int64), (9, torch.int32)):
                arguments = reference.example_inputs((count,), 7, d, dtype, index)
                found.append(EmbeddingCase(arguments))
        for shape, v, d in (((0,), 4, 16), ((4,), 5, 0), ((1,), 1, 16), ((70,), 300, 24)):
            index = (torch.int32, torch.int64)[i % 2]
            found.append(EmbeddingCase(reference.example_inputs(shape, v, d, dtype, index)))
        found += [
            EmbeddingCase(reference.example_inputs((3,), 5, 48, dtype), alignment)
            for alignment in (2, 4, 8)
        ]
        # Every code, and a scale that makes products which have to be rounded, at both ends.
        _, _, scale, _, _ = reference.example_inputs((6,), 6, 256, dtype)
        codes = torch.arange(-128, 128).clamp(-127).to(torch.int8).repeat(6, 1)
        scale *= torch.tensor([1.0, 1e-6, 1e4, 1e-36, 0.0, torch.nan])
        found.append(EmbeddingCase((torch.arange(6), codes, scale, 256, dtype)))
    return sorted(found, key=lambda case: case.expected[0].numel())


# Trials of one wrong index alone; the kernel is the same for all GPUs.
BEYOND = {Trial("int8_embedding", capability=80 + i): index for i, index in ((6, -1), (7, 7))}


def cases_of(trial: Trial) -> list[EmbeddingCase]:
    if trial not in BEYOND:
        return cases()
    arguments = reference.example_inputs((3,), 7, 16)
    arguments[0][1] = BEYOND[trial]
    return [EmbeddingCase(arguments)]


@pytest.fixture(scope="module")
def outcome(request):
    yield from outcomes(request, cases_of)


@pytest.mark.parametrize("trial", [Trial("int8_embedding", seeds=SEEDS[1:])], ids=str)
def test_matches_reference(trial, outcome):
    outcome(trial)


KERNEL = "int8_embedding/cuda.cu"
MUTANTS = (
    Mutant(
        "rows behind the last written",
        KERNEL,
        "  if (row >= problem.count) return;\n",
        "",
        "outside of indices|outside of y|failed assertion",
    ),
    Mutant("slices of other rows", KERNEL, "unit % slices * kSliceChunks", "0 * kSliceChunks"),
    Mutant("one slice a row", KERNEL, "(chunks + kSliceChunks - 1) / kSliceChunks", "1"),
    Mutant(
        "narrow indices read as wide",
        KERNEL,
        "problem.wide_indices ? ",
        "true ? ",
        "outside of indices|failed assertion",
    ),
    Mutant(
        "stride without its padding",
        KERNEL,
        "index * problem.stride",
        "index * problem.dim",
        "not aligned to its size",
    ),
    Mutant(
        "scale of the place, not of the index",
        KERNEL,
        "problem.scale[index]",
        "problem.scale[row % problem.v]",
    ),
    Mutant("codes without a sign", KERNEL, "static_cast<int8_t>(held", "static_cast<uint8_t>(held"),
    Mutant(
        "rounded twice",
        KERNEL,
        "float(code) * scale",
        "float(code) * widen_on_device(narrow_to_bfloat16(scale))",
    ),
    Mutant(
        "tail written without a mask",
        KERNEL,
        "if (at + j < problem.dim) store",
        "store",
        "outside of y|y .* was overrun|Tensor-likes are not",
    ),
    Mutant(
        "alignment of y ignored",
        KERNEL,
        " && reinterpret_cast<uintptr_t>(problem.y) % 16 == 0",
        "",
        "not aligned to its size",
    ),
    Mutant(
        "chunks of a lane left out",
        KERNEL,
        "constexpr int kSliceChunks = kHeld *",
        "constexpr int kSliceChunks = (kHeld + 1) *",
    ),
)


@pytest.mark.parametrize("trial", [Trial("int8_embedding", bug) for bug in MUTANTS], ids=str)
def test_planted_bug_is_caught(trial, outcome):
    assert_caught(trial, outcome)


@pytest.mark.parametrize("trial", BEYOND, ids=["below", "above"])
def test_index_beyond_the_table_is_a_failed_assertion(trial, outcome):
    with pytest.raises(AssertionError, match=r"indices must lie in \[0, V\)"):
        outcome(trial)
