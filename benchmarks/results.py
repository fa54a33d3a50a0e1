"""The result of a run: rows that JSON can hold, and the file they are kept in."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import trine

from benchmarks.case import Comparison
from benchmarks.ceilings import Ceilings
from benchmarks.measure import Timing

FOLDER = Path(__file__).with_name("results")

Row = dict[str, object]
Failure = dict[str, object]


def rows_of(
    suite: str, comparison: Comparison, timings: Mapping[str, Timing], ceilings: Ceilings
) -> list[Row]:
    """One row for each contestant. Ours also say how they stand against peers and ceilings."""
    rows = []
    for who in comparison.contestants:
        timing = timings[who.name]
        us, work = timing.seconds * 1e6, who.work
        row: Row = {
            "suite": suite,
            "op": who.op,
            "name": who.name,
            **comparison.shape,
            **ceilings.about,
            "weights": comparison.weights,
            "us": round(us, 3),
            "samples": timing.samples,
            "disturbed": timing.disturbed,
            "error": who.error and float(f"{who.error:.3g}"),
        }
        if work.bytes_moved:
            row["gb_s"] = round(work.bytes_moved / us / 1e3, 2)
        if operations := work.int8_ops + work.fp32_ops + work.bf16_ops:
            row["gop_s"] = round(operations / us / 1e3, 2)
        if who.op:
            row |= {**asdict(work), "rivals": list(who.rivals), **_standing(who, timings)}
            floor, bound = ceilings.seconds(work, cold=comparison.weights == "cold")
            row["kernel"] = who.kernel
            if floor:
                row |= {"bound": bound, "share": round(floor * 1e6 / us, 3)}
        rows.append(row)
    return rows


def failures_of(comparison: Comparison, about: Mapping[str, int]) -> list[Failure]:
    """Who did not take part, and why; `wrong`: a kernel of ours that was refused."""
    return [
        {"name": name, **comparison.shape, **about, "reason": reason, "wrong": wrong}
        for reasons, wrong in ((comparison.failures, False), (comparison.wrong, True))
        for name, reason in reasons.items()
    ]


def _standing(who, timings: Mapping[str, Timing]) -> Row:
    """The fastest rival, and how many times as fast as it and as the baseline ours is."""
    ours = timings[who.name].seconds
    standing: Row = {}
    rivals = {name: timings[name].seconds for name in who.rivals if name in timings}
    if rivals:
        best = min(rivals, key=rivals.get)
        standing |= {"best_peer": best, "x_best": round(rivals[best] / ours, 3)}
    if who.baseline in timings:
        seconds = timings[who.baseline].seconds
        standing |= {"baseline": who.baseline, "x_baseline": round(seconds / ours, 3)}
    return standing


def machine_facts(command: str) -> dict[str, object]:
    machine = trine.backends.describe()
    return {
        "processor": machine.processor,
        "slug": slug(machine.processor, _cpuinfo()),
        "cores": os.cpu_count(),
        "isa": machine.isa_in_force,
        "torch": torch.__version__,
        "trine": trine.__version__,
        "command": command,
    }


def slug(processor: str, cpuinfo: Mapping[str, str]) -> str:
    """A file name that tells processors apart: virtual machines often say just "AMD EPYC"."""
    numbers = [cpuinfo[key] for key in ("cpu family", "model") if key in cpuinfo]
    text = " ".join([processor.lower(), *numbers])
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def read(path: Path) -> dict[str, list]:
    return json.loads(path.read_text())


def write(
    facts: Mapping[str, object],
    ceilings: Sequence[Ceilings],
    rows: Sequence[Row],
    failures: Sequence[Failure],
    folder: Path = FOLDER,
) -> Path:
    """Write a whole run beside its final place, then rename it there. One line for each row."""

    def lines(entries: Sequence[object]) -> str:
        return "[\n" + ",\n".join("  " + json.dumps(entry) for entry in entries) + "\n ]"

    parts = {
        "machine": json.dumps(facts),
        "ceilings": lines([asdict(c) for c in ceilings]),
        "failures": lines(failures),
        "rows": lines(rows),
    }
    text = "{\n" + ",\n".join(f' "{key}": {value}' for key, value in parts.items()) + "\n}\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts['slug']}.json"
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(path)
    return path
