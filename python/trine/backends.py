"""The implementations this machine can run, how to insist on one, and which one each op uses."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from trine import _C
from trine._library import cuda_library_status


def cpu_isas() -> list[str]:
    """The instruction sets the CPU kernels can run here, the most portable first."""
    return _C.isas()


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Inside the block, CPU kernels use the instruction set `name` and what it includes.

    It holds for the whole process, not for one thread: meant for tests and benchmarks.
    Raises ValueError where this processor cannot run it.
    """
    before = _C.enabled_isa()
    _C.lower_isa(name)
    try:
        yield
    finally:
        _C.lower_isa(before)


@dataclass(frozen=True)
class OpBackend:
    """Which kernel an op uses on the CPU here, and why."""

    op: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class Backends:
    """What `describe` found. Printing it gives a table."""

    processor: str
    isas: tuple[str, ...]
    isa_in_force: str
    threads: int
    torch_version: str
    cuda_library: str
    ops: tuple[OpBackend, ...]

    def __str__(self) -> str:
        lines = [
            f"processor          {self.processor}",
            f"instruction sets   {', '.join(self.isas)} (in force: {self.isa_in_force})",
            f"threads            {self.threads}",
            f"torch              {self.torch_version}",
            f"CUDA library       {self.cuda_library}",
        ]
        width = max(len(entry.op) for entry in self.ops)
        lines += [f"{e.op:<{width}}  cpu: {e.kernel:<11} {e.reason}" for e in self.ops]
        return "\n".join(lines)


def describe() -> Backends:
    """Say what runs here: instruction sets, threads, CUDA library, and each op's kernel and why."""
    return Backends(
        processor=_processor_name(),
        isas=tuple(cpu_isas()),
        isa_in_force=_C.enabled_isa(),
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        cuda_library=cuda_library_status(),
        ops=tuple(_op_backend(op, isas) for op, isas in _C.kernels().items()),
    )


def _op_backend(op: str, isas: list[str]) -> OpBackend:
    kernel = _C.kernel_in_force(op)
    passed_over = isas[: isas.index(kernel)]
    if not passed_over:
        reason = "the fastest kernel of this op"
    else:
        lacking = [isa for isa in passed_over if isa not in cpu_isas()]
        switched_off = [isa for isa in passed_over if isa in cpu_isas()]
        parts = [f"this processor lacks {', '.join(lacking)}"] if lacking else []
        parts += [f"{', '.join(switched_off)} switched off"] if switched_off else []
        reason = "; ".join(parts)
    return OpBackend(op, kernel, reason)


def _processor_name() -> str:
    """The model name from the system where it gives one (Linux), else the architecture."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
