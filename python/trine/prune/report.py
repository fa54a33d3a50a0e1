"""What pruning has done to each layer, and what that saves: plain data that prints as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from trine.prune.layers import by_row

__all__ = ["LayerPruning", "PruningReport", "pruning_report"]


@dataclass(frozen=True)
class LayerPruning:
    """One layer: its weights, how many are 0, outputs that are off, whether it is 2:4-sparse."""

    name: str
    weights: int
    zeros: int
    outputs: int
    outputs_off: int
    is_2_of_4: bool

    @property
    def next_step(self) -> str:
        """What makes it smaller or faster."""
        if self.outputs_off:
            return "trine.prune.remove"
        if self.is_2_of_4:
            return 'trine.compress, linear="sparse24"'
        return "none: dense kernels read zeros, too" if self.zeros else ""


@dataclass(frozen=True)
class PruningReport:
    """All pruned layers, and the update at which a schedule was and at which it ends."""

    layers: tuple[LayerPruning, ...]
    position: int = 0
    last: int = 0

    @property
    def sparsity(self) -> float:
        """The share of the layers' weights that is 0."""
        return sum(m.zeros for m in self.layers) / sum(m.weights for m in self.layers)

    def __str__(self) -> str:
        rows = [
            ("layer", "weights", "zero", "outputs off", "2:4", "saved now", "to save something")
        ]
        for layer in self.layers:
            off = f"{layer.outputs_off} of {layer.outputs}" if layer.outputs_off else ""
            share = f"{layer.zeros / layer.weights:.1%}"
            form = "yes" if layer.is_2_of_4 else ""
            numbers = (layer.name, str(layer.weights), share, off, form)
            rows.append((*numbers, "nothing", layer.next_step))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        total = f"{self.sparsity:.1%} of the weights are 0; the model has its size and speed still"
        if self.position < self.last:
            total += f"; the schedule was at update {self.position} of {self.last}"
        return "\n".join([*lines, total])


def pruning_report(
    layers: Mapping[str, nn.Module], removed: Mapping[str, Sequence[int]]
) -> PruningReport:
    """The report of layers whose zeros are in place."""
    rows = []
    for name, layer in layers.items():
        weight = by_row(layer, layer.weight.detach())
        is_linear = layer.weight.dim() == 2
        rows.append(
            LayerPruning(
                name,
                weight.numel(),
                int((weight == 0).sum()),
                weight.shape[0],
                len(removed.get(name, ())),
                is_linear and _is_2_of_4(weight),
            )
        )
    return PruningReport(tuple(rows))


def _is_2_of_4(weight: Tensor) -> bool:
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % 4))
    return bool(((padded != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())
