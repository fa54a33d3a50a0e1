"""The job from beginning to end: train, compress, serve, compare, report."""

import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import trine
from trine import backends, report
from trine.demo.classifiers import train_classifiers
from trine.demo.digits import load_digits
from trine.demo.rows import check_promises
from trine.demo.settings import Settings
from trine.demo.stages import Stages
from trine.demo.table import show
from trine.demo.tasks import digits_rows, sentence_rows


def run(
    settings: Settings, out: Path, *, fresh: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Do the whole job; show the table; write report.html, report.json and the models into `out`.

    Trained weights are kept in `out` too, so that a job that was killed goes on after the last
    finished training; `fresh` trains everything again.

    Returns what report.json holds. Raises rows.BrokenPromise, with the report written, where a
    compressed model fails a check.
    """
    start = time.monotonic()
    console = console or Console()
    models = out / "models"
    models.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        stages = Stages(out / "stages", asdict(settings), fresh=fresh)
        trained = train_classifiers(digits, settings, stages, progress)
        rows = digits_rows(trained, digits, settings, models, progress)
        encoder_rows, encoder = sentence_rows(settings, models, progress)
    rows += encoder_rows
    results = {
        **_machine(),
        "settings": asdict(settings),
        "digits": {
            part: len(getattr(digits, part).labels) for part in ("train", "validation", "test")
        },
        "rows": [asdict(row) for row in rows],
        "ends": [asdict(trial) for trial in trained.ends],
        "encoder": encoder,
        "seconds": time.monotonic() - start,
    }
    report.write(results, out)
    show(results, console)
    console.print(f"The whole report: {out / 'report.html'}; the same in {out / 'report.json'}")
    check_promises(rows)
    return results


def _machine() -> dict[str, Any]:
    here = backends.describe()
    return {
        "trine": trine.__version__,
        "torch": here.torch_version,
        "python": platform.python_version(),
        "processor": here.processor,
        "isa": here.isa_in_force,
        "threads": here.threads,
    }
