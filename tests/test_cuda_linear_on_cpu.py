"""The CUDA kernels of the integer linear ops, run on the CPU: right, planted bugs are caught."""

import random
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import cuda_kernels
import numpy as np
import pytest
import torch
from cuda_kernels import Mutant
from linear_inputs import DTYPES, assert_same_bits, difficult_rows
from torch import Tensor
from trine.ops.int8_linear import reference as int8
from trine.ops.ternary_linear import reference as ternary

SEEDS = (1, random.SystemRandom().randrange(2, 2**31))  # a failure names its seed
# The emulation's GPU has 3 multiprocessors: from 192 weight rows on, blocks take four tiles each.
# Rows of the weight beside the borders of tiles and blocks; k beside those of chunks, of what the
# lanes, warps and stages of a block take at a time, and of the activations' padding.
SHAPES = (
    (1, 1, 1),
    (1, 17, 100),
    (2, 16, 16),
    (7, 31, 64),
    (8, 33, 65),
    (9, 20, 257),
    (3, 5, 2049),
    (1, 193, 640),
    (16, 200, 130),
    (17, 40, 96),
    (32, 97, 64),
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
    x: Tensor
    packed_weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    static: tuple[Tensor, Tensor] | None = None

    def encode(self) -> bytes:
        (m, k), n = self.x.shape, self.packed_weight.shape[0]
        bias_type = -1 if self.bias is None else DTYPES.index(self.bias.dtype)
        packed_bytes = self.packed_weight.shape[1] * self.packed_weight.element_size()
        header = (DTYPES.index(self.x.dtype), m, n, k, packed_bytes, self.weight_scale.numel())
        tensors = [self.x, self.packed_weight, self.weight_scale]
        tensors += [] if self.bias is None else [self.bias]
        tensors += self.static or ()
        raw = [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
        return struct.pack("<8q", *header, bias_type, self.static is not None) + b"".join(raw)

    def decode(self, answer: memoryview) -> tuple[Tensor, memoryview]:
        m, n = self.x.shape[0], self.packed_weight.shape[0]
        size = m * n * self.x.element_size()
        y = torch.from_numpy(np.frombuffer(answer[:size], np.uint8).copy())
        return y.view(self.x.dtype).reshape(m, n), answer[size:]


def int8_case(m: int, n: int, k: int, dtype: torch.dtype, zero_point: int | None) -> LinearCase:
    x, weight, scale, bias = int8.example_inputs(m, n, k, dtype, bias=m % 2 == 1)
    if zero_point is None:
        return LinearCase(x, weight, scale, bias)
    static = torch.tensor([0.02]), torch.tensor([zero_point], dtype=torch.int32)
    return LinearCase(x, weight, scale, bias, static)


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
        cases.append(LinearCase(difficult_rows(130, dtype), weight, scale, bias))
    static = torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32)
    cases.append(LinearCase(difficult_rows(130, torch.float32), weight, scale, bias, static))
    # The largest sums there are, and a bias of another type.
    x = torch.full((3, 4096), -3.0)
    weight = torch.full((4, 4096), -127, dtype=torch.int8)
    cases.append(LinearCase(x, weight, torch.ones(4), torch.randn(4).bfloat16()))
    return cases


def ternary_cases() -> list[LinearCase]:
    torch.manual_seed(0)
    cases = []
    for i, (m, n, k) in enumerate(SHAPES):
        shape = (1,) if i % 4 == 0 else None
        cases.append(LinearCase(*ternary.example_inputs(m, n, k, DTYPES[i % 3], m % 2 == 1, shape)))
    for dtype in DTYPES:
        _, weight, scale, bias = ternary.example_inputs(8, 18, 130, dtype)
        cases.append(LinearCase(difficult_rows(130, dtype), weight, scale, bias))
    cases.append(LinearCase(*ternary.example_inputs(1, 2, 8256)))  # more than one stage of a block
    # Groups of 64, 128 and 192, and fewer and more rows than a tile.
    for m, n, k, groups in ((1, 17, 128, 2), (9, 70, 256, 2), (3, 5, 384, 2), (8, 16, 320, 5)):
        cases.append(LinearCase(*ternary.example_inputs(m, n, k, scale_shape=(n, groups))))
    return cases


def int8_tile_cases() -> list[LinearCase]:
    """For the tiles of sm_90a: more k than stages, tails on all sides, several for a block."""
    torch.manual_seed(0)
    shapes = ((65, 257, 700), (130, 16, 129), (70, 24, 64), (513, 300, 200))
    cases = [int8_case(m, n, k, DTYPES[i % 3], None) for i, (m, n, k) in enumerate(shapes)]
    x, weight, scale, bias = int8.example_inputs(66, 20, 40, torch.bfloat16)
    return [*cases, LinearCase(x, weight, scale, bias), int8_case(70, 9, 70, torch.float16, 7)]


def ternary_tile_cases() -> list[LinearCase]:
    """The same; also more k than a packed tile holds, and than two of them."""
    torch.manual_seed(0)
    shapes = ((65, 129, 1100), (257, 16, 129), (70, 24, 64), (513, 140, 600))
    return [
        LinearCase(*ternary.example_inputs(m, n, k, DTYPES[i % 3], i % 2 == 1))
        for i, (m, n, k) in enumerate(shapes)
    ] + [LinearCase(*ternary.example_inputs(66, 20, 40, torch.bfloat16, True, (1,)))]


OPS: dict[str, tuple[Callable[[], list[LinearCase]], Callable[..., Tensor]]] = {
    "int8_linear": (int8_cases, int8.int8_linear),
    "ternary_linear": (ternary_cases, ternary.ternary_linear),
}


TILE_CASES = {"int8_linear": int8_tile_cases, "ternary_linear": ternary_tile_cases}


def assert_matches_reference(
    op: str, mutant: Mutant | None, seed: int, capability: int = 80
) -> None:
    make_cases, reference = OPS[op]
    cases = make_cases() if capability == 80 else TILE_CASES[op]()
    program = cuda_kernels.build(op, mutant)
    try:
        answer = memoryview(
            cuda_kernels.run(program, seed, [case.encode() for case in cases], capability)
        )
    except subprocess.CalledProcessError as error:
        raise AssertionError(error.stderr.decode()) from error
    for case in cases:
        actual, answer = case.decode(answer)
        static = {}
        if case.static is not None:
            static = dict(input_scale=case.static[0], input_zero_point=case.static[1])
        expected = reference(case.x, case.packed_weight, case.weight_scale, case.bias, **static)
        assert_same_bits(actual, expected)
    assert not answer


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: "fresh" if seed == SEEDS[-1] else seed)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("op", OPS)
def test_matches_reference(op, capability, seed):
    assert_matches_reference(op, None, seed, capability)


FEW_ROWS = "common/cuda/few_rows.cuh"
MANY_ROWS = "common/cuda/many_rows.cuh"
FINISH = "common/cuda/finish.cuh"
# Planted in the kernel that both ops share, and seen through each of them.
SHARED_MUTANTS = (
    Mutant("missing barrier", FEW_ROWS, "  __syncthreads();\n", ""),
    Mutant(
        "weight rows behind the last read",
        FEW_ROWS,
        "if (chunk < chunks && n < linear.n)",
        "if (chunk < chunks)",
        "outside of the weight",
    ),
    Mutant(
        "chunks behind the last read",
        FEW_ROWS,
        "if (chunk < chunks && n < linear.n)",
        "if (n < linear.n)",
        "outside of the weight",
    ),
    Mutant(
        "activation rows behind the last read",
        FEW_ROWS,
        "if (chunk < chunks && m < linear.m)",
        "if (chunk < chunks)",
        "outside of q",
    ),
    Mutant(
        "columns behind the last written",
        FEW_ROWS,
        "if (n >= linear.n || m >= linear.m) continue;",
        "if (m >= linear.m) continue;",
    ),
    Mutant(
        "rows behind the last written",
        FEW_ROWS,
        "if (n >= linear.n || m >= linear.m) continue;",
        "if (n >= linear.n) continue;",
        "outside of (y|the scales|the sums)|(y|the scales|the sums) .* was overrun",
    ),
    Mutant(
        "wrong stage",
        FEW_ROWS,
        "first += kDepth * kFewRowsWarps * kLanesOfRow",
        "first += (kDepth + 1) * kFewRowsWarps * kLanesOfRow",
    ),
    Mutant("one warp forgotten", FEW_ROWS, "w < kFewRowsWarps; ++w", "w + 1 < kFewRowsWarps; ++w"),
    Mutant("rows of A swapped", FEW_ROWS, "half * 8 + row;", "(1 - half) * 8 + row;"),
    Mutant("sums in the wrong place", FEW_ROWS, "(r % 8 * 4 + c / 2)", "(c / 2 * 8 + r % 8)"),
    Mutant(
        "shared array too short",
        FEW_ROWS,
        "partial, kFewRowsWarps * kTiles * kWarpThreads)",
        "partial, (kFewRowsWarps - 1) * kTiles * kWarpThreads)",
        "outside of a shared array",
    ),
    Mutant("tiles: missing barrier", MANY_ROWS, "    __syncthreads();\n", ""),
    Mutant(
        "tiles: wrong wait count",
        MANY_ROWS,
        "copy_async_wait<kManyRowsStages - 2>()",
        "copy_async_wait<kManyRowsStages - 1>()",
    ),
    Mutant(
        "tiles: wrong swizzle",
        MANY_ROWS,
        "copy_async(shared_address(a + unit_offset(row, unit)),",
        "copy_async(shared_address(a + unit_offset(row ^ 2, unit)),",
    ),
    Mutant(
        "tiles: wrong stage computed",
        MANY_ROWS,
        "compute_stage(int(step % kManyRowsStages))",
        "compute_stage(int((step + 1) % kManyRowsStages))",
    ),
    Mutant(
        "tiles: wrong stage loaded",
        MANY_ROWS,
        "load_stage(int(next % kManyRowsStages), next)",
        "load_stage(int(step % kManyRowsStages), next)",
    ),
    Mutant(
        "tiles: a group is not closed",
        MANY_ROWS,
        "load_stage(int(next % kManyRowsStages), next);\n    copy_async_commit();",
        "load_stage(int(next % kManyRowsStages), next), copy_async_commit();",
    ),
    Mutant(
        "tiles: rows behind the last read",
        MANY_ROWS,
        "                 m0 + row < linear.m);",
        "                 true);",
        "outside of (q|y)|far from",
    ),
    Mutant(
        "tiles: weight rows behind the last read",
        MANY_ROWS,
        "n0 + row < linear.n && at",
        "at",
        "outside of the weight",
    ),
    Mutant(
        "tiles: rows of A swapped", MANY_ROWS, "8 * half + lane / 4", "8 * (1 - half) + lane / 4"
    ),
    Mutant("tiles: rows behind the last written", MANY_ROWS, "if (m < linear.m)\n", "\n"),
    Mutant("tiles: columns behind the last written", MANY_ROWS, "if (n >= linear.n) continue;", ""),
    Mutant(
        "tiles: raster", "common/cuda/raster.cuh", "first_row + in_group % rows", "in_group % rows"
    ),
    Mutant("bias before the scale", FINISH, "scaled + column.bias", "scaled + 2 * column.bias"),
    Mutant(
        "one rounding less",
        FINISH,
        "* linear.x_scale[m]) * column.scale",
        "* (linear.x_scale[m] * column.scale))",
    ),
)
MUTANTS = [(op, mutant) for op in OPS for mutant in SHARED_MUTANTS]
INT8_KERNEL = "int8_linear/cuda.cu"
MUTANTS += [
    ("int8_linear", mutant)
    for mutant in (
        Mutant(
            "tiles: behind the end of a weight row",
            MANY_ROWS,
            "n0 + row < linear.n && at < linear.weight_stride",
            "n0 + row < linear.n",
        ),
        Mutant(
            "zero point forgotten",
            FINISH,
            "uint32_t(sum) - uint32_t(column.minus)",
            "uint32_t(sum)",
        ),
        Mutant(
            "half a row summed",
            INT8_KERNEL,
            "at += kWarpThreads * 16",
            "at += 2 * kWarpThreads * 16",
        ),
        Mutant(
            "rows behind the last summed",
            INT8_KERNEL,
            "if (n >= linear.n) return;",
            "",
            "outside of the (weight|column)|was overrun",
        ),
        Mutant(
            "shuffle step left out",
            "common/cuda/reduce.cuh",
            "step = kLanes / 2;",
            "step = kLanes / 4;",
        ),
        Mutant(
            "statically quantised without a bound",
            "quantize_rows/cuda.cu",
            "fminf(fmaxf(value, low), high)",
            "fmaxf(value, low)",
        ),
        Mutant(
            "padding not zero",
            "quantize_rows/cuda.cu",
            "i + j < problem.k && finite",
            "finite",
        ),
    )
]
TERNARY_KERNEL = "ternary_linear/cuda.cu"
MUTANTS += [
    ("ternary_linear", mutant)
    for mutant in (
        Mutant(
            "offset forgotten",
            TERNARY_KERNEL,
            "kUnits = 4;  // a word each\n  static constexpr int32_t kOffset = 1",
            "kUnits = 4;\n  static constexpr int32_t kOffset = 0",
        ),
        Mutant(
            "tiles: offset forgotten",
            TERNARY_KERNEL,
            "struct TernaryStage {\n  static constexpr int32_t kOffset = 1",
            "struct TernaryStage {\n  static constexpr int32_t kOffset = 0",
        ),
        Mutant("codes in the wrong order", TERNARY_KERNEL, ">> 2 * f &", ">> 2 * (f ^ 1) &"),
        Mutant("groups: wrong lane", TERNARY_KERNEL, ">> 2 * quarter &", ">> 2 * (quarter ^ 1) &"),
        Mutant("groups: words swapped", TERNARY_KERNEL, "pair + i / 2)", "pair + 1 - i / 2)"),
        Mutant("groups: wrong chunk", TERNARY_KERNEL, "chunk < (g + 1) *", "chunk + 1 < (g + 1) *"),
        Mutant(
            "groups: descending", TERNARY_KERNEL, "n * groups + g]", "n * groups + groups - 1 - g]"
        ),
        Mutant("groups: carry", TERNARY_KERNEL, "+ 0x7f7f7f7fu)", "+ 0xffffffffu)"),
        Mutant(
            "groups: rows behind the last read",
            TERNARY_KERNEL,
            "if (m0 + row < linear.m) {",
            "{",
            "outside of q",
        ),
        Mutant(
            "groups: columns behind the last written",
            TERNARY_KERNEL,
            "if (n >= linear.n || m >= linear.m) continue;",
            "if (m >= linear.m) continue;",
        ),
    )
]


INT8_SM90A, TERNARY_SM90A = "int8_linear/cuda_sm90a.cu", "ternary_linear/cuda_sm90a.cu"
TILE = "common/cuda/tile.cuh"
PIPELINE = "common/cuda/pipeline.cuh"


def sm90a_mutants(kernel: str) -> list[Mutant]:
    """Those that apply to both kernels."""
    return [
        Mutant(
            "stage not waited for", kernel, "      mbarrier_wait(stage.landed, stage.parity);\n", ""
        ),
        Mutant(
            "wrong parity",
            kernel,
            "mbarrier_wait(stage.free, stage.parity ^ 1u)",
            "mbarrier_wait(stage.free, stage.parity)",
            "deadlock",
        ),
        Mutant("sums used before they are there", kernel, "wgmma_wait<0>();", "wgmma_wait<1>();"),
        Mutant(
            "wrong count of bytes",
            kernel,
            "(stage.landed, kStageBytes)",
            "(stage.landed, kStageBytes / 2)",
        ),
        Mutant(
            "barriers not shown", kernel, "    fence_mbarrier_init();\n", "", "fence_mbarrier_init"
        ),
        Mutant("registers not fenced", kernel, "      wgmma_fence();\n", "", "without wgmma_fence"),
        Mutant("outputs read too early", kernel, "      }\n    __syncwarp();\n", "      }\n"),
        Mutant(
            "wrong count of arrivals",
            PIPELINE,
            "sizeof(Mbarrier)), kConsumerWarps)",
            "sizeof(Mbarrier)), 1)",
        ),
        Mutant(
            "wrong stage",
            kernel,
            "load_tile(stage.tile, x_map",
            "load_tile(ring.use(used + 1).tile, x_map",
        ),
        Mutant("wrong swizzle", TILE, "kSwizzle128 = 1", "kSwizzle128 = 2", "swizzle"),
        Mutant("wrong stride of rows", TILE, "kEightRows = 8 *", "kEightRows = 4 *"),
        Mutant(
            "rows behind the last stored",
            FINISH,
            "    if (m >= linear.m) continue;\n",
            "",
            "outside of|was overrun",
        ),
        Mutant(
            "columns behind the last stored",
            FINISH,
            "        if (n + i < linear.n)",
            "        if (true)",
        ),
        Mutant(
            "units behind the last stored",
            FINISH,
            "if (n < linear.n) store_global<16>",
            "store_global<16>",
        ),
    ]


SM90A_MUTANTS = [("int8_linear", mutant) for mutant in sm90a_mutants(INT8_SM90A)]
SM90A_MUTANTS += [("ternary_linear", mutant) for mutant in sm90a_mutants(TERNARY_SM90A)]
SM90A_MUTANTS += [
    ("int8_linear", mutant)
    for mutant in (
        Mutant(
            "stage never freed",
            INT8_SM90A,
            "    if (signals) mbarrier_arrive(ring",
            "    if (false) mbarrier_arrive(ring",
            "deadlock",
        ),
        Mutant("freed before it is read", INT8_SM90A, "wgmma_wait<1>()", "wgmma_wait<2>()"),
        Mutant(
            "wrong stage freed",
            INT8_SM90A,
            "if (step > 0 && signals) mbarrier_arrive(ring.use(used - 1).free)",
            "if (step > 0 && signals) mbarrier_arrive(ring.use(used).free)",
        ),
        Mutant("wrong k step", INT8_SM90A, "kStageABytes + k),", "kStageABytes),"),
        Mutant(
            "wrong rows of A",
            INT8_SM90A,
            "stage.tile + group * kGroupRows",
            "stage.tile + (1 - group) * kGroupRows",
        ),
        Mutant("sums not cleared", INT8_SM90A, "step > 0 || k > 0", "true"),
        Mutant("wrong operand", INT8_SM90A, "int(tile.column) * kTileN", "int(tile.row) * kTileN"),
    )
]
SM90A_MUTANTS += [
    ("ternary_linear", mutant)
    for mutant in (
        Mutant(
            "stage never freed",
            TERNARY_SM90A,
            "if (signals) mbarrier_arrive(stage.free)",
            "",
            "deadlock",
        ),
        Mutant(
            "packed tile never freed",
            TERNARY_SM90A,
            "if (signals) mbarrier_arrive(packed.free)",
            "",
            "deadlock",
        ),
        Mutant(
            "packed tile not waited for",
            TERNARY_SM90A,
            "if (step % kStepsOfPacked == 0) mbarrier_wait(packed.landed, packed.parity);",
            "",
        ),
        Mutant(
            "packed tile freed before all lanes read it",
            TERNARY_SM90A,
            "        __syncwarp();  // all",
            "        // all",
        ),
        Mutant("wrong swizzle of codes", TERNARY_SM90A, "packed + swizzled(at)", "packed + at"),
        Mutant(
            "wrong step in the packed tile",
            TERNARY_SM90A,
            "lane / 4, step % kStepsOfPacked,",
            "lane / 4, 0,",
        ),
        Mutant(
            "wrong lane", TERNARY_SM90A, "words.y >> 2 * quarter", "words.y >> 2 * (quarter ^ 1)"
        ),
        Mutant(
            "halves swapped",
            TERNARY_SM90A,
            "a[product][half + 2] = words.y",
            "a[product][half + 2] = words.x",
        ),
        Mutant("sums not cleared", TERNARY_SM90A, "step > 0 || product > 0", "true"),
        Mutant("offset forgotten", TERNARY_SM90A, "kOffset = 1", "kOffset = 0"),
    )
]


@pytest.mark.parametrize(
    ("op", "mutant"),
    SM90A_MUTANTS,
    ids=[f"{op}-{m.bug.replace(' ', '-')}" for op, m in SM90A_MUTANTS],
)
def test_bug_planted_for_sm90a_is_caught(op, mutant):
    def run_schedules() -> None:
        for seed in (1, 2, 3):  # a race shows in most schedules, not in all
            assert_matches_reference(op, mutant, seed, capability=90)

    with pytest.raises(AssertionError) as caught:
        run_schedules()
    if mutant.report is not None:
        caught.match(mutant.report)


@pytest.mark.parametrize(
    ("op", "mutant"), MUTANTS, ids=[f"{op}-{m.bug.replace(' ', '-')}" for op, m in MUTANTS]
)
def test_planted_bug_is_caught(op, mutant):
    with pytest.raises(AssertionError) as caught:
        assert_matches_reference(op, mutant, seed=1)
    if mutant.report is not None:
        caught.match(mutant.report)
