"""What the studies share: models trained over several seeds, judged on the same examples.

A study is a list of parts (one model trained with one seed, one measurement). Each finished part is
kept in out/studies/, so that a study that was stopped goes on with --resume. At the end it writes
benchmarks/results/<study>.json and .png, and prints the rows as a table.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import trine
from rich.console import Console
from rich.status import Status
from torch import Tensor, nn
from trine.evaluate import bootstrap_interval, disk_bytes

from benchmarks.results import FOLDER, machine_facts
from benchmarks.table import table_of

SEEDS = (0, 1, 2)
UNFINISHED = Path("out/studies")


@dataclass(frozen=True)
class Row:
    """One figure of one model.

    name: the model or the comparison. metric: what `value` is, with its unit. interval: 95%, by
    bootstrap over the examples. bytes: on disk. latency_ms: median of a call, by what is called
    ("batch 1"). published: the figure of the paper, or a sentence where it is on other data. goal:
    what `value` is to reach; met: whether it does (true where there is no goal).
    """

    name: str
    metric: str
    value: float
    interval: tuple[float, float] | None = None
    bytes: int | None = None
    latency_ms: Mapping[str, float] | None = None
    published: float | str | None = None
    goal: float | None = None
    met: bool = True


def mean_over_seeds(scores: Tensor) -> tuple[float, tuple[float, float]]:
    """The mean of `scores` [seeds, examples] and its 95% interval, the examples drawn again.

    The seeds are not: three are too few to draw from. So the interval says how sure the mean of
    these runs is on so many examples, not how far another seed may lie.
    """
    of_example = scores.double().mean(0)
    return of_example.mean().item(), bootstrap_interval(of_example)


def gain(scores: Tensor, baseline: Tensor) -> tuple[float, tuple[float, float]]:
    """The mean of `scores` - `baseline`, both [seeds, examples], and its interval.

    Paired: the same example is drawn for both, so what is hard for both does not widen it.
    """
    return mean_over_seeds(scores.double() - baseline.double())


def bytes_on_disk(model: nn.Module) -> int:
    """Bytes of the file that `trine.save` makes of `model`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        trine.save(model, path)
        return disk_bytes(path)


class Study:
    """A study that is under way.

        study = Study("distillation-digits", arguments, parts=9, settings={"epochs": 60})
        for seed in SEEDS:
            found = study.part(f"alone {seed}", lambda: {"correct": ...})
        study.finish(rows)

    Args:
        name: of its files.
        arguments: what `parse_arguments` gave.
        parts: how many there will be.
        settings: plain numbers and texts that decide the result. Parts are only taken up again
            under the same ones.
        seeds: how many its figures are of.
    """

    def __init__(
        self,
        name: str,
        arguments: argparse.Namespace,
        parts: int,
        settings: Mapping[str, Any],
        *,
        seeds: int = len(SEEDS),
    ) -> None:
        self.name, self.parts, self.done, self.seeds = name, parts, 0, seeds
        self.quick = arguments.quick
        self.settings = {**settings, "threads": torch.get_num_threads()}
        self.console = Console(stderr=True)
        self.folder = UNFINISHED / (f"{name}-quick" if self.quick else name)
        self._open(arguments.resume)
        self._elapsed = self.folder / "seconds"  # until the last part was done, all starts together
        self._begun = time.perf_counter()
        if self._elapsed.exists():
            self._begun -= float(self._elapsed.read_text())

    def _open(self, resume: bool) -> None:
        kept = self.folder / "settings.json"
        text = json.dumps({"quick": self.quick, **self.settings}, indent=1)
        if resume:
            if not kept.exists():
                sys.exit(f"nothing to resume: there is no {kept}; leave --resume away")
            if kept.read_text() != text:
                sys.exit(
                    f"{kept} is of other settings ({kept.read_text()}, here {text}); "
                    "leave --resume away to begin anew"
                )
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        kept.write_text(text)

    def part(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` returns (tensors, numbers, texts), or returned before it was stopped."""
        if not self._path(name).exists():
            with self.console.status(f"{self.done + 1}/{self.parts} {name}"):
                self._keep(name, compute)
        return self._found(name)

    def parts_at_once(
        self, computes: Mapping[str, Callable[[], dict[str, Any]]]
    ) -> dict[str, dict[str, Any]]:
        """As `part`, for each of these: one process with one thread for each thread that torch has.

        For what has too little work for several threads, such as training a small model. The
        processes are forked, so that they share what has been made before; see `without_cuda`.
        """
        kept = [name for name in computes if self._path(name).exists()]
        found = {name: self._found(name) for name in kept}
        left = {name: compute for name, compute in computes.items() if name not in found}
        with self.console.status("") as status:
            for name in self._forked(left, status):
                found[name] = self._found(name)
        return {name: found[name] for name in computes}

    def _forked(
        self, computes: Mapping[str, Callable[[], dict[str, Any]]], status: Status
    ) -> Iterator[str]:
        """Names, as soon as they are kept."""

        def alone(name: str) -> None:
            torch.set_num_threads(1)
            self._keep(name, computes[name])

        context = multiprocessing.get_context("fork")
        waiting, running = list(computes), {}
        try:
            while waiting or running:
                while waiting and len(running) < torch.get_num_threads():
                    name = waiting.pop(0)
                    process = context.Process(target=alone, args=(name,), daemon=True)
                    process.start()
                    running[process.sentinel] = (name, process)
                names = ", ".join(name for name, _ in running.values())
                status.update(f"{self.done + 1}/{self.parts} {names}")
                for sentinel in multiprocessing.connection.wait(list(running)):
                    name, process = running.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        sys.exit(f"'{name}' failed, see above; --resume keeps what is done")
                    yield name
        finally:
            for _, process in running.values():
                process.terminate()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '-').replace(' ', '-')}.pt"

    def _keep(self, name: str, compute: Callable[[], dict[str, Any]]) -> None:
        start = time.perf_counter()
        found = {**compute()}
        found["seconds"] = time.perf_counter() - start
        path = self._path(name)
        beside = path.with_suffix(".tmp")
        torch.save(found, beside)
        beside.replace(path)

    def _found(self, name: str) -> dict[str, Any]:
        """What was kept, with a line that says so."""
        found = torch.load(self._path(name), weights_only=True)
        self.done += 1
        elapsed = time.perf_counter() - self._begun
        beside = self._elapsed.with_suffix(".tmp")
        beside.write_text(str(elapsed))
        beside.replace(self._elapsed)
        kept = len(list(self.folder.glob("*.pt")))  # more than done, where a study goes on
        left = elapsed / kept * (self.parts - kept) / 60
        label = f"{self.done}/{self.parts} {name}"
        self.console.print(f"{label}: {found['seconds']:.0f} s (about {left:.0f} min left)")
        return found

    def finish(
        self, rows: Sequence[Row], draw: Callable[[Path], None] | None = None, notes: str = ""
    ) -> None:
        """Write rows and picture, and print the table.

        Args:
            draw: makes the picture at a path; by default every figure with its interval.
            notes: what a reader of the figures has to know.
        """
        facts = machine_facts(f"python -m benchmarks.{self.name.replace('-', '.', 1)}")
        head = {"study": self.name, "machine": facts, "quick": self.quick, "notes": notes}
        seconds = round(time.perf_counter() - self._begun)
        head |= {"seeds": self.seeds, "seconds": seconds, "settings": self.settings}
        lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
        text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
        path = FOLDER / f"{self.name}.json"
        beside = path.with_suffix(".tmp")
        beside.write_text(text)
        beside.replace(path)
        picture = path.with_suffix(".png")
        (draw or (lambda path: draw_rows(rows, path)))(picture)
        console = Console() if sys.stdout.isatty() else Console(width=150)
        console.print(as_table(self.name, rows))
        if notes:
            console.print(notes)
        console.print(f"written: {path}, {picture}")


def without_cuda() -> None:
    """Ends the program with one sentence where CUDA would be in the way of `Study.parts_at_once`:
    with a device in sight the first backward pass starts threads that no fork survives."""
    if torch.cuda.is_available():
        sys.exit(
            "this study measures the CPU in forked processes, which a CUDA device does not allow; "
            "run it with CUDA_VISIBLE_DEVICES= (nothing) in the environment"
        )


def as_table(title: str, rows: Sequence[Row]):
    heads = ("value", "95% interval", "MB", "ms", "goal", "met")
    table = table_of(title, ("", "metric"), heads, ("published",))
    for row in rows:
        times = (row.latency_ms or {}).items()
        table.add_row(
            row.name,
            row.metric,
            f"{row.value:.4g}",
            "" if row.interval is None else "{:.4g} .. {:.4g}".format(*row.interval),
            "" if row.bytes is None else f"{row.bytes / 1e6:.2f}",
            ", ".join(f"{name}: {ms:.3g}" for name, ms in times),
            "" if row.goal is None else f"{row.goal:.4g}",
            "" if row.goal is None else "yes" if row.met else "NO",
            "" if row.published is None else str(row.published),
        )
    return table


def draw_rows(rows: Sequence[Row], path: Path) -> None:
    """Every figure with its interval, a panel for each metric; a tick where a goal is."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    metrics = list(dict.fromkeys(row.metric for row in rows))
    by_metric = [[row for row in rows if row.metric == metric] for metric in metrics]
    heights = [len(group) + 1.5 for group in by_metric]
    figure, panels = plt.subplots(
        len(metrics),
        1,
        figsize=(9, 0.3 * sum(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, metric, group in zip(panels[:, 0], metrics, by_metric, strict=True):
        for place, row in enumerate(group):
            low, high = row.interval or (row.value, row.value)
            axes.plot([low, high], [place, place], color="#0072b2", linewidth=2)
            axes.plot(row.value, place, "o", color="#0072b2")
            if row.goal is not None:
                axes.plot(row.goal, place, "|", color="#d55e00", markersize=16, markeredgewidth=2)
        axes.set_yticks(range(len(group)), [row.name for row in group])
        axes.set_ylim(len(group) - 0.4, -0.6)  # the first row on top, as in the table
        axes.set_title(metric, loc="left", fontsize=10)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_arguments(
    doc: str,
    program: str,
    given: Sequence[str] | None = None,
    *,
    data: str = "",
    subset: bool = False,
) -> argparse.Namespace:
    """`--quick`, `--resume`, where the study needs `data` (what DIR must hold) `--data DIR`, and
    where it takes a subset of that `--whole`.

    Ends the program with one sentence where DIR does not hold it.
    """
    summary, _, details = doc.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="within five minutes on two cores")
    if subset:
        scale.add_argument("--whole", action="store_true", help="all of the data: hours")
    parser.add_argument("--resume", action="store_true", help="go on with a study that was stopped")
    help_of_data = f"a folder that holds {data}" if data else "not needed by this study"
    parser.add_argument("--data", type=Path, metavar="DIR", help=help_of_data)
    arguments = parser.parse_args(given)
    if data and not (arguments.data and (arguments.data / data).exists()):
        parser.error(f"it needs --data DIR, a folder that holds {data}; given: {arguments.data}")
    return arguments
