"""`python -m benchmarks.run gpu`: everything measured in one run, in a file that grows with it."""

import argparse
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import trine
from rich.console import Console
from trine import _library

from benchmarks import goals, results, table
from benchmarks.case import Comparison, sentence
from benchmarks.gpu import ceilings, timing
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu.ceilings import GpuCeilings
from benchmarks.gpu.plan import FULL, OPS, QUICK, Plan

# Weights are rotated through this many times the L2, so that none is found there.
ROTATED = 4
ROUNDS = 9
PARTIAL = Path("out/gpu")  # where a run goes that measures but a part


@dataclass
class Run:
    """What has been found so far, and where it is written."""

    facts: dict[str, object]
    folder: Path
    ceilings: list[GpuCeilings] = field(default_factory=list)
    rows: list[results.Row] = field(default_factory=list)
    failures: list[results.Failure] = field(default_factory=list)

    def write(self) -> Path:
        return results.write(self.facts, self.ceilings, self.rows, self.failures, self.folder)

    def fail(self, name: str, reason: str, wrong: bool) -> None:
        self.failures.append({"name": name, "reason": reason, "wrong": wrong})

    def add(self, suite: str, comparison: Comparison) -> None:
        recorded = {who.name: who.timed for who in comparison.contestants}
        timings = timing.in_turns(recorded, ROUNDS)
        rows = results.rows_of(suite, comparison, timings, self.ceilings[-1])
        for row in rows:
            size = recorded[row["name"]].transient_bytes
            row |= {} if size is None else {"transient_bytes": size}
        self.rows += rows
        self.failures += results.failures_of(comparison, {})


@torch.inference_mode()
def measure(run: Run, plan: Plan, ops: tuple[str, ...], device: str, until: float) -> None:
    """`until`: of time.monotonic; from then on nothing new is begun."""
    run.ceilings.append(ceilings.measure(device))
    for suite, make in plan.comparisons(ops, device, ROTATED * run.facts["l2_bytes"]):
        if time.monotonic() > until:
            run.fail("what would have followed", "the time that was given is over", False)
            return
        started = time.monotonic()
        try:
            comparison = make()
            run.add(suite, comparison)
        except Exception as error:  # what has been measured is kept
            run.fail(suite, sentence(error), True)
            continue
        shape = " ".join(f"{key} {value}" for key, value in comparison.shape.items())
        print(f"{suite} {shape}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
        del comparison, make
        run.write()
    run.ceilings.append(ceilings.measure(device))
    run.facts["finished"] = True


def machine_facts(command: str) -> dict[str, object]:
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": found.name,
        "slug": results.slug(found.name, {}),
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "memory_bytes": found.total_memory,
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "trine": trine.__version__,
        "library": _library.cuda_library.status,
        "command": command,
        "finished": False,
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"]
    answer = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
    return (answer.stdout.splitlines() or ["unknown"])[0]


def show(saved: dict) -> None:
    # Piped into a file the tables keep their columns.
    console = Console() if sys.stdout.isatty() else Console(width=180)
    measured = [GpuCeilings(**c) for c in saved["ceilings"]]
    for shown in table.tables(saved["rows"], measured, saved["failures"]):
        console.print(shown)
    console.print(goals.table(gpu_goals.Result(saved), gpu_goals.GOALS))


def main(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print(
            "benchmarks.run gpu: torch sees no CUDA device, and there is nothing to time without "
            "one",
            file=sys.stderr,
        )
        return 2
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    whole = not (arguments.op or arguments.quick)
    facts = machine_facts("python -m benchmarks.run gpu")
    run = Run(facts, results.FOLDER if whole else PARTIAL)
    until = time.monotonic() + arguments.seconds
    ops = tuple(arguments.op or OPS)
    measure(run, QUICK if arguments.quick else FULL, ops, "cuda", until)
    path = run.write()
    show(results.read(path))
    print(f"written: {path}")
    return 1 if any(failure["wrong"] for failure in run.failures) else 0
