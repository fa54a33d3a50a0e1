"""What the CUDA kernels are to reach, as `benchmarks.goals` judges it."""

from collections.abc import Callable, Iterator, Mapping

from benchmarks.goals import Figures, Goal, at
from benchmarks.gpu.ceilings import GpuCeilings
from benchmarks.table import SHAPE

LARGE_BYTES = 64_000_000  # of packed weight: beyond any L2
CLASSES = 128256  # of Llama 3
FEW = (1, 2, 4, 8, 16)


class Result:
    """A saved run: times by contestant and shape, and the best of each ceiling."""

    def __init__(self, saved: Mapping) -> None:
        self.rows = saved["rows"]
        measured = [GpuCeilings(**c) for c in saved["ceilings"]]
        self.copy_gb_s = max((c.copy_gb_s for c in measured), default=None)
        self.int8_top_s = max((c.int8_top_s for c in measured), default=None)

    def of(self, name: str, least: int = 1, most: int = 10**9) -> Iterator[Mapping]:
        """The rows of a contestant for `least` to `most` rows of activations."""
        for row in self.rows:
            if row["name"] == name and least <= row["M"] <= most:
                yield row

    def us(self, name: str, like: Mapping, **shape: int) -> float | None:
        """What `name` takes at the shape of the row `like`, but for `shape`."""
        wanted = {key: like[key] for key in SHAPE if key in like} | shape
        for row in self.rows:
            if row["name"] == name and all(row.get(key) == wanted[key] for key in wanted):
                return row["us"]
        return None


def share_of_copy(op: str, most: int) -> Callable[[Result], Figures]:
    """Of the bandwidth, by `op` with 1 to `most` rows and large weights."""

    def figures(result: Result) -> Figures:
        for row in result.of(op, most=most):
            if row["bytes_moved"] >= LARGE_BYTES and result.copy_gb_s:
                yield row["gb_s"] / result.copy_gb_s, at(row)

    return figures


def times_as_fast(
    op: str, peer: str, least: int, most: int, large: bool = False, products: int = 0
) -> Callable[[Result], Figures]:
    """`large`: with weights beyond any L2; `products`: of a dense layer, at least."""

    def figures(result: Result) -> Figures:
        for row in result.of(op, least, most):
            theirs = result.us(peer, row)
            small = large and row["bytes_moved"] < LARGE_BYTES
            if theirs and not small and row["M"] * row["N"] * row["K"] >= products:
                yield theirs / row["us"], at(row)

    return figures


def flat(op: str) -> Callable[[Result], Figures]:
    """The longest time of FEW rows over that of one row, for each layer."""

    def figures(result: Result) -> Figures:
        for one in result.of(op, most=1):
            times = [result.us(op, one, M=m) for m in FEW]
            if all(times):
                yield max(times) / one["us"], f"N {one['N']} K {one['K']}"

    return figures


def int8_rate(result: Result) -> Figures:
    """The larger of: the rate over 1300 TOPS, and over cuBLASLt's. The rate is the product's: the
    op less quantize_rows, which cuBLASLt does not do."""
    side = 8192
    for row in result.of("int8_linear", side, side):
        before = result.us("quantize_rows", {"M": side, "K": side})
        if (row["N"], row["K"]) == (side, side) and before:
            tops = 2 * side**3 / (row["us"] - before) / 1e6
            best = result.int8_top_s
            rates = [tops / 1300, *([tops / best] if best else [])]
            of_cublas = f", cuBLASLt {best:.0f}" if best else ""
            yield max(rates), f"{tops:.0f} TOPS{of_cublas}, of {row['us']:.0f} us all in all"


def over_floor(result: Result) -> Figures:
    """The time of a loss over what copying takes for as many bytes as it has to move."""
    for row in result.rows:
        of_bf16 = row["name"].startswith("softmax_kl bf16 ")
        if of_bf16 and row["classes"] == CLASSES and result.copy_gb_s:
            divergence = row["name"].split(" ")[-1]
            yield result.copy_gb_s / row["gb_s"], f"{divergence} {at(row)}"


def of_linear_loss(figure: Callable[[Result, Mapping], float | None]) -> Callable:
    def figures(result: Result) -> Figures:
        for row in result.rows:
            if row["name"] == "linear_softmax_kl" and (found := figure(result, row)) is not None:
                yield found, at(row)

    return figures


def _over_liger(result: Result, row: Mapping) -> float | None:
    theirs = result.us("Liger", row)
    return theirs and theirs / row["us"]


def _transient_mib(result: Result, row: Mapping) -> float | None:
    size = row.get("transient_bytes")
    return None if size is None else size / 2**20


DENSE = "nn.Linear bf16"
GOALS = (
    Goal(
        "ternary, 1 row, weight >= 64 MB: share of the copy bandwidth",
        0.70,
        share_of_copy("ternary_linear", 1),
    ),
    Goal(
        "ternary, 1 row, weight >= 64 MB: times as fast as bf16 nn.Linear",
        6,
        times_as_fast("ternary_linear", DENSE, 1, 1, large=True),
    ),
    Goal(
        "ternary, 1 to 16 rows: longest time over that of one row",
        1.3,
        flat("ternary_linear"),
        at_most=True,
    ),
    Goal(
        "ternary, 4096 rows: times as fast as bf16 nn.Linear",
        1.6,
        times_as_fast("ternary_linear", DENSE, 4096, 4096),
    ),
    Goal(
        "INT8 product at 8192^3: TOPS over 1300, or over cuBLASLt's if that is more", 1, int8_rate
    ),
    Goal(
        "quantise + INT8 product, >= 1024 rows: times as fast as bf16 nn.Linear",
        1.6,
        times_as_fast("int8_linear", DENSE, 1024, 10**9),
    ),
    Goal(
        "INT8, 1 to 32 rows, weight >= 64 MB: share of the copy bandwidth",
        0.75,
        share_of_copy("int8_linear", 32),
    ),
    *(
        Goal(
            f"2:4 {values}, {which}: times as fast as {peer}",
            goal,
            times_as_fast(f"sparse24_linear {values}", peer, *rows, large=large, products=products),
        )
        for values in ("bf16", "int8")
        for which, peer, goal, rows, large, products in (
            ("4096^3 and more", f"cuSPARSELt {values}", 1.05, (1, 10**9), False, 4096**3),
            ("4096^3 and more", DENSE, 1.5, (1, 10**9), False, 4096**3),
            ("1 to 64 rows, weight >= 64 MB", DENSE, 1.4, (1, 64), True, 0),
        )
    ),
    Goal(
        f"softmax_kl bf16, forward + backward, {CLASSES} classes: time over copying its bytes",
        1.26,
        over_floor,
        at_most=True,
    ),
    Goal(
        "linear_softmax_kl bf16: TFLOP/s, of four products",
        660,
        of_linear_loss(lambda result, row: row["gop_s"] / 1e3),
    ),
    Goal("linear_softmax_kl bf16: times as fast as Liger", 1.3, of_linear_loss(_over_liger)),
    Goal(
        "linear_softmax_kl bf16: MiB beside arguments and gradients",
        512,
        of_linear_loss(_transient_mib),
        at_most=True,
    ),
)
