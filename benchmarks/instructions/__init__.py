"""How many instructions an op executes, counted by valgrind: the same on a noisy machine.

The op runs as a program without torch (benchmarks/instructions/main.cpp). valgrind knows no
AVX-512, so the AVX2 kernels are counted: a change of a register tile, a loop or an epilogue shows
there too.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "instructions"
ISA = "avx2"
# Small enough for an emulation that is 50 times slower than the processor, and whole tiles.
N, K = 512, 2560
ROWS = (1, 8, 32, 128)


@dataclass(frozen=True)
class Counted:
    name: str
    op: str
    variant: int  # as tests/sanitize/calls.cpp numbers them
    n: int = N
    rows: tuple[int, ...] = ROWS


OPS = (
    Counted("ternary_linear", "ternary_linear", 0),
    Counted("ternary24_linear", "ternary24_linear", 0),
    Counted("int8_linear", "int8_linear", 0),
    Counted("sparse24_linear int8", "sparse24_linear", 3),
    Counted("sparse24_linear fp32", "sparse24_linear", 0),
    Counted("sparse24_linear bf16", "sparse24_linear", 1),
    Counted("quantize_rows", "quantize_rows", 0, n=1),
    Counted("softmax_kl forward, both gradients", "softmax_kl", 0, n=1),
)


def main() -> int:
    if not shutil.which("valgrind"):
        print("instructions: valgrind is needed and was not found; on Debian: apt-get install it")
        return 1
    program = _build()
    table = Table(title=f"{ISA} kernels, N = {N}, K = {K}: instructions of a call", box=None)
    table.add_column("")
    for title in ("rows", "instructions", "for each 1000 values"):
        table.add_column(title, justify="right")
    cases = [(op, m) for op in OPS for m in op.rows]
    for op, m in track(cases, "counting", console=Console(stderr=True), transient=True):
        counted = count(program, op, m)
        values = m * op.n * K  # products of the dense matrix; of an op of one input, its values
        table.add_row(op.name, str(m), f"{counted:,}", f"{1000 * counted / values:.1f}")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    console.print(f"lines: callgrind_annotate --auto=yes {BUILD}/<op>-<variant>-<rows>.out")
    return 0


def count(program: Path, op: Counted, m: int) -> int:
    profile = BUILD / f"{op.op}-{op.variant}-{m}.out"
    command = ["valgrind", "--tool=callgrind", "--toggle-collect=counted"]
    command += [f"--callgrind-out-file={profile}", str(program)]
    command += [op.op, *map(str, (op.variant, m, op.n, K)), ISA]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return collected(done.stderr)


def collected(report: str) -> int:
    """The number in what callgrind prints at its end."""
    return int(re.search(r"Collected : (\d+)", report)[1])


def _build() -> Path:
    """Compiled by CMake like the library itself, with its flags."""
    beside = Path(sys.executable).with_name("cmake")
    cmake = str(beside) if beside.exists() else "cmake"
    configure = [cmake, "-S", ROOT, "-B", BUILD, "-DTRINE_COUNT=ON", "-DTRINE_CUDA=OFF"]
    configure.append(f"-DPython_EXECUTABLE={sys.executable}")
    for command in (configure, [cmake, "--build", BUILD, "--target", "count_instructions", "-j"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return BUILD / "count_instructions"
