"""One row per model: saved, served in a fresh process, timed against float, and checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

import trine
from trine.demo.serve import Architecture, outputs, same_bits, serve_in_fresh_process
from trine.evaluate import alternate, disk_bytes
from trine.nn import PackedLinear

Inputs = Mapping[str, Tensor]


class BrokenPromise(RuntimeError):
    """A compressed model does not run on the kernels, or does not give the bits it must give."""


@dataclass
class Row:
    """What is known of one model. None stands for what does not apply to it."""

    name: str
    technique: str
    task: str  # "digits" or "sentences"
    bytes: int  # of the model's one file
    latency_ms: dict[str, float]  # median, by batch size
    speedup: dict[str, float]  # against float of the same architecture, by batch size
    packed_layers: int  # linear layers on trine's kernels
    accuracy: float | None = None
    accuracy_ci: tuple[float, float] | None = None
    agreement: float | None = None  # share of rows with the teacher's class
    bit_exact_convert: bool | None = None
    bit_exact_reload: bool | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None
    rank_correlation: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    simulated: the model under quantisation-aware training that `model` was converted from; None for
        a float model.
    baseline: the name of the float candidate of the same architecture; None for a float model,
        which is its own.
    """

    name: str
    technique: str
    model: nn.Module
    architecture: Architecture
    simulated: nn.Module | None = None
    baseline: str | None = None


def measure(
    candidates: list[Candidate],
    task: str,
    batches: Mapping[str, Inputs],
    folder: Path,
    *,
    rounds: int,
    tick: Callable[[], None],
) -> list[Row]:
    """Save every candidate into `folder`, serve the compressed ones, and time all in turns.

    Args:
        batches: what to call the models with, by batch size.
        rounds: samples per model that a median is taken over.
        tick: called after each candidate (a progress bar's).
    """
    by_name = {c.name: c for c in candidates}
    latency = {
        size: alternate({n: partial(c.model, **inputs) for n, c in by_name.items()}, rounds=rounds)
        for size, inputs in batches.items()
    }
    rows = []
    for candidate in candidates:
        seconds = {size: times[candidate.name] for size, times in latency.items()}
        float_name = candidate.baseline or candidate.name
        path = folder / f"{candidate.name.replace(' ', '-').lower()}.trine"
        trine.save(candidate.model, path)
        row = Row(
            candidate.name,
            candidate.technique,
            task,
            disk_bytes(path),
            latency_ms={size: 1e3 * s for size, s in seconds.items()},
            speedup={size: latency[size][float_name] / s for size, s in seconds.items()},
            packed_layers=sum(isinstance(m, PackedLinear) for m in candidate.model.modules()),
        )
        if candidate.simulated is not None:
            # The largest batch: the most rows that the bits can differ in.
            inputs = batches[max(batches, key=int)]
            here = outputs(candidate.model, inputs)
            row.bit_exact_convert = same_bits(outputs(candidate.simulated, inputs), here)
            there = serve_in_fresh_process(path, candidate.architecture, inputs)
            row.bit_exact_reload = same_bits(there, here)
        rows.append(row)
        tick()
    return rows


def check_promises(rows: list[Row]) -> None:
    """Raise BrokenPromise, in one sentence, for the compressed models that fail a check."""
    broken = []
    for row in (row for row in rows if row.bit_exact_convert is not None):
        if not row.packed_layers:
            broken.append(f"{row.name} has no layer on trine's kernels")
        if not row.bit_exact_convert:
            broken.append(f"{row.name} gives other bits than the model it was converted from")
        if not row.bit_exact_reload:
            broken.append(f"{row.name} gives other bits after saving and loading")
    if broken:
        raise BrokenPromise("trine broke a promise: " + "; ".join(broken) + ".")
