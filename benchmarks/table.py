"""The result as tables: how each op stands, every contestant's time, who could not run and why."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from rich.table import Table

from benchmarks.ceilings import Ceilings
from benchmarks.results import Failure, Row

SHAPE = ("M", "N", "K", "rows", "classes", "tokens")
NO_CLIFF = 1 / 1.5  # an odd shape may take 1.5 times as long as the next aligned one


def tables(
    rows: Sequence[Row], ceilings: Sequence[Ceilings], failures: Sequence[Failure]
) -> Iterator[Table]:
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    for suite in suites:
        of_suite = [row for row in rows if row["suite"] == suite]
        for op in dict.fromkeys(row["op"] for row in of_suite if row["op"]):
            yield standing([row for row in of_suite if row["op"] == op], str(op))
        if suite != "small_shapes":
            yield from everybody(of_suite, str(suite))
    if failures:
        yield absent(failures)
    yield limits(ceilings)


def standing(rows: Sequence[Row], op: str) -> Table:
    """Ours against the ceilings, the baseline and the best peer."""
    table = table_of(
        f"{op}: ours",
        ("", "shape", "thr", "weights", "kernel"),
        ("us", "GB/s", "GOP/s", "of ceiling", "x base", "x best", "error", "left out"),
        ("best peer",),
    )
    for row in rows:
        cliff = op == "small_shapes" and row["x_baseline"] < NO_CLIFF
        table.add_row(
            str(row["name"]).removeprefix(op).strip(),
            shape_of(row),
            str(row.get("threads", "")),
            str(row["weights"]),
            str(row["kernel"]),
            number(row["us"]),
            number(row.get("gb_s")),
            number(row.get("gop_s")),
            f"{row['share']:.0%} {row['bound']}" if "share" in row else "",
            number(row.get("x_baseline"), 2) + (" cliff!" if cliff else ""),
            number(row.get("x_best"), 2),
            "" if row["error"] is None else f"{row['error']:.1e}",
            left_out(row),
            str(row.get("best_peer", "")),
        )
    return table


def everybody(rows: Sequence[Row], suite: str) -> Iterator[Table]:
    """Times of all contestants, so that nobody has to take "best" on trust: a column for each row
    count where there are several, one table for each number of threads, hot and cold."""

    def kind(row: Row) -> tuple:
        rest = tuple(row[key] for key in SHAPE[1:] if key in row)
        return row.get("threads"), row["weights"], rest

    for threads, weights, rest in dict.fromkeys(map(kind, rows)):
        chosen = [row for row in rows if kind(row) == (threads, weights, rest)]
        columns = list(dict.fromkeys(row.get("M") for row in chosen))
        of_threads = "" if threads is None else f", {threads} threads"
        title = f"{suite} {' x '.join(map(str, rest))} {weights}{of_threads}: us"
        heads = ["us" if m is None else f"M={m}" for m in columns]
        table = table_of(title, ("",), (*heads, "error", "left out"))
        for name in dict.fromkeys(row["name"] for row in chosen):
            by_m = {row.get("M"): row for row in chosen if row["name"] == name}
            errors = [row["error"] for row in by_m.values() if row["error"] is not None]
            disturbed = sum(row["disturbed"] for row in by_m.values())
            samples = sum(row["samples"] for row in by_m.values())
            table.add_row(
                str(name),
                *(number(by_m[m]["us"]) if m in by_m else "-" for m in columns),
                f"{max(errors):.1e}" if errors else "",
                f"{disturbed} of {samples}" if disturbed else "",
                style="bold" if any(row["op"] for row in by_m.values()) else None,
            )
        yield table


def absent(failures: Sequence[Failure]) -> Table:
    table = table_of("not timed", ("", "reason"), ("times",))
    reasons: dict[tuple, int] = {}
    for failure in failures:
        reason = ("WRONG: " if failure["wrong"] else "") + str(failure["reason"])
        key = str(failure["name"]), reason
        reasons[key] = reasons.get(key, 0) + 1
    for (name, reason), times in reasons.items():
        table.add_row(name, reason, str(times))
    return table


def limits(ceilings: Sequence[Ceilings]) -> Table:
    """In the order of measurement: a clock that drifts shows."""
    measured = [{name: v for name, v in asdict(c).items() if name not in c.about} for c in ceilings]
    table = table_of("ceilings", ("thr",), map(_with_unit, measured[0] if measured else ()))
    for c, values in zip(ceilings, measured, strict=True):
        table.add_row(str(c.about.get("threads", "")), *map(number, values.values()))
    return table


def _with_unit(name: str) -> str:
    """ "dram GB/s" for dram_gb_s."""
    what, unit, _ = name.split("_")
    return f"{what} {unit.upper()}/s"


def table_of(
    title: str, left: Sequence[str], right: Iterable[str], last: Sequence[str] = ()
) -> Table:
    table = Table(title=title, title_justify="left", min_width=len(title), box=None)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    for name in last:
        table.add_column(name)
    return table


def shape_of(row: Row) -> str:
    return " ".join(str(row[key]) for key in SHAPE if key in row)


def left_out(row: Row) -> str:
    """How many samples were disturbed and left out; where none was clean, all count."""
    if not row["disturbed"]:
        return ""
    if row["disturbed"] == row["samples"]:
        return "all kept!"
    return f"{row['disturbed']} of {row['samples']}"


def number(value: object, digits: int = 1) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.{digits}f}"
