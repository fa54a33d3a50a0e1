"""Bugs to plant in the CUDA kernels of the integer linear ops."""

from cuda_kernels import BY_SCHEDULE, Mutant
from cuda_trials import Trial

OPS = ("int8_linear", "ternary_linear")
FEW_ROWS = "common/cuda/few_rows.cuh"
MANY_ROWS = "common/cuda/many_rows.cuh"
FINISH = "common/cuda/finish.cuh"
# Planted in the kernel that both ops share, and seen through each of them.
SHARED_MUTANTS = (
    Mutant("missing barrier", FEW_ROWS, "  __syncthreads();\n", ""),
    Mutant(
        "weight rows behind the last read",
        FEW_ROWS,
        "if (chunk < chunks && n < linear.n &&",
        "if (chunk < chunks &&",
        "outside of the weight",
    ),
    Mutant(
        "chunks behind the last read",
        FEW_ROWS,
        "if (chunk < chunks && n < linear.n &&",
        "if (n < linear.n &&",
        "outside of the weight",
    ),
    Mutant(
        "activation rows behind the last read",
        FEW_ROWS,
        "if (chunk < chunks && m < linear.m &&",
        "if (chunk < chunks &&",
        "outside of q",
    ),
    Mutant(
        "columns behind the last written",
        FEW_ROWS,
        "if (n >= linear.n || m >= linear.m) continue;",
        "if (m >= linear.m) continue;",
        "outside of",
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
        "first += kDepth * kWarps * kLanesOfRow",
        "first += (kDepth + 1) * kWarps * kLanesOfRow",
    ),
    Mutant("one warp forgotten", FEW_ROWS, "w < kWarps; ++w", "w + 1 < kWarps; ++w"),
    Mutant("rows of A swapped", FEW_ROWS, "half * 8 + row;", "(1 - half) * 8 + row;"),
    Mutant("sums in the wrong place", FEW_ROWS, "(r % 8 * 4 + c / 2)", "(c / 2 * 8 + r % 8)"),
    Mutant(
        "shared array too short",
        FEW_ROWS,
        "partial, kWarps * kTiles * kWarpThreads)",
        "partial, (kWarps - 1) * kTiles * kWarpThreads)",
        "outside of a shared array",
    ),
    Mutant(
        "tiles: missing barrier",
        MANY_ROWS,
        "    __syncthreads();\n    const int64_t next",
        "    const int64_t next",
    ),
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
    Mutant(
        "tiles: rows behind the last written",
        MANY_ROWS,
        "linear.m - m0, linear.n - n0",
        "kTile, linear.n - n0",
        "outside of",
    ),
    Mutant(
        "tiles: columns behind the last written",
        MANY_ROWS,
        "linear.m - m0, linear.n - n0",
        "linear.m - m0, kTile",
        "outside of",
    ),
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
MUTANTS = [Trial(op, mutant) for op in OPS for mutant in SHARED_MUTANTS]
INT8_KERNEL = "int8_linear/cuda.cu"
MUTANTS += [
    Trial("int8_linear", mutant)
    for mutant in (
        Mutant(
            "tiles: behind the end of a weight row",
            MANY_ROWS,
            "n0 + row < linear.n && at < linear.weight_stride",
            "n0 + row < linear.n",
            "outside of the weight",
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
            "quantize_rows/rows.cuh",
            "fminf(fmaxf(x / scale, low), high)",
            "fmaxf(x / scale, low)",
        ),
        Mutant(
            "padding not zero",
            "quantize_rows/cuda.cu",
            "i + j < problem.k && finite",
            "finite",
            "outside of x",
        ),
    )
]
TERNARY_KERNEL = "ternary_linear/cuda.cu"
MUTANTS += [
    Trial("ternary_linear", mutant)
    for mutant in (
        Mutant(
            "offset forgotten",
            TERNARY_KERNEL,
            "kMostSets = 2;\n  static constexpr int32_t kOffset = 1",
            "kMostSets = 2;\n  static constexpr int32_t kOffset = 0",
        ),
        Mutant(
            "tiles: offset forgotten",
            TERNARY_KERNEL,
            "using Sum = int32_t;\n  static constexpr int32_t kOffset = 1",
            "using Sum = int32_t;\n  static constexpr int32_t kOffset = 0",
        ),
        Mutant(
            "codes in the wrong order",
            TERNARY_KERNEL,
            ">> 2 * (f - f % kSets)",
            ">> 2 * (f ^ kSets)",
        ),
        Mutant(
            "sets of sums mixed",
            FEW_ROWS,
            "sums[f0 % kSets][t][b], a",
            "sums[(f0 + 1) % kSets][t][b], a",
        ),
        Mutant("set not scaled down", FEW_ROWS, "[i] >> 2 * set", "[i]"),
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
            "outside of",
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
            "tile not waited for",
            PIPELINE,
            "    mbarrier_wait(tile.landed, tile.parity);\n",
            "",
            BY_SCHEDULE,
        ),
        Mutant(
            "wrong parity",
            PIPELINE,
            "(tile.free, tile.parity ^ 1u)",
            "(tile.free, tile.parity)",
            "deadlock",
        ),
        Mutant("sums used before they are there", kernel, "wgmma_wait<0>();", "wgmma_wait<1>();"),
        Mutant(
            "wrong count of bytes",
            PIPELINE,
            "(tile.landed, kTileBytes)",
            "(tile.landed, kTileBytes / 2)",
            "deadlock",
        ),
        Mutant(
            "barriers not shown",
            PIPELINE,
            "    fence_mbarrier_init();\n",
            "",
            "fence_mbarrier_init",
        ),
        Mutant("registers not fenced", kernel, "      wgmma_fence();\n", "", "without wgmma_fence"),
        Mutant("outputs read too early", kernel, "      }\n    __syncwarp();\n", "      }\n"),
        Mutant(
            "wrong count of arrivals", PIPELINE, "kConsumerWarps * kBlocks);", "1);", BY_SCHEDULE
        ),
        Mutant(
            "the other block not waited for",
            PIPELINE,
            "kConsumerWarps * kBlocks);",
            "kConsumerWarps);",
            BY_SCHEDULE,
        ),
        Mutant(
            "released to the own block alone",
            PIPELINE,
            "free, lane)",
            "free, cluster_rank())",
            BY_SCHEDULE,
        ),
        Mutant("released to one block", PIPELINE, "lane < kBlocks", "lane < 1", "deadlock"),
        Mutant("wrong ranks", PIPELINE, "uint16_t((1 << kCluster) - 1)", "uint16_t(1)", "deadlock"),
        Mutant("share in the wrong place", PIPELINE, "to + first * kTileRowBytes", "to"),
        Mutant("wrong share", PIPELINE, "x, y + first", "x, y"),
        Mutant(
            "begun before the other block",
            PIPELINE,
            "__syncthreads() : cluster_sync()",
            "__syncthreads() : __syncthreads()",
            "no mbarrier was initialised|outside of every shared array",
        ),
        Mutant(
            "left before the other block",
            PIPELINE,
            "  if constexpr (kCluster > 1) cluster_sync();\n",
            "",
            "has ended",
        ),
        Mutant("one tile for two blocks", kernel, "kCluster + cluster_rank())", "kCluster)"),
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
            "outside of y|y .* was overrun",
        ),
        Mutant(
            "units behind the last stored",
            FINISH,
            "if (n < linear.n) store_global<16>",
            "store_global<16>",
            "outside of y|y .* was overrun",
        ),
    ]


def sm90a_trial(op: str, mutant: Mutant) -> Trial:
    return Trial(op, mutant, 90, (1, 2, 3))  # a race shows in most schedules, not in all


MUTANTS += [sm90a_trial("int8_linear", mutant) for mutant in sm90a_mutants(INT8_SM90A)]
MUTANTS += [sm90a_trial("ternary_linear", mutant) for mutant in sm90a_mutants(TERNARY_SM90A)]
MUTANTS += [
    sm90a_trial("int8_linear", mutant)
    for mutant in (
        Mutant(
            "stage never freed",
            INT8_SM90A,
            "    ring.release(used - 1);\n    const int64_t m0",
            "    const int64_t m0",
            "deadlock",
        ),
        Mutant("freed before it is read", INT8_SM90A, "wgmma_wait<1>()", "wgmma_wait<2>()"),
        Mutant(
            "wrong stage freed",
            INT8_SM90A,
            "if (step > 0) ring.release(used - 1)",
            "if (step > 0) ring.release(used)",
            BY_SCHEDULE,
        ),
        Mutant(
            "wrong stage",
            INT8_SM90A,
            "load_tile(stage.tile, x_map",
            "load_tile(ring.use(used + 1).tile, x_map",
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
MUTANTS += [
    sm90a_trial("ternary_linear", mutant)
    for mutant in (
        Mutant("stage never freed", TERNARY_SM90A, "      ring.release(used);\n", "", "deadlock"),
        Mutant(
            "packed tile never freed",
            TERNARY_SM90A,
            "packed_ring.release(packed_used++)",
            "++packed_used",
            "deadlock",
        ),
        Mutant(
            "packed tile not waited for",
            TERNARY_SM90A,
            "if (step % kStepsOfPacked == 0) packed_ring.await(packed_used);",
            "",
        ),
        Mutant(
            "wrong stage",
            TERNARY_SM90A,
            "<kTileRows>(stage.tile, x_map",
            "<kTileRows>(ring.use(used + 1).tile, x_map",
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


MUTANTS += [
    sm90a_trial(
        "int8_linear",
        Mutant("never activated", INT8_SM90A, " == Activation::none", " <= Activation::gelu_tanh"),
    ),
    Trial(
        "int8_linear",
        Mutant(
            "tiles: activated before all lanes wrote",
            MANY_ROWS,
            "      __syncwarp();\n      store_activated_rows",
            "      store_activated_rows",
        ),
        seeds=(1, 2, 3),
    ),
    Trial(
        "ternary_linear",
        Mutant(
            "GELU of negative values is theirs less the tail",
            "common/activation.h",
            "return positive_part(x) - t",
            "return x - t",
        ),
    ),
    Trial(
        "ternary_linear",
        Mutant(
            "groups: never activated",
            TERNARY_KERNEL,
            "activated(linear.activation, value)",
            "value",
        ),
    ),
]
