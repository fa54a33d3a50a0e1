"""Compiles CUDA kernels for the CPU, as they are or with a planted bug, and runs them."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests" / "cuda_on_cpu"
BUILD = ROOT / "build" / "cuda_on_cpu"
# What every program is linked with.
SUPPORT = tuple(
    EMULATION / f"{name}.cpp"
    for name in ("async_copies", "driver", "emulator", "matrix_units", "shared_memory")
)
# No contraction, as in the library; pragmas are for nvcc.
FLAGS = ("-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas")


@dataclass(frozen=True)
class Mutant:
    """A bug, planted by replacing text that occurs once in a file of csrc."""

    bug: str
    file: str
    old: str
    new: str
    report: str | None = None  # what the emulation says; None where only the result is wrong

    def write(self, folder: Path) -> None:
        """Put the changed file where the compiler, told to look there first, finds it."""
        source = (ROOT / "csrc" / self.file).read_text()
        occurrences = source.count(self.old)
        if occurrences != 1:
            raise ValueError(
                f"mutant '{self.bug}': its text occurs {occurrences} times in csrc/{self.file}, "
                "not once; adapt it to the source"
            )
        target = folder / self.file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.replace(self.old, self.new))


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler: set CXX, or install g++ or clang++")
    return found


@functools.cache
def sources_digest(*folders: Path) -> str:
    """Of everything that a program is made from, so that nothing else compiles it again."""
    digest = hashlib.sha256(repr((compiler(), FLAGS)).encode())
    for folder in (EMULATION, ROOT / "csrc" / "common", *folders):
        for source in sorted(folder.rglob("*.*")):
            digest.update(str(source).encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def compile_once(target: Path, *arguments: object) -> Path:
    """Run the compiler unless `target` is there. Written beside and renamed: runs may overlap."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            partial = Path(folder) / target.name
            command = [compiler(), *FLAGS, *map(str, arguments), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.rename(target)
    return target


def build_program(
    name: str, source: Path, *, folders: Sequence[Path] = (), mutant: Mutant | None = None
) -> Path:
    """`source`, which lies in one of `folders` or beside them, with the bug if one is given."""
    folder = BUILD / name / sources_digest(source.parent, *folders)
    for outdated in set((BUILD / name).glob("*")) - {folder}:
        shutil.rmtree(outdated, ignore_errors=True)
    support = [
        compile_once(folder / f"{part.stem}.o", "-O2", "-c", f"-I{ROOT / 'csrc'}", part)
        for part in SUPPORT
    ]
    changed = folder / "sources" / name
    if mutant is not None:
        # The whole mutant names the folder: an edited table entry is another mutant.
        digest = hashlib.sha256(repr(mutant).encode()).hexdigest()[:16]
        changed = folder / "sources" / f"{name}-{digest}"
        mutant.write(changed)
    includes = [f"-I{path}" for path in (changed, EMULATION, ROOT / "csrc")]
    program = folder / f"{changed.name}.program"
    # Kernels are not optimised: that would take longer than it saves when they run.
    return compile_once(program, "-O0", *includes, "-x", "c++", source, "-x", "none", *support)


def build(op: str, mutant: Mutant | None = None) -> Path:
    """The program of an op, with the bug if one is given."""
    source = EMULATION / f"{op}.cpp"
    folders = [ROOT / "csrc" / op, ROOT / "csrc" / "quantize_rows"]
    return build_program(op, source, folders=folders, mutant=mutant)


def run(program: Path, seed: int, cases: Sequence[bytes], capability: int = 80) -> bytes:
    """What the program answers; raises CalledProcessError with its report in `stderr`."""
    return subprocess.run(
        [program, str(seed), str(capability)],
        input=len(cases).to_bytes(8, "little") + b"".join(cases),
        capture_output=True,
        check=True,
        timeout=300,  # an endless loop in a kernel, not a bound on its speed
    ).stdout
