"""What fuse_norms or fuse_activations did with each module, and why: prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

from trine.compress.report import aligned


@dataclass(frozen=True)
class ModuleFusion:
    """One norm or activation: whether it was fused with its layers, the reason, the layers (those
    that read a norm, those that an activation reads), and where measured the seconds of all its
    calls together with theirs, as they were and fused."""

    name: str
    fused: bool
    reason: str
    layers: tuple[str, ...] = ()
    apart_seconds: float | None = None
    fused_seconds: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast it is fused; None where nothing was measured."""
        return None if self.apart_seconds is None else self.apart_seconds / self.fused_seconds


@dataclass(frozen=True)
class FusionReport:
    """All modules of one kind, "norm" or "activation"."""

    kind: str
    modules: tuple[ModuleFusion, ...]

    @property
    def fused(self) -> int:
        """The number of modules that were fused."""
        return sum(module.fused for module in self.modules)

    def __str__(self) -> str:
        """A table of the modules, one a line, and a line of totals."""
        rows = [(self.kind, "result", "layers", "reason")]
        for module in self.modules:
            result = "fused" if module.fused else "kept"
            rows.append((module.name, result, str(len(module.layers) or ""), module.reason))
        total = f"{self.fused} of {len(self.modules)} {self.kind}s fused"
        return "\n".join([*aligned(rows), total])
