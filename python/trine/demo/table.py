"""The results as a table on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from trine.report import BASELINE
from trine.report.plots import milliseconds


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print one table for each task."""
    digits = [row for row in results["rows"] if row["task"] == "digits"]
    table = _table(
        f"Digits, {results['digits']['test']} test images",
        "accuracy\n[95% int.]",
        "as the\nteacher",
    )
    for row in digits:
        low, high = row["accuracy_ci"]
        accuracy = f"{row['accuracy']:.1%}\n[{100 * low:.1f}, {100 * high:.1f}]"
        table.add_row(*_common(row), accuracy, f"{row['agreement']:.1%}", *_speed(row))
    console.print(table)

    table = _table(
        f"Sentences, {results['encoder']['sentences']} of them", "cosine\nmean, min", "rank\ncorr."
    )
    for row in (row for row in results["rows"] if row["task"] == "sentences"):
        cosine = f"{row['cosine_mean']:.4f}\n{row['cosine_min']:.4f}"
        table.add_row(*_common(row), cosine, f"{row['rank_correlation']:.4f}", *_speed(row))
    console.print(table)
    console.print(f"{BASELINE}\n{_settings(results)}\n{_machine(results)}", style="dim")


def _table(title: str, quality: str, likeness: str) -> Table:
    # Two lines a row, so that it fits into 80 columns.
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("model", width=13)
    table.add_column("technique", width=12)
    headings = ("size\nMB", quality, likeness, "p50 ms\n1, 32", "speed-up\n1, 32", "bits")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _common(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["name"], row["technique"], f"{row['bytes'] / 1e6:.2f}"


def _speed(row: Mapping[str, Any]) -> tuple[str, str, str]:
    if row["bit_exact_convert"] is None:
        bits = ""
    else:
        bits = "same" if row["bit_exact_convert"] and row["bit_exact_reload"] else "DIFFER"
    latency = "\n".join(milliseconds(ms) for ms in row["latency_ms"].values())
    return latency, "\n".join(f"{ratio:.2f}x" for ratio in row["speedup"].values()), bits


def _settings(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    return (
        f"Distilled with T = {settings['temperature']:g}, alpha = {settings['alpha']:g}. "
        "Bits: whether the trained, the converted and the reloaded model give the same."
    )


def _machine(results: Mapping[str, Any]) -> str:
    return (
        f"{results['processor']}, {results['threads']} threads, torch {results['torch']}, "
        f"trine {results['trine']} on {results['isa']} kernels."
    )
