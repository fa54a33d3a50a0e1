"""Results in, report.html and report.json out."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BASELINE = (
    "Speed-up is against the float model of the same architecture (students against the float "
    "student, the encoder against itself in float; float rows are their own baseline), in the same "
    "process, calls taking turns, medians compared."
)


def render(results: Mapping[str, Any]) -> str:
    """The report as one HTML page with its plots inside; nothing in it is loaded from elsewhere.

    Args:
        results: what `trine.demo.job.run` returns, or report.json read again.
    """
    import jinja2
    from markupsafe import Markup

    from trine.report import plots

    tasks = {
        task: [row for row in results["rows"] if row["task"] == task]
        for task in ("digits", "sentences")
    }
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    environment.filters["ms"] = plots.milliseconds
    layers = results["encoder"]["compression"]["layers"]
    drawn = {
        "accuracy": plots.accuracy_against_size(tasks["digits"]),
        "digits_latency": plots.latency_bars(tasks["digits"]),
        "sentences_latency": plots.latency_bars(tasks["sentences"]),
        "layers": plots.layer_speedups(layers),
    }
    return environment.get_template("page.html").render(
        results=results,
        tasks=tasks,
        layers=layers,
        baseline=BASELINE,
        plots={name: Markup(svg) for name, svg in drawn.items()},
    )


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write report.html and report.json into `folder`, each complete or not at all."""
    _replace(folder / "report.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    _replace(folder / "report.html", render(results))


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
