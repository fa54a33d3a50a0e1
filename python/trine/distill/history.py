"""What happened in training, kept as lines, scalars and a picture."""

import json
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["History"]

SECONDS_BETWEEN_LINES = 10  # of a log, which no line overwrites as it does on a terminal


class History:
    """Rows of numbers by step, in folder/history.jsonl, one a line.

    A resumed run drops the rows after its checkpoint, which it computes again.

    Args:
        folder: None: rows are kept in memory only.
        tensorboard: also as scalars, in folder/tensorboard.
        show: a line on stderr that says how far it is; in a log one every ten seconds.
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool, show: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.folder, self.show = folder, show
        self._started, self._examples = time.monotonic(), 0
        self._shown = -float("inf")  # when the last line was
        self._writer = None
        if tensorboard:
            if folder is None:
                raise ValueError("Distiller: tensorboard needs a folder to write to")
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError("tensorboard is not installed: pip install tensorboard") from None
            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def restore(self, step: int) -> None:
        """The rows up to a step, of the run that is continued."""
        if self.folder is None or not (path := self.folder / "history.jsonl").exists():
            return
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        self.rows = [row for row in rows if row["step"] <= step]
        self._write_all()

    def _write_all(self) -> None:
        path = self.folder / "history.jsonl"
        partial = path.with_suffix(".part")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        partial.replace(path)

    def add(self, row: dict[str, Any], examples: int, steps: int) -> None:
        """A row: "step", "epoch" and numbers. `examples` were seen since the last."""
        self._examples += examples
        seconds = max(1e-9, time.monotonic() - self._started)
        self.rows.append(row)
        if self.folder is not None:
            with (self.folder / "history.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        numbers = {k: v for k, v in row.items() if isinstance(v, float)}
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, row["step"])
            self._writer.add_scalar("examples_per_second", self._examples / seconds, row["step"])
        if self.show:
            text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            line = f"step {row['step']}/{steps}  {self._examples / seconds:.0f} examples/s  {text}"
            if sys.stderr.isatty():
                print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            elif row["step"] == steps or seconds - self._shown >= SECONDS_BETWEEN_LINES:
                print(line, file=sys.stderr, flush=True)
                self._shown = seconds

    def close(self) -> None:
        """Draw the curves, if there is a folder and matplotlib."""
        if self._writer is not None:
            self._writer.close()
        if self.show and sys.stderr.isatty():
            print(file=sys.stderr)
        if self.folder is not None and self.rows:
            draw(self.rows, self.folder / "curves.png")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each number against the step; left out where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    names = list(dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, float)))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * lines), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, i + 1)
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None)
        axes.set_title(name, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    partial = path.with_suffix(".part")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)
