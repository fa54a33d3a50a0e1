"""Bugs to plant in the CUDA kernels of sparse24_linear."""

from cuda_kernels import BY_SCHEDULE, Mutant
from cuda_trials import Trial

FEW_ROWS = "sparse24_linear/few_rows.cuh"
TILES = "sparse24_linear/tiles.cuh"
VALUES = "sparse24_linear/values.cuh"
COMMON = "common/cuda/few_rows.cuh"
ANY_INDICES = "positions of row .* do not ascend"
OUTSIDE = "outside of"
MUTANTS = [
    Trial("sparse24_linear", mutant)
    for mutant in (
        Mutant("missing barrier", FEW_ROWS, "  __syncthreads();\n", ""),
        Mutant(
            "weight rows behind the last read",
            FEW_ROWS,
            "if (at < linear.weight_stride && n < linear.n)",
            "if (at < linear.weight_stride)",
            "outside of the weight",
        ),
        Mutant(
            "values behind the last read",
            FEW_ROWS,
            "if (at < linear.weight_stride && n < linear.n)",
            "if (n < linear.n)",
            "outside of the weight",
        ),
        Mutant(
            "indices of rows behind the last read",
            FEW_ROWS,
            "  if (n >= sparse.linear.n) return;\n",
            "",
            "outside of the indices",
        ),
        Mutant(
            "indices behind the last read",
            FEW_ROWS,
            "if (first < sparse.chunks) load",
            "load",
            "outside of the indices",
        ),
        Mutant(
            "indices where there are none",
            "sparse24_linear/cuda.h",
            "0x44444444u",
            "0u",
            ANY_INDICES,
        ),
        Mutant(
            "loads of indices that are not aligned",
            FEW_ROWS,
            "sparse.chunks % Indices<Values>::kWords != 0",
            "sparse.chunks == 1",
            "not aligned",
        ),
        Mutant(
            "rows of x behind the last read",
            FEW_ROWS,
            "m < linear.m ? rows + m * linear.q_stride : nullptr",
            "rows + m * linear.q_stride",
            OUTSIDE,
        ),
        Mutant(
            "x behind the last column read",
            FEW_ROWS,
            "row != nullptr && at + i * 16 < bytes",
            "row != nullptr",
            OUTSIDE,
        ),
        Mutant(
            "lanes take pieces in order", FEW_ROWS, "quarter % 2 * 2 + quarter / 2;", "quarter;"
        ),
        Mutant("words not exchanged", FEW_ROWS, "odd ? even_word : odd_word, 1)", "own, 1)"),
        Mutant("int8: wrong byte of indices", FEW_ROWS, "2 * product + quarter / 2)", "product)"),
        Mutant(
            "int8: metadata of the other rows",
            FEW_ROWS,
            "row_n + quarter % 2 * 8",
            "row_n + quarter / 2 * 8",
        ),
        Mutant("16 bits: wrong nibbles", FEW_ROWS, "quarter % 2 * 4;", "quarter / 2 * 4;"),
        Mutant("16 bits: wrong bytes", FEW_ROWS, "0x6420 : 0x7531", "0x7531 : 0x6420"),
        Mutant(
            "16 bits: wrong selector",
            FEW_ROWS,
            "if (step == 1) {",
            "if (step == 2) {",
        ),
        Mutant(
            "wrong unit", FEW_ROWS, "first += kDepth * kWarps)", "first += (kDepth + 1) * kWarps)"
        ),
        Mutant(
            "shared array too short",
            FEW_ROWS,
            "partial, kWarps * kTiles * kWarpThreads)",
            "partial, (kWarps - 1) * kTiles * kWarpThreads)",
            "outside of a shared array",
        ),
        Mutant("sums of floats wrap", COMMON, "std::is_same_v<Sum, float>, float", "false, float"),
        Mutant("bias forgotten", VALUES, "column.has_bias ? sum + column.bias : sum", "sum"),
        Mutant("tiles: missing barrier", TILES, "    __syncthreads();\n", "", BY_SCHEDULE),
        Mutant(
            "tiles: staging begun before the last stage is read",
            TILES,
            "  __syncthreads();  // the stages",
            "  // the stages",
        ),
        Mutant(
            "tiles: wrong wait count",
            TILES,
            "copy_async_wait<kStages - 2>()",
            "copy_async_wait<7>()",
        ),
        Mutant(
            "tiles: a group is not closed",
            TILES,
            "load_stage(step + kStages - 1);\n    copy_async_commit();",
            "load_stage(step + kStages - 1), copy_async_commit();",
        ),
        Mutant(
            "tiles: rows behind the last read",
            TILES,
            "    if (m < linear.m)\n",
            "",
            OUTSIDE + "|far from",
        ),
        Mutant(
            "tiles: x behind the last column read",
            TILES,
            " && at + unit * kCopyBytes < x_bytes",
            "",
            OUTSIDE,
        ),
        Mutant(
            "tiles: weight rows behind the last read",
            TILES,
            "    if (n < linear.n)\n",
            "",
            "outside of the weight",
        ),
        Mutant(
            "tiles: values behind the last read",
            TILES,
            " && at + unit * kCopyBytes < value_bytes",
            "",
            "outside of the weight",
        ),
        Mutant(
            "tiles: wrong swizzle of values",
            TILES,
            "values + value_unit_offset(row, unit)",
            "values + value_unit_offset(row ^ 4, unit)",
        ),
        Mutant(
            "tiles: indices that are not aligned",
            TILES,
            " chunks % Tiles::kGroupWords == 0;",
            "true;",
            "not aligned|outside of the indices",
        ),
        Mutant(
            "tiles: indices behind the last read",
            TILES,
            "from != nullptr && first + i < chunks ? from",
            "from != nullptr ? from",
            "outside of the indices|do not ascend",
        ),
        Mutant(
            "tiles: one group of indices too few",
            TILES,
            "/ kGroupStages + 1;",
            "/ kGroupStages;",
            BY_SCHEDULE,
        ),
        Mutant(
            "tiles: wrong word of indices",
            TILES,
            "step % Tiles::kGroupStages * Tiles::kStageWords",
            "0",
        ),
        Mutant("tiles: int8: wrong metadata", TILES, "word + quarter / 2)", "word)"),
        Mutant("tiles: 16 bits: halves swapped", TILES, "0x5410 : 0x7632", "0x7632 : 0x5410"),
        Mutant("tiles: 16 bits: wrong tile", TILES, "? i + quarter / 2 : i)", "? i : i)"),
        Mutant("tiles: 16 bits: wrong selector", TILES, "if (i % 2 == 1) {", "if (i % 2 == 2) {"),
        Mutant(
            "tiles: wrong stage computed",
            TILES,
            "compute_stage(step);",
            "compute_stage(step > 0 ? step - 1 : step);",
        ),
        Mutant(
            "tiles: outputs in the wrong place",
            TILES,
            "2 * (lane % 4) + s % 2, column",
            "2 * (lane % 4) + s / 2, column",
        ),
        Mutant(
            "tiles: outputs stored too early",
            TILES,
            "    __syncwarp();\n    store_rows",
            "    store_rows",
        ),
        Mutant(
            "tiles: bias of columns behind the last",
            TILES,
            "n < linear.n ? n : 0)",
            "n)",
            OUTSIDE,
        ),
        Mutant(
            "tiles: scales of rows behind the last",
            TILES,
            "m < linear.m ? m : 0,",
            "m,",
            OUTSIDE,
        ),
    )
]
