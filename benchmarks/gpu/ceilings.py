"""What this GPU can do at most: moving memory, and PyTorch's own matrix products."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from benchmarks.ceilings import Work
from benchmarks.gpu import timing

COPIED_BYTES = 2 << 30  # far beyond any L2; read and written
SIDE = 8192  # of the matrices
SAMPLES = 7


@dataclass(frozen=True)
class GpuCeilings:
    copy_gb_s: float  # bytes read and written
    read_gb_s: float
    bf16_tflop_s: float
    int8_top_s: float  # the better of cuBLASLt's layouts, torch._int_mm

    @property
    def about(self) -> dict[str, int]:
        """What a row that they judge says of itself beside its shape: nothing."""
        return {}

    def seconds(self, work: Work, *, cold: bool) -> tuple[float, str]:
        """The least time that `work` takes here, and which ceiling sets it."""
        return max(
            (work.bytes_moved / max(self.copy_gb_s, self.read_gb_s) / 1e9, "memory"),
            (work.int8_ops / self.int8_top_s / 1e12, "int8"),
            (work.bf16_ops / self.bf16_tflop_s / 1e12, "bf16"),
        )


def measure(device: str, copied: int = COPIED_BYTES, side: int = SIDE) -> GpuCeilings:
    """The best of several samples each, on random data."""
    copy, read = _memory(device, copied)
    bf16, int8 = _matrices(device, side)
    return GpuCeilings(2 * copied / copy / 1e9, copied / read / 1e9, bf16 / 1e12, int8 / 1e12)


def _best(run: Callable[[], object]) -> float:
    run()
    return min(timing.seconds(run) for _ in range(SAMPLES))


def _memory(device: str, copied: int) -> tuple[float, float]:
    """Seconds of a copy and of reading."""
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    return _best(lambda: target.copy_(source)), min(_best(source.sum), _best(source.amax))


def _matrices(device: str, side: int) -> tuple[float, float]:
    """Operations a second in bf16 and in int8."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    bf16 = _best(lambda: a @ b)
    q, w = (torch.randint(-127, 128, (side, side), device=device).to(torch.int8) for _ in range(2))
    int8 = _best(lambda: torch._int_mm(q, w.T))
    with suppress(RuntimeError):  # not every cuBLASLt takes the other layout
        int8 = min(int8, _best(lambda: torch._int_mm(q, w)))
    return 2 * side**3 / bf16, 2 * side**3 / int8
