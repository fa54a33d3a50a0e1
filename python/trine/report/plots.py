"""The report's plots, as SVG that takes its text colour from the page around it."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Drawn in this colour, text and axes become the page's own text colour, light or dark.
INK = "#010203"
# Okabe & Ito's palette: told apart by colour-blind readers, and legible on white and on black.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
MARKERS = "osD^vP"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "trine",  # the same results give the same page
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.axisbelow": True,
}


def accuracy_against_size(rows: Sequence[Row]) -> str:
    """Accuracy with its 95% interval over the size of the file, one point for each model."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 4))
        seen: dict[int, int] = {}
        for row, colour, marker in zip(rows, COLOURS, MARKERS, strict=False):
            megabytes = row["bytes"] / 1e6
            # Models of one architecture have one size: set them side by side.
            place = round(megabytes, 2)
            shifted = megabytes * 1.08 ** seen.get(place, 0)
            seen[place] = seen.get(place, 0) + 1
            low, high = row["accuracy_ci"]
            axes.errorbar(
                shifted,
                100 * row["accuracy"],
                [[100 * (row["accuracy"] - low)], [100 * (high - row["accuracy"])]],
                fmt=marker,
                color=colour,
                markersize=8,
                capsize=4,
                label=row["name"],
            )
        axes.set_xscale("log")
        ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
        sizes = [row["bytes"] / 1e6 for row in rows]
        axes.set_xlim(0.7 * min(sizes), 1.4 * max(sizes))
        shown = [t for t in ticks if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
        axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("size on disk, MB (logarithmic)")
        axes.set_ylabel("accuracy, %")
        # The browser's font is wider than matplotlib's: keep room.
        axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left", frameon=False, labelspacing=1)
        return _svg(figure, "Accuracy against size on disk")


def latency_bars(rows: Sequence[Row]) -> str:
    """Median latency of each model, a panel for each batch size, labelled with the speed-up."""
    with plt.rc_context(STYLE):
        sizes = list(rows[0]["latency_ms"])
        figure, panels = plt.subplots(
            1, len(sizes), figsize=(9, 0.9 + 0.42 * len(rows)), sharey=True, squeeze=False
        )
        names = [row["name"] for row in rows]
        for axes, size in zip(panels[0], sizes, strict=True):
            times = [row["latency_ms"][size] for row in rows]
            bars = axes.barh(names, times, color=_bar_colours(len(rows)), height=0.7)
            labels = [
                f"{milliseconds(ms)} ms, {row['speedup'][size]:.2f}x"
                for ms, row in zip(times, rows, strict=True)
            ]
            axes.bar_label(bars, labels, padding=4, color=INK)
            axes.set_xlim(0, 1.65 * max(times))  # room for the labels
            axes.set_title(f"batch {size}", loc="left", fontsize=11)
            axes.set_xlabel("ms per call")
            axes.grid(axis="y", visible=False)
        panels[0][0].invert_yaxis()  # the first row on top, as in the table
        return _svg(figure, "Median latency by batch size")


def layer_speedups(layers: Sequence[Mapping[str, Any]]) -> str:
    """The speed-up of each measured linear layer, one point for each row count it was seen with."""
    measured = [layer for layer in layers if layer["timings"]]
    row_counts = sorted({timing["rows"] for layer in measured for timing in layer["timings"]})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 1.1 + 0.21 * len(measured)))
        for rows, colour, marker in zip(row_counts, COLOURS, MARKERS, strict=False):
            points = [
                (timing["float_seconds"] / timing["compressed_seconds"], place)
                for place, layer in enumerate(measured)
                for timing in layer["timings"]
                if timing["rows"] == rows
            ]
            x, y = zip(*points, strict=True)
            noun = "row" if rows == 1 else "rows"
            axes.plot(x, y, marker, color=colour, label=f"{rows} {noun}", markersize=6)
        axes.axvline(1, color=INK, linewidth=1, linestyle="--")
        axes.set_xlim(left=0)
        axes.set_yticks(range(len(measured)), [layer["name"] for layer in measured], fontsize=9)
        axes.set_ylim(len(measured) - 0.4, -0.6)  # the first layer on top
        axes.set_xlabel("times as fast as float (dashed: as fast as float)")
        axes.legend(
            bbox_to_anchor=(1, 1.0), loc="lower right", frameon=False, ncols=len(row_counts)
        )
        return _svg(figure, "Speed-up of each linear layer")


def milliseconds(value: float) -> str:
    """Three digits or so, never an exponent."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _bar_colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _svg(figure: Figure, title: str) -> str:
    """The figure as one <svg> element: no declarations, no addresses, the page's text colour."""
    written = io.StringIO()
    figure.savefig(written, format="svg", bbox_inches="tight", transparent=True)
    plt.close(figure)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)  # as wide as the page allows
    return svg.replace(INK, "currentColor").replace(
        "<svg", f'<svg role="img" aria-label="{title}"', 1
    )
