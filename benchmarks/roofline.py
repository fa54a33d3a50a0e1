"""The picture of a run: GOP/s against rows for each linear op, under the machine's ceilings."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from trine.report.plots import COLOURS, STYLE

from benchmarks.ceilings import Ceilings, Work, best_of
from benchmarks.results import Row

OURS = COLOURS[0]
# Peers by name, in an order that does not change: the same colour in every panel and every run.
PEER_STYLES = {
    "nn.Linear fp32": ("#555555", "-"),
    "nn.Linear bf16": ("#999999", "-"),
    "torch dynamic x86": (COLOURS[1], "-"),
    "torch dynamic onednn": (COLOURS[1], "--"),
    "torch dynamic fbgemm": (COLOURS[1], ":"),
    "pt2e x86": (COLOURS[2], "-"),
    "torch._int_mm": (COLOURS[3], "-"),
    "torchao": (COLOURS[3], "--"),
    "torchao compiled": (COLOURS[3], ":"),
    "ONNX Runtime s8": (COLOURS[4], "-"),
    "ONNX Runtime u8": (COLOURS[4], "--"),
    "ggml Q8_0": (COLOURS[5], "--"),
    "ggml TQ2_0": (COLOURS[5], "-"),
    "torch CSR": ("#555555", ":"),
}

# The legend's first entries: those of every panel.
OF_ALL = [f"{what}, {state} weights" for what in ("ours", "ceiling") for state in ("cold", "hot")]


def draw(result: Mapping[str, object], path: Path) -> Path:
    """Write the picture beside `path`; returns where.

    One row of panels for each number of threads, one column for each op, for the largest square
    layer. Peers have cold weights.
    """
    rows = [row for row in result["rows"] if row["suite"] == "linear"]
    n, k = _layer(rows)
    rows = [row for row in rows if (row["N"], row["K"]) == (n, k)]
    names = list(dict.fromkeys(row["name"] for row in rows if row["op"]))
    threads = sorted({row["threads"] for row in rows})
    style = STYLE | {"text.color": "black", "font.size": 10, "grid.alpha": 0.12}
    with plt.rc_context(style):
        figure, panels = plt.subplots(
            len(threads),
            len(names),
            figsize=(4.1 * len(names) + 0.4, 4.2 * len(threads) + 1.6),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        lines: dict[str, object] = {}
        for count, across in zip(threads, panels, strict=True):
            measured = [Ceilings(**c) for c in result["ceilings"] if c["threads"] == count]
            for name, axes in zip(names, across, strict=True):
                chosen = [row for row in rows if row["threads"] == count]
                lines |= _panel(axes, name, chosen, best_of(measured))
                axes.set_title(
                    f"{name}, {count} thread{'s' * (count > 1)}", loc="left", fontsize=11
                )
        for axes in panels[:, 0]:
            axes.set_ylabel("GOP/s (dense products)")
        for axes in panels[-1]:
            axes.set_xlabel("rows of activations")
        machine = result["machine"]
        figure.suptitle(
            f"N = {n}, K = {k} on {machine['processor']} ({machine['slug']}), "
            f"{machine['isa']}, torch {machine['torch']}"
        )
        shown = [*OF_ALL, *(peer for peer in PEER_STYLES if peer in lines)]
        handles = [lines[name] for name in shown]
        figure.legend(handles, shown, loc="outside lower center", ncols=6, frameon=False)
        picture = path.with_suffix(".png")
        beside = path.with_suffix(".png.tmp")
        figure.savefig(beside, format="png", dpi=110)
        plt.close(figure)
        beside.replace(picture)
    return picture


def _layer(rows: Sequence[Row]) -> tuple[int, int]:
    """The largest square layer."""
    return max({(row["N"], row["K"]) for row in rows}, key=lambda nk: min(nk))


def _panel(axes: Axes, name: str, rows: Sequence[Row], ceilings: Ceilings) -> dict[str, object]:
    """Draws one op; returns what the legend shows."""
    ours = [row for row in rows if row["name"] == name]
    rivals = {row["name"] for row in rows if not row["op"]} & set(ours[0]["rivals"])
    lines = {}
    for peer, (colour, dashes) in PEER_STYLES.items():
        if peer in rivals:
            x, y = _series(rows, peer, "cold")
            (lines[peer],) = axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.1)
    for weights, marker in (("cold", "o"), ("hot", "o")):
        x, y = _series(ours, name, weights)
        face = OURS if weights == "cold" else "none"
        width = 2.4 if weights == "cold" else 0
        (lines[f"ours, {weights} weights"],) = axes.plot(
            x, y, marker, color=OURS, linestyle="-", linewidth=width, markerfacecolor=face, zorder=4
        )
    lines |= _roof(axes, ours, ceilings)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    m = sorted({row["M"] for row in ours})
    axes.set_xticks(m, map(str, m))
    axes.set_xticks([], minor=True)
    return lines


def _series(rows: Sequence[Row], name: str, weights: str) -> tuple[list[int], list[float]]:
    """Rows of activations, and billions of products and sums of the dense matrix a second."""
    points = sorted(
        (row["M"], 2e-3 * row["M"] * row["N"] * row["K"] / row["us"])
        for row in rows
        if row["name"] == name and row["weights"] == weights
    )
    return [m for m, _ in points], [gops for _, gops in points]


def _roof(axes: Axes, ours: Sequence[Row], ceilings: Ceilings) -> dict[str, object]:
    """What the ceilings allow the op, its weights coming from memory or from a cache."""
    lines = {}
    for weights, dashes in (("cold", "-"), ("hot", (0, (4, 3)))):
        points = []
        for row in ours:
            if row["weights"] == weights:
                work = Work(row["bytes_moved"], row["int8_ops"], row["fp32_ops"])
                seconds, _ = ceilings.seconds(work, cold=weights == "cold")
                points.append((row["M"], 2e-9 * row["M"] * row["N"] * row["K"] / seconds))
        x, y = zip(*sorted(points), strict=True)
        (line,) = axes.plot(x, y, color="black", linestyle=dashes, linewidth=1.3, zorder=3)
        lines[f"ceiling, {weights} weights"] = line
    return lines
