"""What compress did with each layer, and why: plain data that prints as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from trine.compress.recipe import Recipe


class StageReport:
    """The attribute `report` of a model that is meant to be changed further, as by `compress`."""


def require_place_for_report(model: nn.Module, caller: str) -> None:
    """Raises ValueError where the model has an attribute `report` that must not be lost."""
    if not isinstance(getattr(model, "report", StageReport()), StageReport):
        raise ValueError(
            f"{caller} puts its report into the attribute 'report', which the model already has; "
            "rename it there, or take the original of a model that was compressed before"
        )


@dataclass(frozen=True)
class ShapeTiming:
    """A layer at one shape that it was seen with: how often, and the seconds per call.

    rows: of x, all but its last dimension; for an embedding indices, for a convolution images of
    the size in `image`.
    """

    rows: int
    dtype: str
    calls: int
    float_seconds: float
    compressed_seconds: float
    image: tuple[int, int] | None = None  # height and width


@dataclass(frozen=True)
class LayerReport:
    """One layer: what the recipe chose, whether it was swapped, and the reason.

    `timings` is empty where nothing was measured. `bytes_after` is what the layer takes in the
    compressed model, so it equals `bytes_before` for a layer that was kept.
    """

    name: str
    choice: str
    swapped: bool
    reason: str
    bytes_before: int
    bytes_after: int
    timings: tuple[ShapeTiming, ...] = ()

    @property
    def float_seconds(self) -> float:
        """Seconds that the float layer takes in one run over all samples."""
        return sum(t.calls * t.float_seconds for t in self.timings)

    @property
    def compressed_seconds(self) -> float:
        """Seconds that the compressed layer takes in one run over all samples."""
        return sum(t.calls * t.compressed_seconds for t in self.timings)

    @property
    def ratio(self) -> float | None:
        """How many times as fast the compressed layer is; None where nothing was measured."""
        return self.float_seconds / self.compressed_seconds if self.timings else None


@dataclass(frozen=True)
class CompressionReport:
    """The recipe, the layers of which it speaks, and the bytes of the model before and after."""

    recipe: Recipe
    layers: tuple[LayerReport, ...]
    model_bytes_before: int
    model_bytes_after: int

    @property
    def swapped(self) -> int:
        """The number of layers that were swapped."""
        return sum(layer.swapped for layer in self.layers)

    @property
    def speedup(self) -> float | None:
        """How many times as fast the measured layers are together, with those kept that
        were kept; None where nothing was measured."""
        measured = [layer for layer in self.layers if layer.timings]
        now = sum(s.compressed_seconds if s.swapped else s.float_seconds for s in measured)
        return sum(layer.float_seconds for layer in measured) / now if measured else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `ratio` and the totals are included, for readers."""
        return {
            "recipe": self.recipe.to_dict(),
            "layers": [{**asdict(layer), "ratio": layer.ratio} for layer in self.layers],
            "model_bytes_before": self.model_bytes_before,
            "model_bytes_after": self.model_bytes_after,
            "swapped": self.swapped,
            "speedup": self.speedup,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionReport:
        """The report that `to_dict` described."""
        layers = []
        for row in data["layers"]:
            fields = {key: value for key, value in row.items() if key != "ratio"}
            fields["timings"] = tuple(map(_timing, row["timings"]))
            layers.append(LayerReport(**fields))
        recipe = Recipe.from_dict(data["recipe"])
        return cls(recipe, tuple(layers), data["model_bytes_before"], data["model_bytes_after"])

    def __str__(self) -> str:
        """A table of the layers, one a line, and a line of totals."""
        rows = [("layer", "choice", "result", "speed", "KB", "reason")]
        for layer in self.layers:
            speed = "" if layer.ratio is None else f"{layer.ratio:.2f}x"
            size = f"{layer.bytes_before / 1e3:.1f} -> {layer.bytes_after / 1e3:.1f}"
            result = "swapped" if layer.swapped else "kept"
            rows.append((layer.name, layer.choice, result, speed, size, layer.reason))
        lines = aligned(rows)
        speed = "" if self.speedup is None else f", layers {self.speedup:.2f}x as fast"
        lines.append(
            f"{self.swapped} of {len(self.layers)} layers swapped, model "
            f"{self.model_bytes_before / 1e6:.2f} -> {self.model_bytes_after / 1e6:.2f} MB{speed}"
        )
        return "\n".join(lines)


def _timing(data: Mapping[str, Any]) -> ShapeTiming:
    image = data.get("image")
    return ShapeTiming(**{**data, "image": image and tuple(image)})


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines, the cells of a column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
