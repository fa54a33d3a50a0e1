"""What the CPU kernels are to reach, as `benchmarks.goals` judges it.

Goals in milliseconds were set for a Cascade Lake with 2 cores, and so were the rates that ternary
layers have to reach with AVX2: those of I2_S of bitnet.cpp, which is AVX2, on it. All else are
ratios and shares, with one thread where it does not say two.
"""

from collections.abc import Callable, Iterator, Mapping
from statistics import median

from benchmarks.ceilings import Ceilings
from benchmarks.goals import Figures, Goal, at
from benchmarks.table import SHAPE

LARGE = (1024, 32000), (512, 128256)  # rows and classes of the losses
SMALL = (4096, 1000)
USUAL_LOSSES = tuple(f"{name} + cross-entropy" for name in ("forward_kl", "reverse_kl", "jsd"))
LINEAR = ("ternary_linear", "int8_linear", "sparse24_linear int8", "sparse24_linear fp32")


class Result:
    """A saved run: times by contestant and shape, and the ceilings."""

    def __init__(self, saved: Mapping) -> None:
        self.rows = saved["rows"]
        self.ceilings = [Ceilings(**c) for c in saved["ceilings"]]

    def of(self, name: str, **where: object) -> Iterator[Mapping]:
        """The rows of a contestant at that shape, number of threads and place of the weights."""
        for row in self.rows:
            if row["name"] == name and all(row.get(key) == value for key, value in where.items()):
                yield row

    def us(self, name: str, like: Mapping, **where: object) -> float | None:
        """What `name` takes where the row `like` was measured, but for `where`."""
        keys = ("suite", "threads", "weights", *SHAPE)
        wanted = {key: like[key] for key in keys if key in like} | where
        return next((row["us"] for row in self.of(name, **wanted)), None)


def share(op: str, weights: str, rows: tuple[int, ...]) -> Callable[[Result], Figures]:
    """Of the ceiling that binds `op`."""

    def figures(result: Result) -> Figures:
        for m in rows:
            for row in result.of(op, M=m, weights=weights, threads=1, suite="linear"):
                yield row["share"], at(row)

    return figures


def times_as_fast(
    op: str, peer: str, rows: tuple[int, ...], weights: tuple[str, ...] = ("cold",)
) -> Callable[[Result], Figures]:
    def figures(result: Result) -> Figures:
        for m in rows:
            for row in result.of(op, M=m, threads=1, suite="linear"):
                theirs = result.us(peer, row)
                if theirs and row["weights"] in weights:
                    yield theirs / row["us"], at(row)

    return figures


def packed_gb_s(size: int, weights: str) -> Callable[[Result], Figures]:
    """Of packed ternary weights."""

    def figures(result: Result) -> Figures:
        for row in result.of("ternary_linear", M=1, N=size, K=size, weights=weights, threads=1):
            yield row["gb_s"], at(row)

    return figures


def ternary_gop_s(rows: int) -> Callable[[Result], Figures]:
    def figures(result: Result) -> Figures:
        for row in result.of("ternary_linear", M=rows, weights="cold", threads=1, suite="linear"):
            yield row["gop_s"], at(row)

    return figures


def of_two_threads(rows: tuple[int, ...], bound: str) -> Callable[[Result], Figures]:
    """How many times as fast two threads are, where `bound` sets the least time of both."""

    def figures(result: Result) -> Figures:
        for name in LINEAR:
            for m in rows:
                for row in result.of(name, M=m, threads=2, weights="cold", suite="linear"):
                    alone = result.us(name, row, threads=1)
                    if alone and row["bound"] == bound:
                        yield alone / row["us"], f"{name} {at(row)}"

    return figures


def of_memory(result: Result) -> Figures:
    """The gain of a second thread at one row, over that of reading memory."""
    rates = {n: [c.dram_gb_s for c in result.ceilings if c.threads == n] for n in (1, 2)}
    if all(rates.values()):
        gain = median(rates[2]) / median(rates[1])
        for figure, where in of_two_threads((1,), "dram read")(result):
            yield figure / gain, f"{where}: {figure:.2f} of {gain:.2f}"


def loss_ms(kind: str, shape: tuple[int, int]) -> Callable[[Result], Figures]:
    def figures(result: Result) -> Figures:
        for row in result.of(f"softmax_kl {kind} forward_kl", threads=2, **_loss_shape(shape)):
            yield row["us"] / 1e3, at(row)

    return figures


def loss_over(
    peer: str, shapes: tuple[tuple[int, int], ...], kinds: tuple[str, ...] = USUAL_LOSSES
) -> Callable[[Result], Figures]:
    """Times as fast as `peer` at the same loss."""

    def figures(result: Result) -> Figures:
        for shape in shapes:
            for kind in kinds:
                for row in result.of(f"softmax_kl fp32 {kind}", threads=2, **_loss_shape(shape)):
                    if theirs := result.us(f"{peer} fp32 {kind}", row):
                        yield theirs / row["us"], f"{kind} {at(row)}"

    return figures


def over_forward_kl(result: Result) -> Figures:
    """The time of the other divergences over that of forward KL."""
    first = "softmax_kl fp32 forward_kl"
    for row in result.rows:
        is_other = row["name"].startswith("softmax_kl fp32 ") and row["name"] != first
        forward = result.us(first, row)
        if is_other and forward and "cross-entropy" not in row["name"] and row["threads"] == 2:
            yield row["us"] / forward, f"{row['name'].split()[-1]} {at(row)}"


def bf16_over_fp32(result: Result) -> Figures:
    for row in result.of("softmax_kl bf16 forward_kl", threads=2):
        if wide := result.us("softmax_kl fp32 forward_kl", row):
            yield row["us"] / wide, at(row)


def linear_loss(result: Result) -> Figures:
    for row in result.of("linear_softmax_kl fp32", threads=2):
        if eager := result.us("eager fp32", row):
            yield eager / row["us"], at(row)


def minilm_ms(name: str) -> Callable[[Result], Figures]:
    def figures(result: Result) -> Figures:
        for row in result.of(name, threads=1, suite="minilm"):
            yield row["us"] / 1e3, at(row)

    return figures


def minilm_cosine(result: Result) -> Figures:
    for name in ("INT8 eager", "INT8 compiled"):
        for row in result.of(name, suite="minilm"):
            yield 1 - row["error"], name


def over_baseline(suite: str) -> Callable[[Result], Figures]:
    """The time over that of nn.Linear, or of the next aligned shape."""

    def figures(result: Result) -> Figures:
        for row in result.rows:
            if row["suite"] == suite and row["op"]:
                yield 1 / row["x_baseline"], f"{row['name']} {at(row)}"

    return figures


def _loss_shape(shape: tuple[int, int]) -> dict[str, int]:
    return {"rows": shape[0], "classes": shape[1]}


def _shares(op: str, weights: str, goals: Mapping[tuple[int, ...], float]) -> Iterator[Goal]:
    for rows, goal in goals.items():
        which = " and ".join(map(str, rows))
        from_memory = ", from memory" if weights == "cold" else ", from the caches"
        text = f"{op}, {which} row{'s' * (rows != (1,))}{from_memory}: share of the ceiling"
        yield Goal(text, goal, share(op, weights, rows))


def _packed(size: int, weights: str, goal: float) -> Goal:
    place = "from memory" if weights == "cold" else "from the caches"
    text = f"ternary_linear, 1 row, {size}^2 {place}: GB/s of packed weights"
    return Goal(text, goal, packed_gb_s(size, weights))


OF_AVX2 = (
    _packed(4096, "cold", 7.4),
    _packed(2560, "hot", 11.4),
    *(
        Goal(f"ternary_linear, {rows} rows, from memory: GOP/s", goal, ternary_gop_s(rows))
        for rows, goal in ((8, 118), (32, 117), (128, 129), (512, 129))
    ),
    Goal(
        "int8_linear, which is exact: times as fast as fbgemm, which saturates",
        0.8,
        times_as_fast("int8_linear", "torch dynamic fbgemm", (1, 8, 32, 128, 512)),
    ),
    Goal(
        "softmax_kl, KL either way and JSD: times as fast as eager",
        5,
        loss_over("eager", (*LARGE, SMALL)),
    ),
)
OF_AVX512 = (
    *_shares("ternary_linear", "cold", {(1,): 0.9}),
    _packed(2560, "hot", 20),
    *_shares("ternary_linear", "cold", {(8,): 0.4, (32,): 0.58, (128,): 0.72, (512,): 0.8}),
    *_shares("int8_linear", "cold", {(1,): 0.9, (8,): 0.85}),
    *_shares("int8_linear", "hot", {(8,): 0.33}),
    *_shares("int8_linear", "cold", {(32,): 0.55, (128,): 0.72, (512,): 0.8}),
    Goal(
        "2:4 int8, 1 row: times as fast as int8_linear",
        1.4,
        times_as_fast("sparse24_linear int8", "int8_linear", (1,)),
    ),
    Goal(
        "2:4 int8, 32 rows and more: times as fast as int8_linear",
        0.95,
        times_as_fast("sparse24_linear int8", "int8_linear", (32, 128, 512), ("cold", "hot")),
    ),
    Goal("softmax_kl fp32, 1024 x 32000, fresh gradient: ms", 70, loss_ms("fp32", LARGE[0]), True),
    Goal("softmax_kl fp32, 4096 x 1000: ms", 8, loss_ms("fp32", SMALL), True),
    Goal("softmax_kl: time in bf16 over fp32", 1, bf16_over_fp32, True),
    *(
        Goal(f"softmax_kl, KL either way and JSD: times as fast as {peer}, {which}", goal, figures)
        for peer, which, goal, figures in (
            ("eager", "large", 8, loss_over("eager", LARGE)),
            ("torch.compile", "large", 3, loss_over("torch.compile", LARGE)),
            ("eager", "4096 x 1000", 4.5, loss_over("eager", (SMALL,))),
            ("torch.compile", "4096 x 1000", 2.5, loss_over("torch.compile", (SMALL,))),
        )
    ),
)
OF_ALL = (
    *(
        Goal(
            f"2:4 {values}, {which}: times as fast as nn.Linear",
            goal,
            times_as_fast(f"sparse24_linear {values}", f"nn.Linear {values}", rows),
        )
        for values, which, rows, goal in (
            ("fp32", "1 row", (1,), 1.6),
            ("fp32", "128 rows and more", (128, 512), 1.3),
            ("bf16", "1 row", (1,), 1.5),
        )
    ),
    Goal("softmax_kl: time of other divergences over forward KL", 1.5, over_forward_kl, True),
    Goal("linear_softmax_kl: times as fast as eager", 1, linear_loss),
    Goal("MiniLM-L6, 128 tokens: ms", 16, minilm_ms("INT8 eager"), True),
    Goal("MiniLM-L6, 128 tokens, compiled: ms", 13, minilm_ms("INT8 compiled"), True),
    Goal("MiniLM-L6: cosine of the embeddings", 0.99, minilm_cosine),
    Goal(
        "a call of a 64 x 64 layer: time over nn.Linear", 1.5, over_baseline("call_overhead"), True
    ),
    Goal("odd shapes: time over the next aligned one", 1.5, over_baseline("small_shapes"), True),
    Goal(
        "two threads, 8 rows and more where products bind: times as fast",
        1.8,
        of_two_threads((8, 32, 128, 512), "int8"),
    ),
    Goal("two threads, 1 row from memory: gain over that of reading memory", 0.9, of_memory),
)


def goals_of(isa: str) -> tuple[Goal, ...]:
    """Of a processor whose best instruction set this is."""
    return (OF_AVX2 if isa == "avx2" else OF_AVX512) + OF_ALL
