"""What fuse_norms did with each norm, and why: plain data that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

from trine.compress.report import aligned


@dataclass(frozen=True)
class NormReport:
    """One norm: whether it was fused, the reason, and where measured its readers and the seconds of
    all its calls together with theirs, as they were and fused."""

    name: str
    fused: bool
    reason: str
    readers: tuple[str, ...] = ()
    apart_seconds: float | None = None
    fused_seconds: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast the fused norm is; None where nothing was measured."""
        return None if self.apart_seconds is None else self.apart_seconds / self.fused_seconds


@dataclass(frozen=True)
class FusionReport:
    """All norms of the model."""

    norms: tuple[NormReport, ...]

    @property
    def fused(self) -> int:
        """The number of norms that were fused."""
        return sum(norm.fused for norm in self.norms)

    def __str__(self) -> str:
        """A table of the norms, one a line, and a line of totals."""
        rows = [("norm", "result", "readers", "reason")]
        for norm in self.norms:
            result = "fused" if norm.fused else "kept"
            rows.append((norm.name, result, str(len(norm.readers) or ""), norm.reason))
        return "\n".join([*aligned(rows), f"{self.fused} of {len(self.norms)} norms fused"])
