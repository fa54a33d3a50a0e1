"""The CUDA kernels of the integer linear ops, run on the CPU: right, planted bugs are caught."""

import functools
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cuda_kernels import Mutant
from cuda_linear_mutants import MUTANTS, OPS
from cuda_trials import Trial, assert_caught, outcomes
from linear_inputs import DTYPES, difficult_rows
from torch import Tensor
from trine.ops.activation import CODES
from trine.ops.int8_linear import reference as int8
from trine.ops.ternary_linear import reference as ternary

SEEDS = (1, random.SystemRandom().randrange(2, 2**31))  # a failure names its seed
# The emulation's GPU has 5 multiprocessors: up to 80 weight rows, blocks have twice the warps, from
# 320 on they take four tiles each.
# Rows of the weight beside the borders of tiles and blocks; k beside those of chunks, of what the
# lanes, warps and stages of a block take at a time, and of the activations' padding.
SHAPES = (
    (1, 1, 1),
    (1, 17, 100),
    (2, 16, 16),
    (7, 31, 64),
    (8, 33, 65),
    (9, 20, 257),
    (3, 90, 2049),
    (12, 90, 700),
    (1, 321, 640),
    (16, 321, 130),
    (17, 40, 96),
    (32, 161, 64),
    (33, 24, 192),
    (64, 3, 48),
    # Whole tiles of y: one, several in each direction, more k than stages, more rows than a raster
    # group of them.
    (65, 19, 33),
    (130, 137, 330),
    (200, 260, 64),
    (1030, 3, 16),
    (2, 4, 0),
)


@dataclass(frozen=True)
class LinearCase:
    op: str
    x: Tensor
    packed_weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    static: tuple[Tensor, Tensor] | None = None
    activation: str | None = None

    def encode(self) -> bytes:
        (m, k), n = self.x.shape, self.packed_weight.shape[0]
        bias_type = -1 if self.bias is None else DTYPES.index(self.bias.dtype)
        packed_bytes = self.packed_weight.shape[1] * self.packed_weight.element_size()
        header = (DTYPES.index(self.x.dtype), m, n, k, packed_bytes, self.weight_scale.numel())
        tensors = [self.x, self.packed_weight, self.weight_scale]
        tensors += [] if self.bias is None else [self.bias]
        tensors += self.static or ()
        raw = [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
        options = (self.static is not None) + 2 * CODES.get(self.activation, 0)
        return struct.pack("<8q", *header, bias_type, options) + b"".join(raw)

    def decode(self, answer: bytes) -> list[Tensor]:
        m, n = self.x.shape[0], self.packed_weight.shape[0]
        y = torch.from_numpy(np.frombuffer(answer, np.uint8).copy())
        return [y.view(self.x.dtype).reshape(m, n)]

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        inputs = self.x, self.packed_weight, self.weight_scale, self.bias
        if self.op == "ternary_linear":
            return [ternary.ternary_linear(*inputs, activation=self.activation)]
        scale, zero_point = self.static or (None, None)
        static = {"input_scale": scale, "input_zero_point": zero_point}
        return [int8.int8_linear(*inputs, **static, activation=self.activation)]


def int8_case(m: int, n: int, k: int, dtype: torch.dtype, zero_point: int | None) -> LinearCase:
    x, weight, scale, bias = int8.example_inputs(m, n, k, dtype, bias=m % 2 == 1)
    if zero_point is None:
        return LinearCase("int8_linear", x, weight, scale, bias)
    static = torch.tensor([0.02]), torch.tensor([zero_point], dtype=torch.int32)
    return LinearCase("int8_linear", x, weight, scale, bias, static)


def activated_cases(
    op: str, example_inputs: Callable[..., tuple], shapes: Sequence[tuple[int, int, int]]
) -> list[LinearCase]:
    """Every activation and every type of y among them."""
    return [
        LinearCase(
            op, *example_inputs(*shape, DTYPES[i % 3]), activation=[*CODES][(i + i // 3) % 3]
        )
        for i, shape in enumerate(shapes)
    ]


# Of few rows and of whole tiles of y, with tails; then what sm_90a takes.
ACTIVATED = ((1, 33, 100), (9, 20, 70), (3, 17, 64), (70, 19, 33), (130, 137, 64), (65, 40, 96))
ACTIVATED_TILES = ((65, 257, 130), (130, 20, 64), (70, 24, 200))


def int8_cases() -> list[LinearCase]:
    torch.manual_seed(0)
    cases = []
    for i, (m, n, k) in enumerate(SHAPES):
        cases.append(int8_case(m, n, k, DTYPES[i % 3], zero_point=None))
    for i, zero_point in enumerate((0, 7, -128, 127)):
        cases.append(int8_case(4, 35, 70, DTYPES[i % 3], zero_point))
    cases.append(int8_case(1, 9, 700, torch.float32, 5))  # more than a warp sums at a time
    for dtype in DTYPES:
        _, weight, scale, bias = int8.example_inputs(8, 18, 130, dtype)
        cases.append(LinearCase("int8_linear", difficult_rows(130, dtype), weight, scale, bias))
    static = torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32)
    cases.append(
        LinearCase("int8_linear", difficult_rows(130, torch.float32), weight, scale, bias, static)
    )
    # The largest sums there are, and a bias of another type.
    x = torch.full((3, 4096), -3.0)
    weight = torch.full((4, 4096), -127, dtype=torch.int8)
    cases.append(LinearCase("int8_linear", x, weight, torch.ones(4), torch.randn(4).bfloat16()))
    return cases + activated_cases("int8_linear", int8.example_inputs, ACTIVATED)


def ternary_cases() -> list[LinearCase]:
    torch.manual_seed(0)
    cases = []
    for i, (m, n, k) in enumerate(SHAPES):
        shape = (1,) if i % 4 == 0 else None
        cases.append(
            LinearCase(
                "ternary_linear", *ternary.example_inputs(m, n, k, DTYPES[i % 3], m % 2 == 1, shape)
            )
        )
    for dtype in DTYPES:
        _, weight, scale, bias = ternary.example_inputs(8, 18, 130, dtype)
        cases.append(LinearCase("ternary_linear", difficult_rows(130, dtype), weight, scale, bias))
    cases.append(
        LinearCase("ternary_linear", *ternary.example_inputs(1, 90, 8256))
    )  # more than one stage of a block
    # Groups of 64, 128 and 192, and fewer and more rows than a tile.
    for m, n, k, groups in ((1, 17, 128, 2), (9, 70, 256, 2), (3, 5, 384, 2), (8, 16, 320, 5)):
        cases.append(
            LinearCase("ternary_linear", *ternary.example_inputs(m, n, k, scale_shape=(n, groups)))
        )
    grouped = functools.partial(ternary.example_inputs, scale_shape=(5, 2))
    cases += activated_cases("ternary_linear", grouped, [(9, 5, 128)] * 3)
    return cases + activated_cases("ternary_linear", ternary.example_inputs, ACTIVATED)


def int8_tile_cases() -> list[LinearCase]:
    """For sm_90a: more k than stages, tails on all sides, fewer tiles than clusters and more."""
    torch.manual_seed(0)
    shapes = ((65, 257, 700), (130, 16, 129), (70, 24, 64), (513, 300, 200))
    cases = [int8_case(m, n, k, DTYPES[i % 3], None) for i, (m, n, k) in enumerate(shapes)]
    x, weight, scale, bias = int8.example_inputs(66, 20, 40, torch.bfloat16)
    return [
        *cases,
        *activated_cases("int8_linear", int8.example_inputs, ACTIVATED_TILES),
        LinearCase("int8_linear", x, weight, scale, bias),
        int8_case(70, 9, 70, torch.float16, 7),
    ]


def ternary_tile_cases() -> list[LinearCase]:
    """The same; also more k than a packed tile holds, and than two of them."""
    torch.manual_seed(0)
    shapes = ((65, 129, 1100), (257, 16, 129), (70, 24, 64), (513, 300, 200))
    return [
        LinearCase("ternary_linear", *ternary.example_inputs(m, n, k, DTYPES[i % 3], i % 2 == 1))
        for i, (m, n, k) in enumerate(shapes)
    ] + [
        LinearCase(
            "ternary_linear", *ternary.example_inputs(66, 20, 40, torch.bfloat16, True, (1,))
        ),
        *activated_cases("ternary_linear", ternary.example_inputs, ACTIVATED_TILES),
    ]


CASES = {
    ("int8_linear", 80): int8_cases,
    ("int8_linear", 90): int8_tile_cases,
    ("ternary_linear", 80): ternary_cases,
    ("ternary_linear", 90): ternary_tile_cases,
}


@functools.cache
def cases_of(op: str, capability: int) -> Sequence[LinearCase]:
    """Small ones first: most bugs show there."""
    work = lambda case: case.x.numel() * case.packed_weight.shape[0]  # noqa: E731
    return sorted(CASES[op, capability](), key=work)


@pytest.fixture(scope="module")
def outcome(request):
    yield from outcomes(request, lambda trial: cases_of(trial.op, trial.capability))


# The other choice that pipeline.cuh names, for GPUs where it turns out faster.
ALONE = Mutant(
    "without clusters", "common/cuda/pipeline.cuh", "int kCluster = 2;", "int kCluster = 1;"
)
RIGHT = [Trial(op, None, capability, SEEDS) for op in OPS for capability in (80, 90)]
RIGHT += [Trial(op, ALONE, 90, SEEDS) for op in OPS]


@pytest.mark.parametrize("trial", RIGHT, ids=str)
def test_matches_reference(trial, outcome):
    outcome(trial)


@pytest.mark.parametrize("trial", MUTANTS, ids=str)
def test_planted_bug_is_caught(trial, outcome):
    assert_caught(trial, outcome)
