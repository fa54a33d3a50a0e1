"""The implementations this machine can run, how to insist on one, and which one each op uses."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from trine import _C, _library
from trine.ops import _triton_kernels

_LOWEST_CUDA_CAPABILITY = (8, 0)  # the oldest GPU that every cuda.cu is compiled for


def cpu_isas() -> list[str]:
    """The instruction sets the CPU kernels can run here, the most portable first."""
    return _C.isas()


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Inside the block, CPU kernels use the instruction set `name` and what it includes.

    It holds for the whole process, not for one thread: meant for tests and benchmarks.
    Raises ValueError where this processor cannot run it.
    """
    before = _C.lower_isa(name)
    try:
        yield
    finally:
        _C.restore_isas(before)


@dataclass(frozen=True)
class OpBackend:
    """Which kernel an op uses on the CPU here, and why; and what there is for CUDA."""

    op: str
    kernel: str
    reason: str
    cuda_kernels: tuple[str, ...]  # the files of csrc/<op> in libtrine_cuda; empty where none is
    cuda_reason: str  # where they run, or why they cannot run here


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
        for e in self.ops:
            lines.append(f"{e.op:<{width}}  cpu:  {e.kernel:<11} {e.reason}")
            cuda = ", ".join(e.cuda_kernels) or "none"
            lines.append(f"{'':<{width}}  cuda: {cuda:<11} {e.cuda_reason}")
        return "\n".join(lines)


def describe() -> Backends:
    """Say what runs here: instruction sets, threads, CUDA library, and each op's kernel and why."""
    return Backends(
        processor=_processor_name(),
        isas=tuple(cpu_isas()),
        isa_in_force=_C.enabled_isa(),
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        cuda_library=_library.cuda_library.status,
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
    cuda_kernels = _cuda_kernels(op)
    if _triton_kernels.in_force() and _folder(op) in _triton_kernels.OPS.values():
        return OpBackend(op, kernel, reason, ("triton",), _triton_reason())
    return OpBackend(op, kernel, reason, cuda_kernels, _cuda_reason(cuda_kernels))


def _triton_reason() -> str:
    found = f"runs on {_device()}" if torch.cuda.is_available() else "torch sees no GPU"
    return f"{found}; compiled kernels: the CUDA library is {_library.cuda_library.status}"


def _cuda_kernels(op: str) -> tuple[str, ...]:
    built = (name.split("/") for name in _C.cuda_kernels.split())
    return tuple(backend for built_op, backend in built if built_op == _folder(op))


def _folder(op: str) -> str:
    return op.split(" ")[0]  # of "sparse24_linear (int8 values)", say


def _cuda_reason(kernels: tuple[str, ...]) -> str:
    """Where an op's CUDA kernels run, or why they cannot."""
    if not _C.cuda_kernels:
        return f"the CUDA library is {_C.cuda_build}"
    if not kernels:
        return "this op has no CUDA kernel yet"
    if not _library.cuda_library.loaded:
        return f"cannot run here: the CUDA library is {_library.cuda_library.status}"
    if not torch.cuda.is_available():
        return "cannot run here: torch sees no GPU"
    if torch.cuda.get_device_capability() < _LOWEST_CUDA_CAPABILITY:
        return f"cannot run here: {_device()} is older than sm_80"
    return f"runs on {_device()}"


def _device() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"


@contextmanager
def triton_kernels(device: str = "cuda") -> Iterator[None]:
    """Inside the block, ops that have a Triton kernel run it on tensors of `device`.

    It holds for the whole process, not for one thread: meant for tests and benchmarks. On the CPU
    Triton needs TRITON_INTERPRET=1 from the start of the process. Raises ModuleNotFoundError where
    Triton is not installed.
    """
    if not _triton_kernels.available():
        raise ModuleNotFoundError("the Triton kernels need Triton: pip install triton")
    with _triton_kernels.forced(device):
        yield


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
