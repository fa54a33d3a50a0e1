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
    python -m benchmarks.run goals benchmarks/results/<processor or GPU>.json

The first one writes benchmarks/results/<processor>.json and .png; stopped, it goes on with
--resume. `gpu` replays calls from graphs and writes <GPU>.json there, which grows as it goes.
`goals` says what such a run reached of what the kernels are to reach. Other runs print.
`instructions` counts what the inner loops execute under valgrind: a figure that repeats on a noisy
machine.
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

from benchmarks import cpu_goals, goals, instructions, results, roofline, table
from benchmarks.case import Comparison, sentence
from benchmarks.ceilings import Ceilings, best_of, measure
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu import run as gpu
from benchmarks.gpu.plan import OPS as GPU_OPS
from benchmarks.linear_cases import LAYERS, ROWS
from benchmarks.linear_cases import comparisons as linear_comparisons
from benchmarks.measure import in_turns

LINEAR = (
    *("ternary_linear", "int8_linear", "int8_weight_linear"),
    *("sparse24_linear", "ternary24_linear"),
)
OTHER = (
    "quantize_rows",
    "softmax_kl",
    "linear_softmax_kl",
    "small_shapes",
    "call_overhead",
    "minilm",
)


# An unfinished run, from which --resume goes on.
UNFINISHED = Path("out/cpu")


@dataclass
class Measured:
    """What a run has found so far, and of which parts."""

    ceilings: list[Ceilings] = field(default_factory=list)
    rows: list[results.Row] = field(default_factory=list)
    failures: list[results.Failure] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.ceilings + other.ceilings,
            self.rows + other.rows,
            self.failures + other.failures,
            self.parts + other.parts,
        )


@dataclass(frozen=True)
class Part:
    """What is measured in one go, with one number of threads."""

    threads: int
    suite: (
        str  # one of OTHER, or "linear": the linear ops together, because their peers are the same
    )
    layer: tuple[int, int] | None = None

    def __str__(self) -> str:
        layer = f" {self.layer[0]} x {self.layer[1]}" if self.layer else ""
        return f"{self.threads} threads: {self.suite}{layer}"

    def comparisons(self, arguments: argparse.Namespace) -> Iterator[Comparison]:
        if self.layer is None:
            module = import_module(f"benchmarks.bench_{self.suite}")
            return module.comparisons(self.threads, arguments.quick)
        ops = [op for op in LINEAR if op in (arguments.op or LINEAR)]
        chosen = [o for op in ops for o in import_module(f"benchmarks.bench_{op}").OPS]
        rows = arguments.rows or ROWS
        return linear_comparisons(chosen, self.layer, rows, self.threads, arguments.quick)


def parts(arguments: argparse.Namespace, threads: int) -> list[Part]:
    ops = arguments.op or OTHER + LINEAR
    layers = LAYERS[:1] if arguments.quick else LAYERS
    return [Part(threads, op) for op in OTHER if op in ops] + [
        Part(threads, "linear", layer) for layer in layers if set(ops) & set(LINEAR)
    ]


def instruction_set(isa: str | None) -> AbstractContextManager:
    """The one asked for; otherwise every kernel takes the best it has."""
    return nullcontext() if isa is None else trine.backends.cpu_isa(isa)


def prepare(threads: int) -> None:
    """Once, in a process that has never had another number of threads."""
    torch.set_num_threads(threads)
    # Advice of the peers to their users would break the line that shows the progress.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def measure_part(arguments: argparse.Namespace, part: Part, progress: str) -> Measured:
    """Between two measurements of the ceilings, the better of which judges the rows."""
    rounds, budget = (7, 0.2) if arguments.quick else (11, 0.5)  # seconds, for each contestant
    torch.manual_seed(0)
    found, timed = Measured(parts=[str(part)]), []
    with (
        instruction_set(arguments.isa),
        Console(stderr=True).status(f"{progress} {part}") as status,
    ):
        found.ceilings.append(measure(part.threads))
        for comparison in part.comparisons(arguments):
            shape = " ".join(f"{key} {value}" for key, value in comparison.shape.items())
            status.update(f"{progress} {part}, {shape} {comparison.weights}")
            calls = {who.name: who.timed for who in comparison.contestants}
            timed.append((comparison, in_turns(calls, rounds, budget, comparison.mode)))
            found.failures += results.failures_of(comparison, {"threads": part.threads})
        found.ceilings.append(measure(part.threads))
    for comparison, timings in timed:
        found.rows += results.rows_of(part.suite, comparison, timings, best_of(found.ceilings))
    return found


def resumed(facts: dict[str, object]) -> Measured:
    """What the unfinished run of this machine and command has found."""
    path = UNFINISHED / f"{facts['slug']}.json"
    try:
        saved = results.read(path)
    except FileNotFoundError:
        sys.exit(f"benchmarks.run cpu: nothing to resume, there is no {path}; leave --resume away")
    done = saved["machine"].pop("parts")
    if saved["machine"] != facts:
        sys.exit(
            f"benchmarks.run cpu: {path} is of another machine, build or command "
            f"({saved['machine']}, here {facts}); leave --resume away to begin anew"
        )
    ceilings = [Ceilings(**c) for c in saved["ceilings"]]
    return Measured(ceilings, saved["rows"], saved["failures"], done)


def cpu(arguments: argparse.Namespace) -> int:
    chosen = {name: value for name, value in vars(arguments).items() if name != "resume" and value}
    whole = chosen == {"command": "cpu"}
    if arguments.resume and not whole:
        sys.exit("benchmarks.run cpu: only a whole run is resumed; give --resume alone")
    with instruction_set(arguments.isa):
        facts = results.machine_facts("python -m benchmarks.run cpu")
    found = resumed(facts) if arguments.resume else Measured()
    counts = arguments.threads or sorted({1, torch.get_num_threads()})
    planned = [part for threads in counts for part in parts(arguments, threads)]
    for threads in counts:
        # A process for each: thread pools of several libraries cannot be resized, and spin when
        # idle.
        with multiprocessing.get_context("spawn").Pool(1, prepare, (threads,)) as pool:
            for part in (part for part in planned if part.threads == threads):
                if str(part) in found.parts:
                    continue
                progress = f"{len(found.parts) + 1}/{len(planned)}"
                found += pool.apply(measure_part, (arguments, part, progress))
                if whole:
                    _write(facts | {"parts": found.parts}, found, UNFINISHED)
            pool.close()  # leaving the block would end the process before it has tidied up
            pool.join()
    # Piped into a file the tables keep their columns.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    for shown in table.tables(found.rows, found.ceilings, found.failures):
        console.print(shown)
    if whole:
        path = _write(facts, found, results.FOLDER)
        (UNFINISHED / path.name).unlink()
        console.print(f"written: {path}, {roofline.draw(results.read(path), path)}")
    return 1 if any(failure["wrong"] for failure in found.failures) else 0


def judge(arguments: argparse.Namespace) -> int:
    """What a saved run reached."""
    try:
        saved = results.read(arguments.file)
        if isa := saved["machine"].get("isa"):
            shown = goals.table(cpu_goals.Result(saved), cpu_goals.goals_of(isa))
        else:
            shown = goals.table(gpu_goals.Result(saved), gpu_goals.GOALS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(
            f"benchmarks.run goals: {arguments.file} is no result of `cpu` or `gpu`: "
            f"{sentence(error)}",
            file=sys.stderr,
        )
        return 2
    Console(width=None if sys.stdout.isatty() else 180).print(shown)
    return 0


def _write(facts: dict[str, object], found: Measured, folder: Path) -> Path:
    return results.write(facts, found.ceilings, found.rows, found.failures, folder)


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
    timed.add_argument(
        "--resume", action="store_true", help="go on with a whole run that was stopped"
    )
    timed.add_argument("--isa", choices=trine.backends.cpu_isas(), help="force CPU kernels")
    commands.add_parser("instructions", help="count the inner loops' instructions under valgrind")
    on_gpu = commands.add_parser("gpu", help="time the CUDA and Triton kernels")
    on_gpu.add_argument("--op", action="append", choices=GPU_OPS, help="only this one (repeatable)")
    on_gpu.add_argument("--quick", action="store_true", help="two layers, fewer rows")
    on_gpu.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing new after so many"
    )
    judged = commands.add_parser("goals", help="what a saved run reached")
    judged.add_argument("file", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parsed = parse_arguments()
    commands = {"cpu": cpu, "gpu": gpu.main, "goals": judge}
    sys.exit(commands.get(parsed.command, lambda _: instructions.main())(parsed))
