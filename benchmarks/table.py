"""The result as tables: one for each op, and who could not run."""

from collections.abc import Sequence

from rich.table import Table

from benchmarks.results import Row


def op_table(op: str, rows: Sequence[Row]) -> Table:
    table = Table(title=op, title_justify="left")
    for name in ("", "shape", "thr", "weights", "kernel"):
        table.add_column(name, no_wrap=True)
    columns = (
        "us",
        "GB/s",
        "GOP/s",
        "ceiling",
        "x fp32",
        "x best",
        "best peer",
        "error",
        "left out",
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "best peer" else "right", no_wrap=True)
    for row in (row for row in rows if row["op"] == op):
        table.add_row(
            str(row["name"]).removeprefix(op).strip(),
            " ".join(str(row[key]) for key in ("M", "N", "K", "rows", "classes") if key in row),
            str(row["threads"]),
            str(row["weights"]),
            str(row.get("kernel", "")),
            number(row["us"]),
            number(row.get("gb_s")),
            number(row.get("gop_s")),
            f"{row['share']:.0%} {row['bound']}" if row.get("share") else "",
            number(row.get("x_baseline"), 2),
            number(row.get("x_best"), 2),
            str(row.get("best_peer", "")),
            "" if row["error"] is None else f"{row['error']:.1e}",
            left_out(row),
        )
    return table


def peer_table(rows: Sequence[Row]) -> Table:
    """Every peer's time and error, so that nobody has to take "best" on trust."""
    table = Table(title="peers", title_justify="left")
    for name in ("peer", "shape", "thr", "weights"):
        table.add_column(name, no_wrap=True)
    for name in ("us", "GB/s", "GOP/s", "error", "left out"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in (row for row in rows if not row["op"]):
        table.add_row(
            str(row["name"]),
            " ".join(str(row[key]) for key in ("M", "N", "K", "rows", "classes") if key in row),
            str(row["threads"]),
            str(row["weights"]),
            number(row["us"]),
            number(row.get("gb_s")),
            number(row.get("gop_s")),
            "" if row["error"] is None else f"{row['error']:.1e}",
            left_out(row),
        )
    return table


def left_out(row: Row) -> str:
    """How many samples were disturbed and left out; "all" where none was clean, so all count."""
    if not row["disturbed"]:
        return ""
    if row["disturbed"] == row["samples"]:
        return "all kept!"
    return f"{row['disturbed']} of {row['samples']}"


def number(value: object, digits: int = 1) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.{digits}f}"
