"""What became of each layer, and why: plain data that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

from trine.compress.report import StageReport, aligned


@dataclass(frozen=True)
class LayerChange:
    """One layer: what it became ("rank 12"), or why it stayed.

    `error` is the relative error of the weight in the norm that the method minimises, None where
    the layer stayed; the seconds are those of one run over all samples, None without samples.
    """

    name: str
    changed: bool
    reason: str
    bytes_before: int
    bytes_after: int
    error: float | None = None
    float_seconds: float | None = None
    seconds: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast the new layer was measured; None where nothing was."""
        return None if self.seconds is None else self.float_seconds / self.seconds


@dataclass(frozen=True)
class FactorizationReport(StageReport):
    """All layers that were looked at, and the bytes of the whole model before and after."""

    layers: tuple[LayerChange, ...]
    model_bytes_before: int
    model_bytes_after: int

    @property
    def changed(self) -> int:
        """The number of layers that were changed."""
        return sum(layer.changed for layer in self.layers)

    def __str__(self) -> str:
        """A table of the layers, one a line, and a line of totals."""
        rows = [("layer", "result", "error", "speed", "KB", "reason")]
        for layer in self.layers:
            rows.append(
                (
                    layer.name,
                    "changed" if layer.changed else "kept",
                    "" if layer.error is None else f"{layer.error:.4f}",
                    "" if layer.ratio is None else f"{layer.ratio:.2f}x",
                    f"{layer.bytes_before / 1e3:.1f} -> {layer.bytes_after / 1e3:.1f}",
                    layer.reason,
                )
            )
        before, after = self.model_bytes_before / 1e6, self.model_bytes_after / 1e6
        total = f"{self.changed} of {len(self.layers)} layers changed, model "
        return "\n".join([*aligned(rows), f"{total}{before:.2f} -> {after:.2f} MB"])
