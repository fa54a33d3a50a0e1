"""Time every op against its peers and against what this machine can do.

Contestants take turns in one process; the tables show medians of the undisturbed samples.
"hot": the same weights each call. "cold": weights rotated through 192 MB, so that they come from
memory as in a model. Quantising and dequantising are included. A wrong kernel is not timed, and
makes the exit status 1.

    python -m benchmarks.run cpu
    python -m benchmarks.run cpu --quick
    python -m benchmarks.run cpu --op ternary_linear --op int8_linear --threads 1
    python -m benchmarks.run cpu --op int8_linear --isa avx2 --rows 1 --quick
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module

import torch
import trine
from rich.console import Console

from benchmarks import results, table
from benchmarks.case import Comparison
from benchmarks.ceilings import Ceilings, best_of, measure
from benchmarks.linear_cases import LAYERS, ROWS
from benchmarks.linear_cases import comparisons as linear_comparisons
from benchmarks.measure import in_turns

LINEAR = ("ternary_linear", "int8_linear", "sparse24_linear")
OTHER = ("quantize_rows", "softmax_kl")


def comparisons(op: str, threads: int, arguments: argparse.Namespace) -> Iterator[Comparison]:
    return import_module(f"benchmarks.bench_{op}").comparisons(threads, arguments.quick)


def linear(ops: Sequence[str], threads: int, arguments: argparse.Namespace) -> Iterator[Comparison]:
    chosen = [o for op in ops for o in import_module(f"benchmarks.bench_{op}").OPS]
    layers = LAYERS[:2] if arguments.quick else LAYERS
    return linear_comparisons(chosen, layers, arguments.rows or ROWS, threads, arguments.quick)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="time the CPU kernels")
    cpu.add_argument(
        "--op", action="append", choices=LINEAR + OTHER, help="only this op (repeatable)"
    )
    cpu.add_argument("--threads", type=int, nargs="+", help="default: 1 and all cores")
    cpu.add_argument("--rows", type=int, nargs="+", help="of linear ops; default: 1 8 32 128 512")
    cpu.add_argument("--quick", action="store_true", help="fewer shapes and samples, some 3 min")
    cpu.add_argument("--isa", choices=trine.backends.cpu_isas(), help="force CPU kernels")
    return parser.parse_args(arguments)


class Run:
    """What a run has measured so far."""

    def __init__(self, console: Console, quick: bool) -> None:
        self.console, self.quick = console, quick
        self.ceilings: list[Ceilings] = []
        self.rows: list[results.Row] = []
        self.failures: list[results.Row] = []
        self.wrong = False

    def time(self, work: Iterator[Comparison], threads: int) -> None:
        """Between two measurements of the ceilings, the better of which judges the rows."""
        if not self.ceilings or self.ceilings[-1].threads != threads:
            self.ceilings.append(measure(threads))
        timed = []
        for comparison in work:
            shape = " ".join(f"{key}={value}" for key, value in comparison.shape.items())
            with self.console.status(f"{threads} threads, {shape}, {comparison.weights}"):
                timed.append((comparison, self._time(comparison)))
            self._note_failures(comparison, threads)
        self.ceilings.append(measure(threads))
        nearby = best_of(self.ceilings[-2:])
        for comparison, timings in timed:
            self.rows += results.rows_of(comparison, timings, nearby)

    def _time(self, comparison: Comparison):
        calls = {who.name: who.timed for who in comparison.contestants}
        rounds, budget = (7, 2.0) if self.quick else (15, 10.0)
        return in_turns(calls, rounds=rounds, budget=budget)

    def _note_failures(self, comparison: Comparison, threads: int) -> None:
        for name, reason in comparison.failures.items():
            self.failures.append(
                {"name": name, **comparison.shape, "threads": threads, "reason": reason}
            )
        for name, reason in comparison.wrong.items():
            self.wrong = True
            self.failures.append(
                {"name": name, **comparison.shape, "threads": threads, "reason": f"WRONG: {reason}"}
            )


def cpu(arguments: argparse.Namespace) -> int:
    thread_counts = arguments.threads or sorted({1, torch.get_num_threads()})
    ops = arguments.op or LINEAR + OTHER
    # Piped into a file the tables keep their columns.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    run = Run(console, arguments.quick)
    isa = arguments.isa or trine.backends.cpu_isas()[-1]
    with trine.backends.cpu_isa(isa):
        for threads in thread_counts:
            torch.set_num_threads(threads)
            for op in (op for op in OTHER if op in ops):
                run.time(comparisons(op, threads, arguments), threads)
            if chosen := [op for op in LINEAR if op in ops]:
                run.time(linear(chosen, threads, arguments), threads)
        facts = results.machine_facts("python -m benchmarks.run cpu")
    for op in ops:
        console.print(table.op_table(op, run.rows))
    console.print(table.peer_table(run.rows))
    for c in run.ceilings:
        console.print(
            f"ceilings, {c.threads} threads: DRAM {c.dram_gb_s:.1f}, L3 {c.l3_gb_s:.1f}, "
            f"L2 {c.l2_gb_s:.1f} GB/s, int8 {c.int8_gop_s:.0f} GOP/s, fp32 {c.fp32_gflop_s:.0f}"
        )
    for failure in run.failures:
        console.print(failure)
    if not (
        arguments.op or arguments.isa or arguments.threads or arguments.quick or arguments.rows
    ):
        console.print(f"written: {results.write(facts, run.ceilings, run.rows, run.failures)}")
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(cpu(parse_arguments()))
