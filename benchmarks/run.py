"""Time every op against its peers and against what this machine can do.

Contestants take turns in one process; the tables show medians of the undisturbed samples.
"hot": the same weights each call. "cold": weights rotated through 192 MB, so that they come from
memory as in a model. Quantising and dequantising are included. A wrong kernel is not timed, and
makes the exit status 1.

    python -m benchmarks.run cpu
    python -m benchmarks.run cpu --quick
    python -m benchmarks.run cpu --op ternary_linear --op int8_linear --threads 1
    python -m benchmarks.run cpu --op int8_linear --isa avx2 --rows 1 --quick
    python -m benchmarks.run instructions
    python -m benchmarks.run gpu
    python -m benchmarks.run gpu --quick --op int8_linear
    python -m benchmarks.run goals benchmarks/results/<GPU>.json

The first one writes benchmarks/results/<processor>.json and .png. `gpu` replays calls from graphs
and writes <GPU>.json there, which grows as it goes; `goals` says what such a run reached of what
the CUDA kernels are to reach. Other runs print. `instructions` counts what the inner loops execute
under valgrind: a figure that repeats on a noisy machine.
"""

import argparse
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
import trine
from rich.console import Console

from benchmarks import instructions, results, roofline, table
from benchmarks.case import Comparison
from benchmarks.ceilings import Ceilings, best_of, measure
from benchmarks.gpu import run as gpu
from benchmarks.gpu.plan import OPS as GPU_OPS
from benchmarks.linear_cases import LAYERS, ROWS
from benchmarks.linear_cases import comparisons as linear_comparisons
from benchmarks.measure import in_turns

LINEAR = ("ternary_linear", "int8_linear", "sparse24_linear")
OTHER = ("quantize_rows", "softmax_kl", "small_shapes", "call_overhead", "minilm")


@dataclass
class Measured:
    """What a run has found so far."""

    ceilings: list[Ceilings] = field(default_factory=list)
    rows: list[results.Row] = field(default_factory=list)
    failures: list[results.Failure] = field(default_factory=list)

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.ceilings + other.ceilings,
            self.rows + other.rows,
            self.failures + other.failures,
        )


def instruction_set(isa: str | None) -> AbstractContextManager:
    """The one asked for; otherwise every kernel takes the best it has."""
    return nullcontext() if isa is None else trine.backends.cpu_isa(isa)


def measure_all(arguments: argparse.Namespace, threads: int) -> Measured:
    """Everything with this number of threads, in a process that has never had another one."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # Advice of the peers to their users would break the line that shows the progress.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    console = Console(stderr=True)
    found = Measured()
    ops = arguments.op or OTHER + LINEAR
    with instruction_set(arguments.isa):
        found.ceilings.append(measure(threads))
        for op in (op for op in OTHER if op in ops):
            work = import_module(f"benchmarks.bench_{op}").comparisons(threads, arguments.quick)
            _time(op, work, found, arguments.quick, console)
        # The linear ops together, because their peers are the same.
        linear = [op for op in LINEAR if op in ops]
        chosen = [o for op in linear for o in import_module(f"benchmarks.bench_{op}").OPS]
        for layer in (LAYERS[:1] if arguments.quick else LAYERS) if chosen else ():
            rows = arguments.rows or ROWS
            work = linear_comparisons(chosen, layer, rows, threads, arguments.quick)
            _time("linear", work, found, arguments.quick, console)
    return found


def _time(
    suite: str, work: Iterator[Comparison], found: Measured, quick: bool, console: Console
) -> None:
    """Between two measurements of the ceilings, the better of which judges the rows."""
    rounds, budget = (7, 0.2) if quick else (11, 0.5)  # seconds, for each contestant
    threads = found.ceilings[-1].threads
    timed = []
    with console.status(f"{threads} threads") as status:
        for comparison in work:
            shape = " ".join(f"{key} {value}" for key, value in comparison.shape.items())
            status.update(f"{threads} threads: {suite} {shape} {comparison.weights}")
            calls = {who.name: who.timed for who in comparison.contestants}
            timed.append((comparison, in_turns(calls, rounds, budget, comparison.mode)))
            found.failures += results.failures_of(comparison, {"threads": threads})
        status.update(f"{threads} threads: ceilings")
        found.ceilings.append(measure(threads))
    nearby = best_of(found.ceilings[-2:])
    for comparison, timings in timed:
        found.rows += results.rows_of(suite, comparison, timings, nearby)


def cpu(arguments: argparse.Namespace) -> int:
    with instruction_set(arguments.isa):
        facts = results.machine_facts("python -m benchmarks.run cpu")
    found = Measured()
    # A process for each: thread pools of several libraries cannot be resized, and spin when idle.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for threads in arguments.threads or sorted({1, torch.get_num_threads()}):
            found += pool.apply(measure_all, (arguments, threads))
    # Piped into a file the tables keep their columns.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    for shown in table.tables(found.rows, found.ceilings, found.failures):
        console.print(shown)
    if arguments == parse_arguments(["cpu"]):  # a whole run
        path = results.write(facts, found.ceilings, found.rows, found.failures)
        console.print(f"written: {path}, {roofline.draw(results.read(path), path)}")
    return 1 if any(failure["wrong"] for failure in found.failures) else 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("cpu", help="time the CPU kernels")
    timed.add_argument(
        "--op", action="append", choices=LINEAR + OTHER, help="only this one (repeatable)"
    )
    timed.add_argument("--threads", type=int, nargs="+", help="default: 1 and all cores")
    timed.add_argument("--rows", type=int, nargs="+", help="of linear ops; default: 1 8 32 128 512")
    timed.add_argument("--quick", action="store_true", help="fewer shapes and samples")
    timed.add_argument("--isa", choices=trine.backends.cpu_isas(), help="force CPU kernels")
    commands.add_parser("instructions", help="count the inner loops' instructions under valgrind")
    on_gpu = commands.add_parser("gpu", help="time the CUDA and Triton kernels")
    on_gpu.add_argument("--op", action="append", choices=GPU_OPS, help="only this one (repeatable)")
    on_gpu.add_argument("--quick", action="store_true", help="two layers, fewer rows")
    on_gpu.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing new after so many"
    )
    judged = commands.add_parser("goals", help="what a saved run of gpu reached")
    judged.add_argument("file", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parsed = parse_arguments()
    commands = {"cpu": cpu, "gpu": gpu.main, "goals": gpu.main_goals}
    sys.exit(commands.get(parsed.command, lambda _: instructions.main())(parsed))
