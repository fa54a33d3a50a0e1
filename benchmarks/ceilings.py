"""What this machine can do at most: memory read bandwidth, int8 dot products, fp32 FMA."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from trine import _C

READ_BYTES = 256 << 20  # for each thread: beyond the caches
COMPUTE_REPEATS = 200_000  # some 5 ms a sample
SAMPLES = 7


@dataclass(frozen=True)
class Ceilings:
    threads: int
    read_gb_s: float
    int8_gop_s: float
    fp32_gflop_s: float

    def seconds(self, work) -> tuple[float, str]:
        """The least time that `work` takes here, and which ceiling sets it."""
        return max(
            (work.bytes_read / self.read_gb_s / 1e9, "read"),
            (work.int8_ops / self.int8_gop_s / 1e9, "int8"),
            (work.fp32_ops / self.fp32_gflop_s / 1e9, "fp32"),
        )


def measure(threads: int) -> Ceilings:
    """The best of several samples, all threads working at once."""
    buffers = [torch.ones(READ_BYTES, dtype=torch.uint8) for _ in range(threads)]
    dot_ops, fma_ops = _C.ceiling_ops()
    with ThreadPoolExecutor(threads) as pool:

        def best_seconds(work: Callable[[int], object]) -> float:
            def sample() -> float:
                start = time.perf_counter()
                list(pool.map(work, range(threads)))
                return time.perf_counter() - start

            return min(sample() for _ in range(SAMPLES))

        read = best_seconds(lambda i: _C.read_memory(buffers[i].data_ptr(), READ_BYTES))
        dot = best_seconds(lambda _: _C.dot_int8(COMPUTE_REPEATS))
        fma = best_seconds(lambda _: _C.fma_fp32(COMPUTE_REPEATS))
    return Ceilings(
        threads=threads,
        read_gb_s=threads * READ_BYTES / read / 1e9,
        int8_gop_s=threads * COMPUTE_REPEATS * dot_ops / dot / 1e9,
        fp32_gflop_s=threads * COMPUTE_REPEATS * fma_ops / fma / 1e9,
    )
