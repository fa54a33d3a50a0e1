"""The picture of sensitivity curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["draw_curves"]


def draw_curves(
    ratios: Sequence[float], dense: float, scores: Mapping[str, Sequence[float]], path: Path
) -> None:
    """Two panels: the score over the ratio, a line a layer, and all as a map, a row a layer."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install 'trine[report]'") from None

    names = list(scores)
    figure = Figure(figsize=(11, 1.6 + max(3.2, 0.2 * len(names))), layout="constrained")
    lines, table = figure.subplots(1, 2)
    for place, name in enumerate(names):
        # Ordered from the first layer to the last: which part of the model suffers shows.
        colour = colormaps["viridis"](place / max(1, len(names) - 1))
        lines.plot((0, *ratios), (dense, *scores[name]), marker=".", color=colour, label=name)
    lines.set_xlabel("share of the layer that is removed")
    lines.set_ylabel("score")
    lines.grid(alpha=0.2)
    if len(names) <= 12:
        lines.legend(frameon=False, fontsize=8)
    image = table.imshow([scores[name] for name in names], aspect="auto", cmap="viridis")
    table.set_yticks(range(len(names)), names, fontsize=7)
    table.set_xticks(range(len(ratios)), [f"{ratio:.0%}" for ratio in ratios], fontsize=8)
    table.set_xlabel("share of the layer that is removed")
    figure.colorbar(image, ax=table, label="score")
    partial = path.with_name(f"{path.name}.part")
    figure.savefig(partial, format=path.suffix.removeprefix(".") or "png", dpi=120)
    partial.replace(path)
