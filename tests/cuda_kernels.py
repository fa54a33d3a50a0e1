"""Compiles CUDA kernels for the CPU, as they are or with a planted bug, and runs them."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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
FLAGS = (
    "-std=c++20",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
)
CORES = len(os.sched_getaffinity(0))
# Programs are started from several threads here. With vfork, which shares the memory of all of them
# with the child, one start in a thousand or so failed with "Bad address". The documented switch.
subprocess._USE_VFORK = False


BY_SCHEDULE = ""


@dataclass(frozen=True)
class Mutant:
    """A bug, planted by replacing text that occurs once in a file of csrc."""

    bug: str
    file: str
    old: str
    new: str
    # What the emulation says; None where only the result is wrong, BY_SCHEDULE where either shows.
    report: str | None = None

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


def newest(folder: Path, digest: str) -> Path:
    """The folder of this digest, alone in `folder`."""
    for outdated in set(folder.glob("*")) - {folder / digest}:
        shutil.rmtree(outdated, ignore_errors=True)
    return folder / digest


@functools.cache
def files_read_by(source: Path) -> frozenset[str]:
    """What compiling `source` reads."""
    command = [compiler(), "-std=c++20", "-MM", f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"]
    command += ["-x", "c++", str(source)]
    rule = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return frozenset(rule.split())


def shared() -> Path:
    """The folder of what every program has in common: what does not depend on any kernel."""
    return newest(BUILD / "shared", sources_digest())


def precompiled() -> Path:
    """precompiled.h as the compiler keeps it: parsed once for all kernels."""
    target, header = shared() / "precompiled.h.gch", EMULATION / "precompiled.h"
    includes = [f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"]
    return compile_once(target, "-O0", *includes, "-x", "c++-header", header)


def compile_source(source: Path, folder: Path, changed: Path | None = None) -> Path:
    """The object of `source`; a file that is in `changed`, too, is taken from there."""
    includes = [f"-I{path}" for path in (changed, EMULATION, ROOT / "csrc") if path is not None]
    if source in SUPPORT:
        return compile_once(shared() / f"{source.stem}.o", "-O2", "-c", *includes, source)
    if changed is not None and source.is_relative_to(ROOT / "csrc"):
        copy = changed / source.relative_to(ROOT / "csrc")
        source = copy if copy.exists() else source
    includes = [f"-I{precompiled().parent}", "-include", "precompiled.h", *includes]
    # Kernels are not optimised: that would take longer than it saves when they run.
    target = folder / f"{source.parent.name}-{source.stem}.o"
    return compile_once(target, "-O0", "-c", *includes, "-x", "c++", source)


def build_program(name: str, sources: Iterable[Path], mutant: Mutant | None = None) -> Path:
    """The program of all `sources`; with a bug, only those that read its file compile again."""
    sources = (*SUPPORT, *sources)
    folder = newest(BUILD / name, sources_digest(*sorted({source.parent for source in sources})))
    precompiled()
    if mutant is None:
        with ThreadPoolExecutor(CORES) as pool:
            objects = list(pool.map(lambda source: compile_source(source, folder), sources))
        return compile_once(folder / "program", *objects)
    # The whole mutant names the folder: an edited table entry is another mutant.
    changed = folder / hashlib.sha256(repr(mutant).encode()).hexdigest()[:16]
    mutant.write(changed / "csrc")
    objects = [
        compile_source(source, changed, changed / "csrc")
        if source not in SUPPORT and str(ROOT / "csrc" / mutant.file) in files_read_by(source)
        else compile_source(source, folder)
        for source in sources
    ]
    return compile_once(changed / "program", *objects)


def build(op: str, mutant: Mutant | None = None) -> Path:
    """The program of an op's kernels, with the bug if one is given."""
    kernels = {*(ROOT / "csrc" / op).glob("cuda*.cu"), ROOT / "csrc" / "quantize_rows" / "cuda.cu"}
    return build_program(op, [EMULATION / f"{op}.cpp", *sorted(kernels)], mutant)


def run(program: Path, seed: int, case: bytes, capability: int = 80) -> bytes:
    """What the program answers; raises CalledProcessError with its report in `stderr`."""
    return subprocess.run(
        [program, str(seed), str(capability)],
        input=case,
        capture_output=True,
        check=True,
        timeout=300,  # an endless loop in a kernel, not a bound on its speed
    ).stdout
