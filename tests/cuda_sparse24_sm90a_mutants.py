"""Bugs to plant in the sm_90a kernel of sparse24_linear."""

from cuda_kernels import BY_SCHEDULE, Mutant
from cuda_trials import Trial

KERNEL = "sparse24_linear/cuda_sm90a.cu"
UNDEFINED = "do not ascend"  # of metadata that were never loaded


def mutant(bug: str, old: str, new: str, report: str | None = None) -> Mutant:
    return Mutant(f"wgmma: {bug}", KERNEL, old, new, report)


MUTANTS = [
    Trial("sparse24_linear", each, 90, (1, 2, 3))  # a race shows in most schedules, not in all
    for each in (
        mutant(
            "weight not waited for",
            "weight = weights.await(used)",
            "weight = weights.use(used)",
            UNDEFINED,
        ),
        mutant("x not waited for", "stage = ring.await(", "stage = ring.use(", BY_SCHEDULE),
        mutant(
            "weight never freed",
            "        if (step > 0 && half == 0) weights.release(used - 1);\n",
            "",
            "deadlock",
        ),
        mutant(
            "last tile of x never freed",
            "    ring.release(used * kHalves - 1);\n",
            "",
            "deadlock",
        ),
        mutant(
            "weight freed before it is read",
            "if (step > 0 && half == 0) weights.release(used - 1)",
            "if (step > 0 && half == 0) weights.release(used)",
            BY_SCHEDULE,
        ),
        mutant("metadata overwritten", "wgmma_wait<1>()", "wgmma_wait<2>()", BY_SCHEDULE),
        mutant("sums used before they are there", "wgmma_wait<0>()", "wgmma_wait<1>()"),
        mutant("sums not cleared", "step > 0 || half > 0);", "true);"),
        mutant("undefined metadata", "word == 0 ? kSparse24AnyIndices : word", "word", UNDEFINED),
        mutant("16 bits: wrong lanes", "half + lane % 4 / 2;", "half + lane % 2;"),
        mutant("16 bits: wrong half of a word", "0x5410 : 0x7632", "0x7632 : 0x5410"),
        mutant("16 bits: wrong selector", "kSecondSelector = 1;", "kSecondSelector = 0;"),
        mutant(
            "8 bits: wrong lanes",
            "lane % 2 * 8 * kBoxWords + lane % 4 / 2",
            "lane % 4 / 2 * 8 * kBoxWords + lane % 2",
        ),
        mutant("8 bits: wrong box", "(step * Weight::kBoxes + box)", "(step + box)"),
        mutant("wrong half of the values", "half * kProducts * kStepValueBytes", "0"),
        mutant("wrong step of x", "stage.tile + kStepBytes", "stage.tile + kStepValueBytes"),
        mutant(
            "wrong rows of metadata", "kGroupRows + warp * 16 + lane / 4)", "kGroupRows + lane / 4)"
        ),
        mutant("one tile for two blocks", "kCluster + cluster_rank())", "kCluster)"),
        mutant("matrices of outputs swapped", "lane / 16 * 8 + lane % 8", "lane % 16"),
        mutant("one buffer for outputs", "staging + part % 2 * kPartRows * kStride", "staging"),
        mutant(
            "next tile's outputs too early",
            "if constexpr (kCount / 8 % 2 != 0)",
            "if constexpr (false)",
        ),
        mutant(
            "one rounding less",
            "* (x_scale[m0 + m < linear.m ? m : 0])) * scale[block][i % 2]",
            "* (x_scale[m0 + m < linear.m ? m : 0] * scale[block][i % 2]))",
        ),
    )
]
