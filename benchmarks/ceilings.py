"""What this machine can do at most: reading from memory and caches, int8 dot products, fp32 FMA."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from trine import _C

from benchmarks.measure import is_disturbed, seconds_waited

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
COMMON_CACHES = {2: 1 << 20, 3: 16 << 20}  # where the system does not tell

DRAM_BYTES = 192 << 20  # for each thread: beyond the caches
# Which way of reading is fastest differs between processors, so all of these are tried: a ceiling
# that a kernel beats is none. (places read at once, bytes asked for ahead; 0: no prefetch)
WAYS = [(streams, ahead) for streams in (1, 2, 4, 8, 16) for ahead in (0, 512, 2048)]
DOT_REPEATS = 1_000_000  # some 3 ms: beside it, starting the threads (30 us) is little
SAMPLES = 5
MOST_TRIES = 3  # for each sample: where other processes disturb, more find a quiet moment


@dataclass(frozen=True)
class Work:
    """The least that any implementation must do."""

    bytes_moved: int = 0
    int8_ops: int = 0  # multiplications and additions of int8 dot products
    fp32_ops: int = 0
    bf16_ops: int = 0


@dataclass(frozen=True)
class Ceilings:
    threads: int
    dram_gb_s: float
    l3_gb_s: float
    l2_gb_s: float
    int8_gop_s: float
    fp32_gflop_s: float

    @property
    def about(self) -> dict[str, int]:
        """What a row that they judge says of itself beside its shape."""
        return {"threads": self.threads}

    def seconds(self, work: Work, *, cold: bool) -> tuple[float, str]:
        """The least time that `work` takes here, and which ceiling sets it.

        `cold`: the bytes lie in memory, else in the nearest cache that holds them. A written byte
        counts as a read one.
        """
        level = "dram" if cold else self._level(work.bytes_moved)
        return max(
            (work.bytes_moved / getattr(self, f"{level}_gb_s") / 1e9, f"{level} read"),
            (work.int8_ops / self.int8_gop_s / 1e9, "int8"),
            (work.fp32_ops / self.fp32_gflop_s / 1e9, "fp32"),
        )

    def _level(self, size: int) -> str:
        if size <= self.threads * cache_bytes(2):
            return "l2"
        return "l3" if size <= cache_bytes(3) else "dram"


def best_of(measured: Sequence[Ceilings]) -> Ceilings:
    """The highest of each: a clock that drifted makes the others too low for a ceiling."""
    names = asdict(measured[0])
    return Ceilings(**{name: max(getattr(c, name) for c in measured) for name in names})


def cache_bytes(level: int) -> int:
    """The size of the processor's level-2 or level-3 cache."""
    for index in sorted(CACHES.glob("index*")):
        if (index / "level").read_text().strip() == str(level):
            return int((index / "size").read_text().strip().removesuffix("K")) << 10
    return COMMON_CACHES[level]


def measure(threads: int) -> Ceilings:
    """The best of several samples and ways, all threads working at once."""
    buffers = [torch.ones(DRAM_BYTES, dtype=torch.uint8) for _ in range(threads)]
    dot_ops, fma_ops = _C.ceiling_ops()
    with ThreadPoolExecutor(threads) as pool:

        def best_seconds(work: Callable[[int], object], samples: int = SAMPLES) -> float:
            def sample() -> float:
                start = time.perf_counter()
                list(pool.map(work, range(threads)))
                return time.perf_counter() - start

            best, clean = math.inf, 0
            for _ in range(MOST_TRIES * samples):
                waited = seconds_waited()
                seconds = sample()
                best = min(best, seconds)
                clean += not is_disturbed(seconds, seconds_waited() - waited)
                if clean == samples:
                    break
            return best

        def read_gb_s(size: int) -> float:
            repeats = max(1, DRAM_BYTES // size)

            def best(way: tuple[int, int]) -> float:
                def read(thread: int) -> None:
                    address = buffers[thread].data_ptr()
                    for _ in range(repeats):
                        _C.read_memory(address, size, *way)

                return best_seconds(read, samples=3)

            return threads * repeats * size / min(best(way) for way in WAYS) / 1e9

        dot = best_seconds(lambda _: _C.dot_int8(DOT_REPEATS))
        fma = best_seconds(lambda _: _C.fma_fp32(DOT_REPEATS))
        return Ceilings(
            threads=threads,
            dram_gb_s=read_gb_s(DRAM_BYTES),
            l3_gb_s=read_gb_s(_l3_part(threads)),
            l2_gb_s=read_gb_s(cache_bytes(2) // 2),
            int8_gop_s=threads * DOT_REPEATS * dot_ops / dot / 1e9,
            fp32_gflop_s=threads * DOT_REPEATS * fma_ops / fma / 1e9,
        )


def _l3_part(threads: int) -> int:
    """What each thread reads of the level-3 cache: far more than its L2, half of L3 together."""
    return max(2 * cache_bytes(2), cache_bytes(3) // 2 // threads)
