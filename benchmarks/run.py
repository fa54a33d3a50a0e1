"""Time every op against float PyTorch and against what this machine can do.

Ours and the baseline alternate in one process; the table shows medians. Weights are rotated through
192 MB, so that they come from memory as in a model. A case whose result is wrong is not timed.

    python -m benchmarks.run
    python -m benchmarks.run --op ternary_linear --op int8_linear --threads 1
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch
import trine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from trine.evaluate.latency import alternate

from benchmarks.case import Case
from benchmarks.ceilings import Ceilings, measure

OPS = ("quantize_rows", "ternary_linear", "int8_linear", "sparse24_linear", "softmax_kl")
RESULTS = Path(__file__).with_name("results")


def time_case(case: Case, ceilings: Ceilings) -> dict:
    """One row of the result: a JSON-able dictionary."""
    prepared = case.prepare()
    prepared.check()
    seconds = alternate({"ours": prepared.ours, "baseline": prepared.baseline})
    ours, work = seconds["ours"], case.work
    floor, bound = ceilings.seconds(work)
    return {
        "op": case.op,
        "variant": case.variant,
        "kernel": kernel_of(case),
        "shape": case.shape,
        "threads": ceilings.threads,
        "median_us": ours * 1e6,
        "baseline": case.baseline,
        "speedup": seconds["baseline"] / ours,
        "gb_s": work.bytes_read / ours / 1e9,
        "gop_s": (work.int8_ops + work.fp32_ops) / ours / 1e9,
        "bound": bound,
        "share_of_ceiling": floor / ours,
    }


def kernel_of(case: Case) -> str:
    """The kernel in force. An op with a table of kernels for each kind of weight has several."""
    kinds = {entry.op: entry.kernel for entry in trine.backends.describe().ops}
    weight = "int8" if case.work.int8_ops else "float"
    return kinds.get(case.op) or kinds[f"{case.op} ({weight} values)"]


def result_table(rows: list[dict]) -> Table:
    table = Table()
    for name in ("op", "shape", "kernel"):
        table.add_column(name)
    for name in ("threads", "median us", "x float", "GB/s", "GOP/s", "of ceiling"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['op']} {row['variant']}".strip(),
            row["shape"],
            row["kernel"],
            str(row["threads"]),
            f"{row['median_us']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['gb_s']:.1f}",
            f"{row['gop_s']:.0f}",
            f"{row['share_of_ceiling']:.0%} {row['bound']}",
        )
    return table


def parse_arguments() -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", action="append", choices=OPS, help="only this op (repeatable)")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all cores")
    parser.add_argument("--isa", choices=trine.backends.cpu_isas(), help="force CPU kernels")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    cores = torch.get_num_threads()
    thread_counts = arguments.threads or sorted({1, cores})
    isa = arguments.isa or trine.backends.cpu_isas()[-1]
    # Piped into a file the table keeps its columns.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    torch.manual_seed(0)

    rows, ceilings = [], []
    with trine.backends.cpu_isa(isa):
        for threads in thread_counts:
            torch.set_num_threads(threads)
            ceilings.append(measure(threads))
            for op in arguments.op or OPS:
                cases = import_module(f"benchmarks.bench_{op}").CASES
                label = f"{op}, {threads} threads"
                for case in track(cases, label, console=console, transient=True):
                    rows.append(time_case(case, ceilings[-1]))

    console.print(result_table(rows))
    console.print(
        "x float: the baseline's median over ours. of ceiling: the least time that reading the "
        "bytes or computing the products takes here, over ours, and which of the two it is. "
        "Ceilings are measured before the cases; a clock that rises later lifts shares above 100%."
    )
    for c in ceilings:
        console.print(
            f"ceilings, {c.threads} threads: read {c.read_gb_s:.1f} GB/s, "
            f"int8 {c.int8_gop_s:.0f} GOP/s, fp32 {c.fp32_gflop_s:.0f} GFLOP/s"
        )
    if arguments.op is None and arguments.isa is None:
        console.print(f"written: {write_results(rows, ceilings)}")


def write_results(rows: list[dict], ceilings: list[Ceilings]) -> Path:
    """Write a whole run beside its final place, then rename it there."""
    machine = trine.backends.describe()
    slug = "-".join("".join(c if c.isalnum() else " " for c in machine.processor.lower()).split())
    path = RESULTS / f"{slug}.json"
    facts = {
        "processor": machine.processor,
        "cores": os.cpu_count(),
        "isa": machine.isa_in_force,
        "torch": torch.__version__,
        "trine": trine.__version__,
        "command": "python -m benchmarks.run",
    }
    result = {"machine": facts, "ceilings": [asdict(c) for c in ceilings], "rows": rows}
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
